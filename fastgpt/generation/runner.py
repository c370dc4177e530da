"""One forward pass over the chunks of many sequences: their tokens in, the logits that are asked for out.

On CUDA a step in which every sequence brings one token is a CUDA graph, captured once for each of a few batch sizes
and replayed on buffers that stay where they are; smaller batches are padded.
"""

import bisect
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.fx.experimental._config as shapes

from fastgpt.generation.compiled_decoder import CompiledDecoder
from fastgpt.generation.cuda_graphs import GraphPool
from fastgpt.generation.page_tables import PageTables
from fastgpt.generation.scheduler import Chunk, LastToken, Plan
from fastgpt.model.gpt import GPT
from fastgpt.model.kv_cache import PagedBatch, PagedCache, Part
from fastgpt.ops.table import Ops
from fastgpt.system import out_of_memory
from fastgpt.system.device import send

RECOMPILE_LIMIT = 256  # of all engines of a process; each compiles a few kinds of steps


class Runner:
    """Runs a model over the chunks that a `Scheduler` plans.

    `decoder`: for one token of one sequence (CPU only). `graphs`: capture decode steps (CUDA only; without them where
    FASTGPT_DEBUG=1 has kernels check their inputs, for which they wait).

    Attributes:
        tables: the pages of the running sequences, on the device.
        graph_sizes: batch sizes that are captured, or will be.
        graphs: those that are captured, by their sizes.
    """

    def __init__(
        self,
        model: GPT,
        cache: PagedCache,
        *,
        max_batch: int,
        compile: bool = False,
        decoder: CompiledDecoder | None = None,
        graphs: bool = True,
    ):
        self.model, self.cache = model, cache
        self.device = model.device
        self.compile = compile
        self.forward = _compiled(self._forward) if compile else self._forward
        self.single = _SingleDecoder(decoder, cache) if decoder else None
        most_pages = cache.allocator.pages_for(model.config.block_size)
        self.tables = PageTables(max_batch, self._size(most_pages), self.device)
        graphs = graphs and self.device.type == "cuda" and can_be_captured(model.ops)
        self.graph_sizes = graph_sizes(max_batch) if graphs else []
        self.graph_pool = GraphPool(self.device) if graphs else None
        self.graphs: dict[int, DecodeGraph] = {}

    @torch.inference_mode()
    def __call__(self, plan: Plan) -> torch.Tensor:
        """The logits (R, V) after the last `rows` tokens of each chunk, in the chunks' order.

        The result is overwritten by the next call, before which the caller waits for it.
        """
        self.tables.update(plan.changed)
        chunks, decoding = plan.chunks, plan.decoding
        pure = decoding == len(chunks) == plan.rows
        if pure and (graph := self._graph(decoding)):
            self._fill(graph.longs, graph.ints, plan, None)
            return graph.replay(decoding)
        if self.single and pure and decoding == 1 and chunks[0].first > 0:
            return self.single(chunks[0], self.tables)
        if self.compile and not pure:
            decoding = 0  # so that there are only two kinds of steps to compile
        counts = None if plan.tokens == len(chunks) else np.array([len(chunk.tokens) for chunk in chunks])
        reading = len(chunks) - decoding
        B = decoding + (self._size(reading) if reading else 0)  # perhaps with an empty sequence behind
        longs, ints = np.empty((3, plan.tokens), np.int64), np.zeros((3, B + 1), np.int32)
        self._fill(longs, ints[:2], plan, counts)
        if reading:
            ends = np.arange(1, len(chunks) + 1) if counts is None else counts.cumsum()
            ints[2, 1 : reading + 1] = ends[decoding:] - decoding
            ints[2, reading + 1 :] = plan.tokens - decoding
        tokens, at, slots = send(torch.from_numpy(longs), self.device)
        rows, lengths, starts = send(torch.from_numpy(ints), self.device)
        parts: list[Part | None] = []
        for first, last, own in ((0, decoding, None), (decoding, B, starts[: B - decoding + 1])):
            if first == last:
                parts.append(None)
                continue
            M = self._size(self.cache.allocator.pages_for(int(ints[1, first:last].max())))
            table = self.tables.pages[:, :M].index_select(0, rows[first:last])
            parts.append(Part(table, lengths[first:last], own))
        batch = PagedBatch(self.cache.keys, self.cache.values, at, slots, *parts)
        logits = self.forward(tokens[None], batch, None if pure else self._asked(plan))
        return logits[: plan.rows]

    def _forward(self, tokens: torch.Tensor, batch: PagedBatch, rows: torch.Tensor | None) -> torch.Tensor:
        hidden = self.model.hidden(tokens, cache=batch)[0]  # (N, C)
        return self.model.logits(hidden if rows is None else hidden[rows])

    def _fill(self, longs: np.ndarray, ints: np.ndarray, plan: Plan, counts: np.ndarray | None) -> None:
        """Write what a step reads, on the host.

        Args:
            longs: (3, N): the plan's tokens, their positions and their slots in the pages.
            ints: (2, B): the chunks' rows of the tables, and their lengths.
            counts: tokens of each chunk; None where each has one.
        """
        n, P = len(plan.chunks), self.cache.allocator.page_size
        if plan.batch:
            longs[:, :n], ints[:, :n] = plan.batch.longs, plan.batch.ints
            return
        tokens = [token for chunk in plan.chunks for token in chunk.tokens]
        at, rows = np.array([(chunk.first, chunk.sample.slot) for chunk in plan.chunks]).T
        ints[0, :n], ints[1, :n] = rows, at + (1 if counts is None else counts)
        if counts is not None:
            at, rows = np.arange(len(tokens)) + np.repeat(at - counts.cumsum() + counts, counts), rows.repeat(counts)
        longs = longs[:, : len(tokens)]
        longs[0], longs[1] = tokens, at
        longs[2] = self.tables.host[rows, at // P]
        longs[2] *= P
        longs[2] += at % P

    def _size(self, count: int) -> int:
        """`count`, but never 1 where the model is compiled: that would be compiled apart."""
        return max(count, 2) if self.compile else count

    def _asked(self, plan: Plan) -> torch.Tensor | None:
        """Which tokens' logits are asked for, and perhaps some behind them that are not; None for all."""
        if not self.compile and plan.rows == plan.tokens:
            return None
        rows, end = [], 0
        for chunk in plan.chunks:
            end += len(chunk.tokens)
            rows += range(end - chunk.rows, end)
        rows += [0] * (self._size(len(rows)) - len(rows))
        return send(torch.tensor(rows, dtype=torch.int64), self.device)

    def _graph(self, B: int) -> "DecodeGraph | None":
        """The graph of the least size that holds B sequences; None where there is none, or no memory for it."""
        at = bisect.bisect_left(self.graph_sizes, B)
        if at == len(self.graph_sizes):
            return None
        size = self.graph_sizes[at]
        if size not in self.graphs:
            with out_of_memory.caught() as shortage:
                self.graphs[size] = DecodeGraph(self, size)
            if shortage.reason is not None:
                torch.cuda.empty_cache()  # now that nothing of the failed capture is referred to
                self.graph_sizes = sorted(self.graphs)
                warnings.warn(
                    f"no memory for CUDA graphs of {size} sequences or more: they decode without; lower --kv_memory",
                    stacklevel=2,
                )
                return None
        return self.graphs[size]


def can_be_captured(ops: Ops) -> bool:
    """Whether nothing in a decode step waits for the GPU, which a capture forbids."""
    if "reference" in ops.backends.values():  # readable math reads lengths on the host
        return False
    if "triton" in ops.backends.values():
        from fastgpt_kernels.launch import DEBUG

        if DEBUG:
            warnings.warn("FASTGPT_DEBUG=1: no CUDA graphs, as its checks wait for the GPU", stacklevel=2)
            return False
    return True


def _compiled(forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """torch.compile for any sizes: equal ones are no reason to compile again, nor is a second engine to give up."""
    from torch._dynamo import config as dynamo  # takes seconds, and imports triton

    function = torch.compile(forward, dynamic=True)

    def run(*args: Any) -> torch.Tensor:
        duck = shapes.patch(use_duck_shape=False)  # pyright: ignore[reportAttributeAccessIssue]
        with duck, dynamo.patch(recompile_limit=RECOMPILE_LIMIT):
            return function(*args)

    return run


class _SingleDecoder:
    """A `CompiledDecoder` over the pages."""

    def __init__(self, decoder: CompiledDecoder, cache: PagedCache):
        self.decoder = decoder
        self.keys, self.values = ([t.flatten(0, 1) for t in pool] for pool in (cache.keys, cache.values))
        self.within = torch.arange(cache.allocator.page_size)

    def __call__(self, chunk: Chunk | LastToken, tables: PageTables) -> torch.Tensor:
        pages = tables.pages[chunk.sample.slot, : chunk.first // len(self.within) + 1].long()
        slots = (pages[:, None] * len(self.within) + self.within).flatten()[: chunk.first + 1]
        return self.decoder(torch.tensor(chunk.tokens), slots, self.keys, self.values)


class DecodeGraph:
    """A decode step of up to `size` sequences as a CUDA graph. Its inputs come in one copy.

    Attributes:
        longs, ints: as `Runner._fill` takes them, on the host. What a step does not fill is padding: token 0 in slot
            -1, of a sequence of length 0.
    """

    def __init__(self, runner: Runner, size: int):
        assert runner.graph_pool is not None
        self.host = torch.zeros(4, size, dtype=torch.int64, pin_memory=runner.device.type == "cuda")
        self.host[2] = -1
        self.longs, self.ints = self.host[:3].numpy(), self.host[3].view(torch.int32).view(2, size).numpy()
        self.filled = 0
        self.inputs = torch.empty_like(self.host, device=runner.device).copy_(self.host)
        tokens, at, slots = self.inputs[:3]
        rows, lengths = self.inputs[3].view(torch.int32).view(2, size)
        keys, values, tables = runner.cache.keys, runner.cache.values, runner.tables.pages

        def step() -> torch.Tensor:
            part = Part(tables.index_select(0, rows), lengths)
            return runner.forward(tokens[None], PagedBatch(keys, values, at, slots, part, None), None)

        self.graph, self.logits = runner.graph_pool.capture(step)  # on padding alone: nothing is written

    def replay(self, B: int) -> torch.Tensor:
        """The logits (B, V) of the first B sequences. The host may write the next inputs once they are there."""
        if self.filled > B:
            self.longs[:2, B:], self.longs[2, B:], self.ints[:, B:] = 0, -1, 0
        self.filled = B
        self.launch()
        return self.logits[:B]

    def launch(self) -> None:
        self.inputs.copy_(self.host, non_blocking=True)
        self.graph.replay()


def graph_sizes(max_batch: int) -> list[int]:
    """Batch sizes to capture: 1, 2, 4, 8, then multiples of 16, up to the first that holds `max_batch`."""
    sizes = [1, 2, 4, 8, *range(16, max_batch + 16, 16)]
    return sizes[: bisect.bisect_left(sizes, max_batch) + 1]
