"""Engines that are checked before, in and after every forward pass."""

import hashlib
import struct
from collections.abc import Sequence

import torch

from fastgpt.config.generation import SamplingParams
from fastgpt.config.model import ModelConfig
from fastgpt.generation.engine import Engine
from fastgpt.generation.plan import Plan
from fastgpt.generation.request import Completion, Piece, Prompt
from fastgpt.generation.runner import Runner
from fastgpt.generation.scheduler import Scheduler
from fastgpt.model.kv_cache import PagedBatch, page_bytes

P, BLOCK = 4, 32
CONFIG = ModelConfig(vocab_size=11, block_size=BLOCK, n_layer=1, n_head=1, n_embd=2)


def check(scheduler: Scheduler) -> None:
    """What holds between any two iterations."""
    allocator, running = scheduler.allocator, scheduler.running
    page_size = allocator.page_size
    assert len(running) <= scheduler.max_batch
    slots = [sample.slot for sample in running]
    assert sorted([*slots, *scheduler.free_slots]) == list(range(scheduler.max_batch))
    for queue in (running, list(scheduler.waiting)):
        assert [s.order for s in queue] == sorted({s.order for s in queue}), "not in the order in which they came"
    assert all(sample.table is None and sample.slot == -1 for sample in scheduler.waiting)

    references, holders = [0] * allocator.pages, {}
    for sample in running:
        table, window = sample.table, sample.tokens[sample.start :]
        assert table is not None
        assert not table.closed
        assert table.length < len(window), "the last token is never cached before it is an input"
        assert table.length <= len(table.pages) * page_size
        assert len(table.digests) * page_size <= table.length
        for i, page in enumerate(table.pages):
            references[page] += 1
            written = tuple(window[: min(table.length, (i + 1) * page_size)])
            if len(written) > i * page_size:
                holders.setdefault(page, []).append((i, written))
        digest = b""
        for i, known in enumerate(table.digests):
            part = struct.pack(f"<{page_size}q", *sample.tokens[i * page_size : (i + 1) * page_size])
            digest = hashlib.sha256(digest + part).digest()
            assert known == digest, "a page stands under another prefix's name"
    assert allocator.references == references
    unused = {page for page, count in enumerate(references) if count == 0}
    assert allocator.free == len(unused)
    assert allocator.used == allocator.pages - len(unused) <= allocator.peak <= allocator.pages
    for shared in holders.values():
        ends = [written for _, written in shared]
        longest = max(ends, key=len)
        assert len({i for i, _ in shared}) == 1
        assert all(longest[: len(end)] == end for end in ends), "a page is shared by different prefixes"


