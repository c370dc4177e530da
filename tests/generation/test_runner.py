"""The forward pass over chunks: block tables that stay on the device, and decoding as CUDA graphs, on stand-ins."""

import dataclasses
import random
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastgpt.config.generation import SamplingParams
from fastgpt.generation import cuda_graphs, paged_text, runner
from fastgpt.generation.cuda_graphs import GraphPool
from fastgpt.generation.engine import Engine
from fastgpt.generation.generator import TextGenerator
from fastgpt.generation.page_tables import PageTables
from fastgpt.generation.runner import graph_sizes
from fastgpt.model.gpt import GPT
from fastgpt.model.kv_cache import PagedCache
from fastgpt.model.pages import BlockTable
from fastgpt.ops.table import resolve
from tests.helpers.engines import answer, pages, watched
from tests.helpers.untrained import fresh

PROMPTS = ["abc", "a", "jihgfedcba", "bb", "cab"]
PARAMS = SamplingParams(temperature=0, max_new_tokens=12)
BLOCK = 32


class Replays:
    """Stands in for a `GraphPool`: a replay is the same step on the same buffers, run anew."""

    def __init__(self, fails_from: int = 100):
        self.captured: list[int] = []
        self.fails_from = fails_from

    def capture(self, run: Callable[[], torch.Tensor]) -> tuple[SimpleNamespace, torch.Tensor]:
        result = run()  # on padding
        if len(result) >= self.fails_from:
            raise torch.OutOfMemoryError("no memory")
        self.captured.append(len(result))
        return SimpleNamespace(replay=lambda: result.copy_(run())), result


def broken(*_: object, **__: object) -> None:
    raise MemoryError("broken")


def replaying(engine: Engine, pool: Replays) -> Engine:
    """The engine with what it has on CUDA."""
    engine.runner.graph_sizes, engine.runner.graph_pool = graph_sizes(engine.scheduler.max_batch), pool
    return engine


@pytest.fixture(scope="module")
def generator() -> TextGenerator:
    return fresh(block_size=BLOCK, n_head=4, n_kv_head=2)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_padded_decode_steps_give_the_same_tokens(generator: TextGenerator, backend: str):
    model = GPT(generator.model.config, resolve(backend)).eval()
    model.load_state_dict(generator.model.state_dict())
    generator = TextGenerator(model, generator.tokenizer)
    wanted = [one.tokens for one in generator.engine(kv_memory=10**6).generate(PROMPTS, PARAMS)]
    engine = replaying(watched(generator.engine(kv_memory=10**6, max_batch=5)), pool := Replays())
    uneven = [SamplingParams(temperature=0, max_new_tokens=count) for count in (12, 3, 12, 5, 7)]
    found = [one.tokens for one in engine.generate(PROMPTS, uneven)]
    assert found == [tokens[: one.max_new_tokens] for tokens, one in zip(wanted, uneven, strict=True)]
    assert sorted(pool.captured) == [2, 4, 8]  # 2, 3 and 4, 5 sequences


@pytest.mark.parametrize(("fails_from", "sizes"), [(1, []), (4, [1, 2])])
def test_without_memory_for_a_graph_decoding_goes_on(
    monkeypatch, generator: TextGenerator, fails_from: int, sizes: list[int]
):
    freed = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append(True))
    wanted = generator.engine(kv_memory=10**6).generate(PROMPTS, PARAMS)
    engine = replaying(watched(generator.engine(kv_memory=10**6)), Replays(fails_from))
    engine.generate(PROMPTS[:1], PARAMS) if sizes else None
    engine.generate(PROMPTS[:2], PARAMS) if sizes else None
    with pytest.warns(UserWarning, match="no memory for CUDA graphs of .* sequences or more.*lower `kv_memory`"):
        found = answer(engine, PROMPTS, PARAMS)
    assert [one.text for one in found] == [one.text for one in wanted]
    assert engine.runner.graph_sizes == sizes
    assert freed


@pytest.mark.parametrize(
    ("most", "sizes"),
    [(1, [1]), (2, [1, 2]), (3, [1, 2, 4]), (8, [1, 2, 4, 8]), (9, [1, 2, 4, 8, 16]), (33, [1, 2, 4, 8, 16, 32, 48])],
)
def test_sizes_of_graphs(most: int, sizes: list[int]):
    assert graph_sizes(most) == sizes


