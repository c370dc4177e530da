"""Measures where the time of a training step goes, or of generated tokens, with PyTorch's profiler.

    profiled = training(config, source, say)          # a Profiled: one Profile, and the profiler that made it
    profiled.profiles[0].rows                         # a Row for each operation, the slowest first

Tokens are drawn at random, since the time does not depend on them. Each piece of work, a step or a token, is timed
without the profiler too, which slows small operations. Of all pieces the middle half counts, so that a pause of the
machine changes nothing; the rows are means over them and add up to the mean of the whole.
"""

import dataclasses
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

from fastgpt.checkpoint import store
from fastgpt.checkpoint.source import Source
from fastgpt.config.generation import SamplingParams
from fastgpt.config.inspection import ProfileConfig
from fastgpt.config.training import TrainConfig
from fastgpt.errors import UsageError
from fastgpt.generation.sampler import Sampler
from fastgpt.inspection import least_work
from fastgpt.inspection.least_work import Work, Works
from fastgpt.inspection.scopes import FORWARD, IDLE, OP, OTHER, PHASE, STEP, Place, Scopes, StepTimes, attribute
from fastgpt.model import memory, workloads
from fastgpt.model.gpt import GPT
from fastgpt.model.kv_cache import DenseCache
from fastgpt.ops import autotune, table
from fastgpt.ops.ceilings import Ceilings, Limit
from fastgpt.ops.table import Ops
from fastgpt.system import contention, out_of_memory, threads
from fastgpt.system.device import free_memory, resolve_device, resolve_weights_dtype, synchronize
from fastgpt.system.torch_private import profiled_range
from fastgpt.system.units import counted, format_bytes, format_duration
from fastgpt.training import footprint
from fastgpt.training.measurement import random_batch
from fastgpt.training.setup import choose_machine
from fastgpt.training.state import make_model
from fastgpt.training.step import TrainStep

SECONDS = 2.0  # of each of the two measurements, with the profiler and without
FEWEST, MOST = 3, 12  # pieces of work in a measurement
MOST_TOKENS = 64
SMALL = 0.001  # of a whole: an operation without a limit that takes less is no row of its own
MOST_ROWS = 24
Say = Callable[[str], None]  # shows a line before what takes a while
Piece = Callable[[int], object]  # does a piece of work, by its number
Found = TypeVar("Found")


@dataclass(frozen=True)
class Row:
    """One operation, in all its calls of a step or a token.

    Attributes:
        seconds: by direction.
        work: the least that it must do; None where nobody counted it.
        limit: the time that this needs at the machine's ceilings; None with `work`.
    """

    name: str
    calls: float
    seconds: Mapping[str, float]
    work: Work | None = None
    limit: Limit | None = None

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    @property
    def reached(self) -> float | None:
        """The share of the limit that is reached: 1 is as fast as the ceilings allow."""
        return None if self.limit is None or not self.total else self.limit.seconds / self.total

    @property
    def gain(self) -> float:
        """Seconds that could be won at most, as far as the limit is known."""
        return 0.0 if self.limit is None else max(0.0, self.total - self.limit.seconds)


@dataclass(frozen=True)
class Profile:
    """A piece of work, such as a training step.

    Attributes:
        what: the piece, in words.
        seconds: the mean of the middle half, with the profiler.
        plain: the same without it.
        taken, kept: how many pieces were profiled, and how many of them are the middle half.
        rows: operations, the slowest first; they add up to `seconds`.
        places: seconds by direction, module and operation; they add up to `seconds` too.
        works: the least that each operation must do, also of those that compiled code does not tell apart.
        least: the limits of all of them together, once ceilings are known.
    """

    what: str
    seconds: float
    plain: float
    taken: int
    kept: int
    rows: Sequence[Row]
    places: Mapping[Place, float]
    works: Works
    least: float | None = None

    def against(self, ceilings: Ceilings) -> "Profile":
        """The same with the limits that these ceilings set."""
        rows = [dataclasses.replace(row, limit=row.work and row.work.limit(ceilings)) for row in self.rows]
        least = sum(work.limit(ceilings).seconds for work in self.works.values())
        return dataclasses.replace(self, rows=rows, least=least)

    @property
    def most_to_win(self) -> Row | None:
        """The row whose time is farthest above its limit; None where all are reached, or some have no row."""
        if self.works.keys() - {row.name for row in self.rows}:
            return None
        row = max(self.rows, key=lambda row: row.gain, default=None)
        return row if row is not None and row.gain else None


@dataclass(frozen=True)
class Profiled:
    """The profiles of a model's work, how it computes, and the profilers, which can write traces."""

    profiles: Sequence[Profile]
    device: torch.device
    arithmetic: str
    compiled: bool
    trace: profile


