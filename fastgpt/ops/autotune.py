"""Chooses the fastest backend of each operation on a GPU, for `kernels` auto.

`choose` goes through the operations that a workload uses. For each, `contest` checks the candidates on small examples
against the reference (the rule: `agreement`), times those that agree in turns at the workload's own shape, and
takes the one with the smallest median; of equals, the first in `CANDIDATES`. A candidate that disagrees or raises is
left out, and the printed reason says so. The choice is cached on disk (`timed_choices`), so that it is timed once.

The GPU's own time is measured (`gpu_clock`), of compiled code if the model will be compiled. So the time that a small
model's GPU waits for Python does not decide.
"""

import contextlib
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastgpt.ops.agreement import disagreement
from fastgpt.ops.gpu_clock import GpuClock
from fastgpt.ops.table import TABLE, Chooser, implementation
from fastgpt.ops.timed_choices import CANDIDATES, Choice, ChoiceFile, Environment, environment_of
from fastgpt.ops.workload import Workload, checked_cases, timed_case
from fastgpt.system.caches import cache_dir
from fastgpt.system.device import synchronize

FILE = "kernels.json"
BUDGET = 0.25  # seconds of GPU time for an operation, unless FEWEST_ROUNDS take longer
SAMPLE = 0.0005  # a sample repeats the call until it lasts so many seconds, a thousand times what events resolve
# Few repeats, as all of them are launched before the first begins, and the GPU's queue holds about a thousand kernels.
FEWEST_ROUNDS, MOST_ROUNDS, MOST_REPEATS = 3, 15, 16

Stopwatch = Callable[[Callable[[], object], int], float]  # (call, repeats) -> seconds of all repeats


@dataclass(frozen=True)
class Chosen:
    """The choice of each operation that the workload uses; `seconds`: the time it took, None if all were cached."""

    choices: Mapping[str, Choice]
    gpu: str
    seconds: float | None

    @property
    def backends(self) -> dict[str, str]:
        return {op: choice.backend for op, choice in self.choices.items()}

    @property
    def reason(self) -> str:
        """One line for people."""
        when = "cached" if self.seconds is None else f"timed in {self.seconds:.1f} s"
        parts = [f"fastest of {' and '.join(CANDIDATES)} on {self.gpu}", when]
        for op, choice in self.choices.items():
            parts += [f"{backend} left out of {op}: {why}" for backend, why in choice.left_out.items()]
        if unused := [op for op in TABLE if op not in self.choices]:
            parts.append(f"not timed: {', '.join(unused)}")
        return "; ".join(parts)


def choose(
    workload: Workload,
    device: torch.device,
    *,
    environment: Environment | None = None,
    settle: Callable[[str, Workload, torch.device], Choice] | None = None,
    folder: Path | None = None,
    keep: bool = True,
) -> Chosen:
    """The fastest backend of each operation that the workload uses, from the file of choices if it is known.

    The workload's calls are recorded only if something must be timed.

    Args:
        workload: the calls.
        device: the GPU.
        environment: what else the choice depends on; default this machine's.
        settle: makes the choice of one operation; default `contest`.
        folder: of the file; default the project's cache.
        keep: add what was timed to the file.
    """
    environment, settle = environment or environment_of(device), settle or contest
    file = ChoiceFile((folder or cache_dir()) / FILE)
    known, began, seconds = file.read(environment, workload), time.perf_counter(), None
    choices = {op: choice for op, choice in known.items() if choice is not None}
    if not known or len(choices) < len(known):
        with _borrowed(device):
            timed = {op: settle(op, workload, device) for op in workload.ops if op not in choices}
        seconds = time.perf_counter() - began
        if keep:
            file.add(environment, workload, timed)
        choices |= timed
    return Chosen(choices, environment.gpu, seconds)


def chooser(workload: Workload, *, keep: bool = True) -> Chooser:
    """`choose` for this workload, as `table.resolve` takes it."""
    return functools.partial(choose, workload, keep=keep)


def contest(
    op: str,
    workload: Workload,
    device: torch.device,
    *,
    backends: Mapping[str, Callable[..., Any]] | None = None,
    stopwatch: Stopwatch | None = None,
) -> Choice:
    """Check and time the candidates for an operation.

    Args:
        op, workload, device: what is called, how, and where.
        backends: the candidates' functions; default the table's.
        stopwatch: default a `GpuClock`.
    """
    backends = backends or {backend: implementation(op, backend) for backend in CANDIDATES}
    problem, case = checker(op, workload, device), timed_case(op, workload, device)
    calls, left_out, lasting = {}, {}, True
    for backend, function in backends.items():
        try:
            if why := problem(function):
                left_out[backend] = why
                continue
            call = functools.partial(case.call, case.compiled(function) if workload.compile else function)
            call()  # compiles for this shape, and shows whether the memory suffices
            synchronize(device)
            calls[backend] = call
        except Exception as error:  # whatever it is, another backend may run, and the reason is printed
            left_out[backend] = _first_line(error)
            lasting = lasting and not isinstance(error, torch.OutOfMemoryError)
            synchronize(device)  # raises again where the GPU itself has failed
    seconds = measure(calls, stopwatch or GpuClock().seconds)
    # Where no candidate is left the model takes the first, whose own error then stops the run.
    return Choice(min(seconds, key=seconds.__getitem__, default=CANDIDATES[0]), seconds, left_out, lasting)


def checker(op: str, workload: Workload, device: torch.device) -> Callable[[Callable[..., Any]], str]:
    """A function that names the first fault in the results of an implementation; "" if there is none."""
    cases = checked_cases(op, workload, device)
    stock = [case.results(TABLE[op].torch) for case in cases]
    truth = [case.in_float64().results(TABLE[op].reference) for case in cases]
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"

    def problem(function: Callable[..., Any]) -> str:
        found = (
            disagreement(case.results(function), plain, right, workload.dtype, tf32)
            for case, plain, right in zip(cases, stock, truth, strict=True)
        )
        return next(filter(None, found), "")

    return problem


def measure(calls: Mapping[str, Callable[[], object]], stopwatch: Stopwatch) -> dict[str, float]:
    """The median seconds of each call. The calls take turns, so that clocks and neighbours affect all alike."""
    repeats = {name: repeats_for(stopwatch(call, 1)) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    rounds, spent = 0, 0.0
    while calls and (rounds < FEWEST_ROUNDS or (rounds < MOST_ROUNDS and spent < BUDGET)):
        for name, call in calls.items():
            took = stopwatch(call, repeats[name])
            samples[name].append(took / repeats[name])
            spent += took
        rounds += 1
    return {name: statistics.median(taken) for name, taken in samples.items()}


def repeats_for(seconds: float) -> int:
    """The number of calls, each of so many seconds, that make a sample."""
    return min(math.ceil(SAMPLE / max(seconds, 1e-9)), MOST_REPEATS)


@contextlib.contextmanager
def _borrowed(device: torch.device) -> Iterator[None]:
    """Make the GPU current. Afterwards, free its memory, and leave it out of the run's peak."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        yield
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}"[:160] if lines else type(error).__name__