class Chip:
    """Stands in for what a capture asks of PyTorch: the current stream, and the allocator's books."""

    def __init__(self, monkeypatch, *, capture_end_fails: bool = False, keeps_recording: bool = True):
        self.current, self.streams, self.recording, self.released = "default", [], [], []
        self.capture_end_fails, self.keeps_recording = capture_end_fails, keeps_recording
        made = {
            "device": lambda device: _Within(self, self.current),
            "Stream": self._stream,
            "stream": lambda stream: _Within(self, stream),
            "current_stream": lambda: SimpleNamespace(wait_stream=lambda other: None),
            "current_device": lambda: 0,
            "graph_pool_handle": lambda: (0, 1),
            "synchronize": lambda: None,
            "empty_cache": self._empty_cache,
            "CUDAGraph": lambda: _Graph(self),
        }
        for name, stand_in in made.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self._end, raising=False)
        monkeypatch.setattr(
            torch._C, "_cuda_releasePool", lambda device, pool: self.released.append(pool), raising=False
        )

    def _stream(self) -> SimpleNamespace:
        self.streams.append(stream := SimpleNamespace(wait_stream=lambda other: None))
        return stream

    def _end(self, device: int, pool: tuple[int, int]) -> None:
        if pool not in self.recording:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.recording.remove(pool)

    def _empty_cache(self) -> None:
        assert not self.recording, "captures_underway.empty() INTERNAL ASSERT FAILED"


class _Within:
    """The context of a stream, as `torch.cuda.stream`."""

    def __init__(self, chip: Chip, stream: object):
        self.chip, self.stream = chip, stream

    def __enter__(self) -> None:
        self.before, self.chip.current = self.chip.current, self.stream

    def __exit__(self, *_: object) -> None:
        self.chip.current = self.before


class _Graph:
    """A CUDA graph whose capture may end in an error of its own."""

    def __init__(self, chip: Chip):
        self.chip, self.captured_on, self.was_reset = chip, None, False

    def capture_begin(self, pool: tuple[int, int], capture_error_mode: str) -> None:
        self.pool, self.captured_on = pool, self.chip.current
        self.chip.recording.append(pool)

    def capture_end(self) -> None:
        if not (self.chip.capture_end_fails and self.chip.keeps_recording):
            self.chip.recording.remove(self.pool)
        if self.chip.capture_end_fails:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    def reset(self) -> None:
        self.was_reset = True


def test_graphs_of_a_pool_share_a_stream(monkeypatch):
    chip = Chip(monkeypatch)
    pool = GraphPool(torch.device("cuda"))
    graphs = [pool.capture(lambda: torch.zeros(1))[0] for _ in range(3)]
    assert len(chip.streams) == 1
    assert [graph.captured_on for graph in graphs] == chip.streams * 3
    assert chip.current == "default"


@pytest.mark.parametrize("keeps_recording", [True, False], ids=["torch 2.13", "later"])
@pytest.mark.parametrize("capture_end_fails", [True, False])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), KeyboardInterrupt()], ids=["memory", "Ctrl-C"])
def test_an_error_inside_a_capture_is_what_is_raised(
    monkeypatch, error: BaseException, capture_end_fails: bool, keeps_recording: bool
):
    chip = Chip(monkeypatch, capture_end_fails=capture_end_fails, keeps_recording=keeps_recording)
    pool, runs = GraphPool(torch.device("cuda")), 0

    def run() -> torch.Tensor:
        nonlocal runs
        runs += 1
        if runs > cuda_graphs.WARM_UP:
            raise error
        return torch.zeros(1)

    with pytest.raises(type(error)) as raised:
        pool.capture(run)
    assert raised.value is error
    assert chip.current == "default"
    torch.cuda.empty_cache()  # the allocator records nothing any more
    assert chip.released == ([(0, 1)] if capture_end_fails and keeps_recording else [])


def test_with_kernels_that_check_their_inputs_there_are_no_graphs(monkeypatch):
    launch = pytest.importorskip("fastgpt_kernels.launch")
    ops = resolve("torch")
    triton = dataclasses.replace(ops, backends=dict.fromkeys(ops.backends, "triton"))
    assert runner.can_be_captured(ops)
    assert runner.can_be_captured(triton)
    assert not runner.can_be_captured(resolve("reference"))
    monkeypatch.setattr(launch, "DEBUG", True)
    assert runner.can_be_captured(ops)  # PyTorch's own do not check
    with pytest.warns(UserWarning, match="FASTGPT_DEBUG=1: no CUDA graphs"):
        assert not runner.can_be_captured(triton)


def test_only_changed_entries_are_sent(monkeypatch):
    sent = []
    monkeypatch.setattr(
        "fastgpt.generation.page_tables.send", lambda tensor, device: sent.append(tensor.tolist()) or tensor
    )
    tables = PageTables(3, 4, torch.device("cpu"))
    first, second = (SimpleNamespace(slot=slot, table=BlockTable([5, slot])) for slot in (0, 2))
    tables.update([first, second])
    assert sent.pop() == [[0, 1, 8, 9], [5, 0, 5, 2]]
    tables.update([first, second])
    assert not sent
    first.table.pages.append(7)
    tables.update([first])
    assert sent.pop() == [[2], [7]]
    second.table = BlockTable([5, 2, 1])  # another sequence, which begins alike
    tables.update([second])
    assert sent.pop() == [[8, 9, 10], [5, 2, 1]]
    assert tables.pages.tolist() == [[5, 0, 7, 0], [0, 0, 0, 0], [5, 2, 1, 0]]
    assert np.array_equal(tables.host, tables.pages.numpy())