def training(config: ProfileConfig, source: Source | None, say: Say) -> Profiled:
    """Profile training steps of one micro-batch.

    Raises:
        UsageError: the settings do not fit the machine, or the batch the memory.
    """
    run = config.training()
    with threads.restored(), out_of_memory.caught() as shortage:
        machine = choose_machine(run)
        _check_device(machine.device)
        memory.check_training(run, machine.device)
        scopes = Scopes()
        ops = machine.resolve(choose=autotune.chooser(workloads.training(run, machine.dtype), keep=False))
        _check_peak(run, ops, machine.device, machine.dtype)
        model = make_model(run, ops if run.compile else scopes.named_ops(ops), machine.device, source)
        if not run.compile:
            scopes.name_model(model)
        # In a packed run the last token of the vocabulary ends documents.
        step = TrainStep(model, run, machine.device, machine.dtype, run.known_vocab - 1 if run.pack else None)
        scopes.name_step(step)
        batch = random_batch(run, run.batch_size, machine.device)
        works = least_work.of_training(run, sum(p.numel() for p in step.parameters), machine.device, machine.dtype)
        what = f"training step of {run.batch_size} x {run.block_size:,} tokens"
        stand = _Timer(scopes, machine.device, machine.threads, say, by_name=run.compile)
        found, trace = stand.measure({what: (lambda number: step(number, [batch]), works)})
        return Profiled(found, machine.device, least_work.products(machine.device, machine.dtype), run.compile, trace)
    raise UsageError(_too_large(run, shortage.reason))