def check_plan(scheduler: Scheduler, plan: Plan) -> None:
    """What holds for a forward pass that is about to run."""
    allocator, chunks = scheduler.allocator, plan.chunks
    assert [len(chunk.tokens) == 1 for chunk in chunks] == [at < plan.decoding for at in range(len(chunks))]
    assert plan.tokens == sum(len(chunk.tokens) for chunk in chunks)
    assert plan.read == sum(len(chunk.tokens) for chunk in chunks if chunk.reading)
    assert plan.rows == sum(chunk.rows for chunk in chunks)
    assert sum(len(chunk.tokens) for chunk in chunks) <= scheduler.max_batch_tokens
    assert all(sample.table for sample in plan.changed)
    assert len(scheduler.running) <= scheduler.max_batch
    assert len({chunk.sample.order for chunk in chunks}) == len(chunks)
    if scheduler.running:
        assert scheduler.running[0] in [chunk.sample for chunk in chunks], "the oldest goes on in every iteration"
    if batch := plan.batch:
        P = allocator.page_size
        at = [(chunk.first, chunk.sample.table.pages[chunk.first // P]) for chunk in chunks]
        assert [chunk.sample for chunk in chunks] == batch.samples == scheduler.running
        assert batch.longs.T.tolist() == [
            [*chunk.tokens, place, page * P + place % P] for chunk, (place, page) in zip(chunks, at, strict=True)
        ]
        assert batch.ints.T.tolist() == [[chunk.sample.slot, chunk.first + 1] for chunk in chunks]
        assert batch.generated == [chunk.sample.generated for chunk in chunks]
    for chunk in chunks:
        sample, end = chunk.sample, chunk.first + len(chunk.tokens)
        window, table = sample.tokens[sample.start :], sample.table
        assert table is not None
        assert table.length == end
        assert chunk.tokens
        assert chunk.tokens == [*window[chunk.first : end], *chunk.draft]
        assert chunk.rows == (1 + len(chunk.draft) if end >= len(window) else 0)
        # Full pages may be found by others already in the forward pass that writes them; all other pages are its own.
        mine = range(chunk.first // allocator.page_size, allocator.pages_for(end))
        for page in (table.pages[i] for i in mine if i >= len(table.digests)):
            assert allocator.references[page] == 1, "a page that is written is another's too"


def check_inputs(runner: Runner, plan: Plan, tokens: torch.Tensor, batch: PagedBatch) -> None:
    """What a forward pass reads is what the block tables say, written out anew; all else is padding."""
    P, N = runner.cache.allocator.page_size, plan.tokens
    wanted, at, slots = [], [], []
    for chunk in plan.chunks:
        wanted += chunk.tokens
        at += (places := range(chunk.first, chunk.first + len(chunk.tokens)))
        slots += [chunk.sample.table.pages[place // P] * P + place % P for place in places]
    padding = [-1] * (len(batch.slots) - N)
    assert (tokens[0, :N].tolist(), batch.at[:N].tolist()) == (wanted, at)
    assert batch.slots.tolist() == slots + padding
    chunks = list(plan.chunks)
    for part in (batch.decoding, batch.reading):
        if part is None:
            continue
        lengths = [length for length in part.lengths.tolist() if length]
        own, chunks = chunks[: len(lengths)], chunks[len(lengths) :]
        assert lengths == [chunk.first + len(chunk.tokens) for chunk in own]
        assert part.lengths.tolist()[: len(own)] == lengths, "empty sequences stand behind the others"
        for row, chunk, length in zip(part.block_table.tolist(), own, lengths, strict=False):
            count = runner.cache.allocator.pages_for(length)
            assert row[:count] == chunk.sample.table.pages[:count], "a stale block table"
        if part.starts is not None:
            starts = [sum(len(chunk.tokens) for chunk in own[:n]) for n in range(len(own) + 1)]
            assert part.starts.tolist() == starts + starts[-1:] * (len(part.lengths) - len(own))
    assert not chunks


def watched(engine: Engine, most_steps: int = 20_000) -> Engine:
    """The same engine, checked before, in and after every forward pass; one that never ends fails."""
    plan, step, forward, steps = engine.scheduler.plan, engine.step, engine.runner.forward, 0
    planned = Plan()

    def checked_plan() -> Plan:
        nonlocal planned
        planned = plan()
        check_plan(engine.scheduler, planned)
        return planned

    def checked_forward(tokens: torch.Tensor, batch: PagedBatch, rows: torch.Tensor | None) -> torch.Tensor:
        if (
            tokens.device.type == "cpu" and (batch.slots >= 0).any()
        ):  # a graph is captured on padding, and must not wait
            check_inputs(engine.runner, planned, tokens, batch)
        return forward(tokens, batch, rows)

    def checked_step() -> list[Piece]:
        nonlocal steps
        steps += 1
        assert steps <= most_steps, "no end"
        pieces = step()
        check(engine.scheduler)
        return pieces

    engine.scheduler.plan, engine.step, engine.runner.forward = checked_plan, checked_step, checked_forward
    return engine


def answer(
    engine: Engine, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams]
) -> list[Completion]:
    """The completions of a checked engine, which keeps nothing of them."""
    completions = engine.generate(prompts, params)
    assert not engine.busy
    assert (engine.scheduler.running, list(engine.scheduler.waiting), engine.scheduler.allocator.used) == ([], [], 0)
    assert engine.queued == 0
    return completions


def pages(generator, count: int, page_size: int = 16) -> int:
    """The bytes of so many pages of a generator's model."""
    return count * page_bytes(generator.model.config, page_size, torch.float32)
