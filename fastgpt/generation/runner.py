"""Runs forward passes over the chunks of many sequences: their tokens in, the logits that are asked for out.

On CUDA a forward pass with one token of each sequence is a CUDA graph. A graph is captured once for each of a few batch
sizes, and replayed on buffers that stay where they are; smaller batches are padded.
"""

import bisect
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from fastgpt.generation.compiled_decoder import CompiledDecoder
from fastgpt.generation.cuda_graphs import GraphPool
from fastgpt.generation.page_tables import PageTables
from fastgpt.generation.plan import Chunk, LastToken, Plan
from fastgpt.model.gpt import GPT
from fastgpt.model.kv_cache import PagedBatch, PagedCache, Sequences
from fastgpt.ops.table import Ops
from fastgpt.system.device import send
from fastgpt.system.out_of_memory import is_out_of_memory
from fastgpt.system.torch_private import compile_up_to, equal_sizes_apart

RECOMPILE_LIMIT = 256  # for all engines of a process; each compiles a few kinds of forward passes


class Runner:
    """Runs a model over the chunks that a `Scheduler` plans.

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
        """
        Args:
            decoder: for one token of one sequence (CPU only).
            graphs: capture forward passes that only decode (CUDA only). None are captured where FASTGPT_DEBUG=1 makes
                kernels check their inputs, because those checks wait for the GPU.
        """
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

        The next call overwrites the result, so the caller must have read it by then.
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
            decoding = 0  # so that there are only two kinds of forward passes to compile
        counts = None if plan.tokens == len(chunks) else np.array([len(chunk.tokens) for chunk in chunks])
        reading = len(chunks) - decoding
        B = decoding + (self._size(reading) if reading else 0)  # one more than there are sequences where `_size` pads
        longs, ints = np.empty((3, plan.tokens), np.int64), np.zeros((3, B + 1), np.int32)
        self._fill(longs, ints[:2], plan, counts)
        if reading:
            ends = np.arange(1, len(chunks) + 1) if counts is None else counts.cumsum()
            ints[2, 1 : reading + 1] = ends[decoding:] - decoding
            ints[2, reading + 1 :] = plan.tokens - decoding
        tokens, at, slots = send(torch.from_numpy(longs), self.device)
        rows, lengths, starts = send(torch.from_numpy(ints), self.device)
        parts: list[Sequences | None] = []
        for first, last, own in ((0, decoding, None), (decoding, B, starts[: B - decoding + 1])):
            if first == last:
                parts.append(None)
                continue
            M = self._size(self.cache.allocator.pages_for(int(ints[1, first:last].max())))
            table = self.tables.pages[:, :M].index_select(0, rows[first:last])
            parts.append(Sequences(table, lengths[first:last], own))
        batch = PagedBatch(self.cache.keys, self.cache.values, at, slots, *parts)
        logits = self.forward(tokens[None], batch, None if pure else self._asked(plan))
        return logits[: plan.rows]

    def _forward(self, tokens: torch.Tensor, batch: PagedBatch, rows: torch.Tensor | None) -> torch.Tensor:
        hidden = self.model.hidden(tokens, cache=batch)[0]  # (N, C)
        return self.model.logits(hidden if rows is None else hidden[rows])

    def _fill(self, longs: np.ndarray, ints: np.ndarray, plan: Plan, counts: np.ndarray | None) -> None:
        """Write the inputs of a forward pass, on the host.

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
        """`count`, but never 1 where the model is compiled: torch.compile makes a version of its own for 1."""
        return max(count, 2) if self.compile else count

    def _asked(self, plan: Plan) -> torch.Tensor | None:
        """The indices of the tokens whose logits are asked for, padded if the model is compiled; None for all."""
        if not self.compile and plan.rows == plan.tokens:
            return None
        rows, end = [], 0
        for chunk in plan.chunks:
            end += len(chunk.tokens)
            rows += range(end - chunk.rows, end)
        rows += [0] * (self._size(len(rows)) - len(rows))
        return send(torch.tensor(rows, dtype=torch.int64), self.device)

    def _graph(self, B: int) -> "DecodeGraph | None":
        """The graph of the smallest size that holds B sequences; None where there is none, or no memory for it."""
        at = bisect.bisect_left(self.graph_sizes, B)
        if at == len(self.graph_sizes):
            return None
        size = self.graph_sizes[at]
        if size not in self.graphs:
            try:
                self.graphs[size] = DecodeGraph(self, size)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                self.graph_sizes = sorted(self.graphs)
                warnings.warn(
                    f"no memory for CUDA graphs of {size} sequences or more: they decode without; lower `kv_memory`",
                    stacklevel=2,
                )
            if size not in self.graphs:
                torch.cuda.empty_cache()  # now that nothing refers to the failed capture
                return None
        return self.graphs[size]


def can_be_captured(ops: Ops) -> bool:
    """Whether a forward pass that only decodes never waits for the GPU, which a capture forbids."""
    if "reference" in ops.backends.values():  # readable math reads lengths on the host
        return False
    if "triton" in ops.backends.values():
        from fastgpt_kernels.launch import DEBUG

        if DEBUG:
            warnings.warn("FASTGPT_DEBUG=1: no CUDA graphs, as its checks wait for the GPU", stacklevel=2)
            return False
    return True


def _compiled(forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """torch.compile for any sizes: equal sizes are not compiled again, and a second engine does not make it give up."""
    function = torch.compile(forward, dynamic=True)

    def run(*args: Any) -> torch.Tensor:
        with equal_sizes_apart(), compile_up_to(RECOMPILE_LIMIT):
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
    """A forward pass over one token of each of up to `size` sequences, as a CUDA graph. One copy brings all inputs.

    Attributes:
        longs, ints: as `Runner._fill` takes them, on the host. Entries that it does not fill are padding: token 0 in
            slot -1, of a sequence of length 0.
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

        def decode() -> torch.Tensor:
            part = Sequences(tables.index_select(0, rows), lengths)
            return runner.forward(tokens[None], PagedBatch(keys, values, at, slots, part, None), None)

        self.graph, self.logits = runner.graph_pool.capture(decode)  # on padding only, so nothing is written

    def replay(self, B: int) -> torch.Tensor:
        """The logits (B, V) of the first B sequences. Once the host has read them, it may write the next inputs."""
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