def generation(config: ProfileConfig, source: Source | None, say: Say) -> Profiled:
    """Profile the decoding of tokens at the end of a context, with the dense cache, and the prefill before them.

    Raises:
        UsageError: the settings do not fit the machine, or the model the memory.
    """
    if config.block_size == 1:
        raise UsageError("`block_size` 1 has no room for a token after others; pass 2 or more, or leave `generate` out")
    if config.compile:
        raise UsageError("`compile` with `generate`: PyTorch's profiler does not see into that code; leave one out")
    with threads.restored(), out_of_memory.caught() as shortage, torch.inference_mode():
        count, scopes = threads.use(config.threads), Scopes()
        device = resolve_device(config.device)
        _check_device(device)
        dtype = resolve_weights_dtype(config.dtype, device)
        model = _generating(config, source, scopes, device, dtype)
        T = config.block_size
        tokens = max(1, min(MOST_TOKENS, T // 2))
        text = random_batch(config.training(), 1, device)[0]
        cache = DenseCache(model.config, device=device, dtype=dtype)
        cache.append = scopes.around(OP + "cache", cache.append)
        logits = scopes.around(PHASE + FORWARD, model)
        draw = scopes.around(PHASE + FORWARD, scopes.around(OP + "sampling", _sampler(config, device)))

        def prefill(number: int) -> None:
            cache.clear()
            draw(logits(text[:, : T - tokens], cache=cache, last_only=True), 0)

        def decode(number: int) -> None:
            if cache.length == T:
                cache.clear()
                cache.advance(T - tokens)  # of which the keys and values are there
            draw(logits(text[:, cache.length : cache.length + 1], cache=cache, last_only=True), number)

        reading = least_work.of_tokens(model.config, 0, T - tokens, device, dtype)
        writing = least_work.of_tokens(model.config, T - tokens // 2, 1, device, dtype)
        found, trace = _Timer(scopes, device, count, say, most=tokens).measure(
            {
                f"prefill of {counted(T - tokens, 'token')}": (prefill, reading),
                f"token after {T - tokens:,} to {T - 1:,} others": (decode, writing),
            }
        )
        return Profiled(found, device, least_work.products(device, dtype), False, trace)
    raise UsageError(_too_large(config.training(), shortage.reason))


class _Timer:
    """Times pieces of work without the profiler, then with it.

    Args:
        threads: CPU threads that compute.
        most: pieces in a measurement; default `MOST`.
        by_name: see `attribute`.
    """

    def __init__(
        self,
        scopes: Scopes,
        device: torch.device,
        threads: int,
        say: Say,
        *,
        most: int | None = None,
        by_name: bool = False,
    ):
        self.scopes, self.device, self.threads, self.say = scopes, device, threads, say
        self.most, self.by_name, self.on_gpu = most or MOST, by_name, device.type == "cuda"

    def measure(self, pieces: Mapping[str, tuple[Piece, Works]]) -> tuple[list[Profile], profile]:
        """Profile each piece several times; `pieces` names what they are, and what they must do at least."""
        # Set before PyTorch's profiler is first used, which would show lines of its own on stderr.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self.on_gpu
        with contention.watching(1 if self.on_gpu else self.threads):
            plain = [self._plain(what, run) for what, (run, _) in pieces.items()]
            with profile(activities=kinds) as trace:
                self.scopes.on = True
                for times, (run, _) in zip(plain, pieces.values(), strict=True):
                    self._profiled(run, len(times))
                self.scopes.on = False
        steps = iter(attribute(trace.events() or [], on_gpu=self.on_gpu, by_name=self.by_name))
        return [
            _profile(what, times, [next(steps) for _ in times], works)
            for times, (what, (_, works)) in zip(plain, pieces.items(), strict=True)
        ], trace

    def _plain(self, what: str, run: Piece) -> list[float]:
        """Seconds of each piece, after two to warm up."""
        first = self._seconds(run, 0)
        if first > SECONDS:
            self.say(f"measuring a {what}; the first one took {format_duration(first)}")
        seconds = self._seconds(run, 0)
        count = max(min(FEWEST, self.most), min(self.most, int(SECONDS / seconds)))
        self.say(f"measuring {counted(count, 'time')} a {what}, about {format_duration(3 * count * seconds)}")
        return [self._seconds(run, number) for number in range(count)]

    def _seconds(self, run: Piece, number: int) -> float:
        synchronize(self.device)
        began = time.perf_counter()
        run(number)
        synchronize(self.device)
        return time.perf_counter() - began

    def _profiled(self, run: Piece, count: int) -> None:
        for number in range(count):
            with profiled_range(STEP):
                run(number)
                synchronize(self.device)


def _profile(what: str, plain: Sequence[float], steps: Sequence[StepTimes], works: Works) -> Profile:
    """The means over the middle half of the steps."""
    kept = _middle_half(steps, lambda step: step.total)
    places, calls = defaultdict[Place, float](float), defaultdict[str, int](int)
    for step in kept:
        for place, seconds in step.seconds.items():
            places[place] += seconds / len(kept)
        for op, count in step.calls.items():
            calls[op] += count
    whole = statistics.mean(step.total for step in kept)
    rows = _rows(places, {op: count / len(kept) for op, count in calls.items()}, works, whole)
    plain_mean = statistics.mean(_middle_half(plain, lambda seconds: seconds))
    return Profile(what, whole, plain_mean, len(steps), len(kept), rows, places, works)


def _rows(places: Mapping[Place, float], calls: Mapping[str, float], works: Works, whole: float) -> list[Row]:
    """A row for each operation, the slowest first; the last one has the small ones and what belongs to none."""
    ops = defaultdict[str, defaultdict[str, float]](lambda: defaultdict(float))
    for place, seconds in places.items():
        ops[place.op][place.direction] += seconds
    large = sorted(
        (op for op in ops if op in works or (op != OTHER and sum(ops[op].values()) >= SMALL * whole)),
        key=lambda op: (op == IDLE, -sum(ops[op].values())),
    )[:MOST_ROWS]
    rest = defaultdict[str, float](float)
    for op in ops.keys() - set(large):
        for direction, seconds in ops[op].items():
            rest[direction] += seconds
    rows = [Row(op, calls.get(op, 0), ops[op], works.get(op)) for op in large]
    return [*rows, Row(OTHER, 0, rest)] if rest else rows


def _middle_half(found: Sequence[Found], key: Callable[[Found], float]) -> list[Found]:
    """Without the quarter with the smallest keys and that with the largest."""
    quarter = len(found) // 4
    return sorted(found, key=key)[quarter : len(found) - quarter]


def _generating(
    config: ProfileConfig, source: Source | None, scopes: Scopes, device: torch.device, dtype: torch.dtype
) -> GPT:
    """The model as generation has it, with the weights of the source or random ones."""
    planned = workloads.generation(config, dtype)
    ops = table.resolve(config.kernels, device, choose=autotune.chooser(planned, keep=False))
    if source is None:
        torch.manual_seed(config.training().seed)
        weights = GPT(config).weights()
        model = GPT.from_weights(config, scopes.named_ops(ops), weights, device, dtype)
    else:
        with store.naming(source.file):
            model = GPT.from_weights(config, scopes.named_ops(ops), source.weights(config), device, dtype)
    scopes.name_model(model)
    return model


def _sampler(config: ProfileConfig, device: torch.device) -> Callable[[torch.Tensor, int], object]:
    """Draws a token, as `generate` does by default: from logits (1, 1, V) and the token's number."""
    sampler = Sampler(1, config.known_vocab, device)
    sampler.begin(0, SamplingParams(), [0])
    return lambda logits, number: sampler(logits[:, -1], [0], [number]).to_host()


def _check_device(device: torch.device) -> None:
    if device.type == "mps":
        raise UsageError("`device` mps: PyTorch's profiler does not see what an Apple GPU runs; pass `device` cpu")


def _check_peak(run: TrainConfig, ops: Ops, device: torch.device, dtype: torch.dtype) -> None:
    """Raise `DoesNotFit` if a step holds more than the free memory of a CPU.

    There the system gives out more memory than there is, and might end the process; a GPU refuses by itself.
    """
    if device.type != "cpu":
        return
    need, free = footprint.estimate(run, ops, device, dtype).peak, free_memory(device)
    if need > free:
        raise out_of_memory.DoesNotFit(f"it holds {format_bytes(need)}, and {format_bytes(free)} are free")


def _too_large(config: TrainConfig, reason: str | None) -> str:
    if config.batch_size == 1:
        return memory.lacking("with one sequence", config, reason)
    said = next((line for line in (reason or "").splitlines() if line.strip()), "")
    return (
        f"`batch_size` {config.batch_size} with `block_size` {config.block_size} does not fit into the memory; pass a "
        f"smaller one{f' ({said:.120})' if said else ''}"
    )