def test_what_could_not_be_sent_is_sent_later(monkeypatch):
    tables, table = PageTables(1, 2, torch.device("cpu")), BlockTable([3, 4])
    with monkeypatch.context() as patched:
        patched.setattr(
            "fastgpt.generation.page_tables.send", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no memory"))
        )
        with pytest.raises(torch.OutOfMemoryError):
            tables.update([SimpleNamespace(slot=0, table=table)])
    tables.update([SimpleNamespace(slot=0, table=table)])
    assert tables.pages.tolist() == [[3, 4]]


@pytest.mark.parametrize("seed", range(5))
def test_whatever_happens_every_step_reads_the_tables_as_they_are(monkeypatch, generator: TextGenerator, seed: int):
    """Samples, shared prefixes, few pages, windows that slide, guesses, cancelling, and steps that fail at any place.

    `watched` compares the inputs of each forward pass with those written out anew.
    """
    rng = random.Random(seed)
    engine = generator.engine(
        kv_memory=pages(generator, rng.randint(10, 24), 4),
        page_size=4,
        max_batch=rng.randint(1, 6),
        max_batch_tokens=rng.choice([4, 9, 100]),
        prefix_cache=rng.random() < 0.7,
        speculate=rng.choice(["none", "ngram"]),
        slide=rng.random() < 0.5,
    )
    replaying(watched(engine), Replays(rng.choice([2, 100]))) if seed % 2 else watched(engine)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    places = [engine.runner.tables, engine.scheduler.allocator, engine.sampler, engine.runner]
    names = ["update", "reserve", "begin", "forward"]
    stems = ["".join(rng.choices("abcdefghij", k=12)) for _ in range(3)]
    failed = done = 0
    with pytest.MonkeyPatch.context() as patched:
        for step in range(80):
            if step < 60 and len(engine.scheduler.waiting) < 4:
                prompt = rng.choice(stems)[: rng.randint(1, 12)] + "".join(rng.choices("abc", k=rng.randint(0, 6)))
                count = rng.choice([1, 1, 3])
                engine.submit(prompt, dataclasses.replace(PARAMS, max_new_tokens=rng.randint(1, 24), num_samples=count))
            if rng.random() < 0.05 and engine.scheduler.running:
                engine.cancel(rng.choice(engine.scheduler.running).order[0])
            if rng.random() < 0.05:
                at = rng.randrange(4)
                with patched.context() as within:
                    within.setattr(places[at], names[at], broken)
                    try:
                        engine.step()
                    except MemoryError:
                        failed += 1
            done += sum(piece.completion is not None for piece in engine.step())
    assert failed
    assert done > 5


@pytest.mark.parametrize("length", [1, 3, 40])
def test_a_stream_over_pages_gives_the_same_tokens(monkeypatch, generator: TextGenerator, length: int):
    """Also past the context, where the window slides, and on pages that another stream has left."""
    prompt, made = ("jihgfedcba" * 4)[:length], []
    monkeypatch.setattr("fastgpt.generation.generator.single_cache", lambda device: "paged")
    monkeypatch.setattr(
        paged_text, "PagedCache", lambda *args, **more: made.append(PagedCache(*args, **more)) or made[-1]
    )
    for settings in (
        {"temperature": 0},
        {"seed": 5, "logprobs": 2},
        {"stop": ("ab", "c")},
        {"repetition_penalty": 1.3},
    ):
        wanted = generator.stream(prompt, cache="dense", max_new_tokens=40, **settings)
        found = generator.stream(prompt, max_new_tokens=40, **settings)
        assert list(found) == list(wanted)
        assert [one.token for one in found.drawn] == [one.token for one in wanted.drawn]
        assert (found.finish_reason, found.prefill_tokens, found.decode_tokens) == (
            wanted.finish_reason,
            wanted.prefill_tokens,
            wanted.decode_tokens,
        )
        logprobs = [[one.logprob or 0.0 for one in stream.drawn] for stream in (found, wanted)]
        assert logprobs[0] == pytest.approx(logprobs[1], abs=1e-3)
    assert len(made) <= 1  # the generator keeps them for its next stream


def test_streams_in_turns_have_pages_of_their_own(generator: TextGenerator):
    streams = [generator.stream(prompt, cache="paged", temperature=0, max_new_tokens=12) for prompt in PROMPTS[:3]]
    texts = ["", "", ""]
    readers = [iter(stream) for stream in streams]
    for _ in range(13):
        for at, reader in enumerate(readers):
            texts[at] += next(reader, "")
    assert texts == [generator.generate(prompt, temperature=0, max_new_tokens=12) for prompt in PROMPTS[:3]]
