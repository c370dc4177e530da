"""One forward pass over the chunks of many sequences: their tokens in, the logits that are asked for out.

On CUDA a step in which every sequence brings one token is a CUDA graph, captured once for each of a few batch sizes
and replayed on buffers that stay where they are; smaller batches are padded.
"""

import bisect
import itertools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch._dynamo.config as dynamo
import torch.fx.experimental._config as shapes

from fastgpt.decode_step import DecodeStep
from fastgpt.kv_cache import PagedCache, PagedStep, Part
from fastgpt.model import GPT
from fastgpt.scheduler import Chunk

RECOMPILE_LIMIT = 256  # of all engines of a process; each compiles a few kinds of steps
WARM_UP = 3  # runs before a capture: they compile kernels and let libraries allocate


class Runner:
    """Runs a model over the chunks that a `Scheduler` plans.

    `step`: for one token of one sequence (CPU only). `graphs`: capture decode steps (CUDA only).
    """

    def __init__(
        self,
        model: GPT,
        cache: PagedCache,
        *,
        max_batch: int,
        compile: bool = False,
        step: DecodeStep | None = None,
        graphs: bool = True,
    ):
        self.model, self.cache = model, cache
        self.device = model.device
        self.most_pages = cache.allocator.pages_for(model.config.block_size)
        self.compile = compile
        self.forward = _compiled(self._forward) if compile else self._forward
        self.single = _SingleStep(step, cache) if step else None
        # Readable math reads lengths on the host, which a graph cannot.
        graphs = graphs and self.device.type == "cuda" and "reference" not in model.ops.columns.values()
        self.graph_sizes = graph_sizes(max_batch) if graphs else []
        self.graph_memory = torch.cuda.graph_pool_handle() if graphs else None
        self._graphs: dict[int, DecodeGraph] = {}

    @torch.inference_mode()
    def __call__(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        """The logits (R, V) after the last `rows` tokens of each chunk, in the chunks' order.

        The result is overwritten by the next call. Chunks of one token come first, and longer ones after them.
        """
        decoding = sum(len(chunk.tokens) == 1 for chunk in chunks)
        pure = decoding == len(chunks) and all(chunk.rows for chunk in chunks)
        if self.graph_sizes and pure:
            return self._replay(chunks)
        if self.single and pure and len(chunks) == 1 and chunks[0].first > 0:
            return self.single(chunks[0])
        if self.compile and not pure:
            decoding = 0  # so that there are only two kinds of steps to compile
        tokens, at, slots = self._longs(chunks, sum(len(chunk.tokens) for chunk in chunks)).unbind()
        one = self._part(chunks[:decoding]) if decoding else None
        many = self._part(chunks[decoding:], ragged=True) if decoding < len(chunks) else None
        step = PagedStep(self.cache.keys, self.cache.values, at, slots, one, many)
        logits = self.forward(tokens[None], step, None if pure else self._rows(chunks))
        return logits[: sum(chunk.rows for chunk in chunks)]

    def _forward(self, tokens: torch.Tensor, step: PagedStep, rows: torch.Tensor | None) -> torch.Tensor:
        hidden = self.model.hidden(tokens, cache=step)[0]  # (N, C)
        return self.model.logits(hidden if rows is None else hidden[rows])

    def _longs(self, chunks: Sequence[Chunk], N: int) -> torch.Tensor:
        """Tokens, positions and slots as int64 (3, N); what no chunk fills is padding: token 0 in slot -1."""
        P = self.cache.allocator.page_size
        tokens, at, slots = [], [], []
        for chunk in chunks:
            assert chunk.sample.table is not None
            pages, places = chunk.sample.table.pages, range(chunk.first, chunk.first + len(chunk.tokens))
            tokens += chunk.tokens
            at += places
            slots += [pages[place // P] * P + place % P for place in places]
        padding = N - len(tokens)
        return self.to_device([tokens + [0] * padding, at + [0] * padding, slots + [-1] * padding], torch.int64)

    def _part(self, chunks: Sequence[Chunk], *, ragged: bool = False) -> Part:
        B = self._size(len(chunks)) if ragged else len(chunks)
        M = max(self.cache.allocator.pages_for(chunk.first + len(chunk.tokens)) for chunk in chunks)
        values, starts = self._tables(chunks, B, self._size(M)), None
        if ragged:
            ends = list(itertools.accumulate((len(chunk.tokens) for chunk in chunks), initial=0))
            starts = self.to_device(ends + ends[-1:] * (B - len(chunks)), torch.int32)
        return Part(values[:, 1:], values[:, 0], starts)

    def _size(self, count: int) -> int:
        """`count`, but never 1 where the model is compiled: that would be compiled apart."""
        return max(count, 2) if self.compile else count

    def _tables(self, chunks: Sequence[Chunk], B: int, M: int) -> torch.Tensor:
        """Length and pages of each sequence as int32 (B, 1 + M); the rest is empty slots of length 0."""
        rows = []
        for chunk in chunks:
            assert chunk.sample.table is not None
            pages = chunk.sample.table.pages[:M]
            rows.append([chunk.first + len(chunk.tokens), *pages, *[0] * (M - len(pages))])
        rows += [[0] * (1 + M)] * (B - len(rows))
        return self.to_device(rows, torch.int32)

    def _rows(self, chunks: Sequence[Chunk]) -> torch.Tensor | None:
        """Which tokens' logits are asked for, and perhaps some behind them that are not; None for all."""
        if not self.compile and all(chunk.rows == len(chunk.tokens) for chunk in chunks):
            return None
        rows, end = [], 0
        for chunk in chunks:
            end += len(chunk.tokens)
            rows += range(end - chunk.rows, end)
        return self.to_device(rows + [0] * (self._size(len(rows)) - len(rows)), torch.int64)

    def to_device(self, values: list, dtype: torch.dtype) -> torch.Tensor:
        """A tensor of these numbers where the model is, without waiting for it."""
        if self.device.type != "cuda":
            return torch.tensor(values, dtype=dtype, device=self.device)
        # From pinned memory, so that the copy is not waited for.
        return torch.tensor(values, dtype=dtype, pin_memory=True).to(self.device, non_blocking=True)

    def _replay(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        B = len(chunks)
        size = self.graph_sizes[bisect.bisect_left(self.graph_sizes, B)]
        longs = self._longs(chunks, size)
        tables = self._tables(chunks, size, self.most_pages)
        if size not in self._graphs:
            try:
                self._graphs[size] = DecodeGraph(self, size)
            except torch.OutOfMemoryError:
                warnings.warn("no memory for CUDA graphs: decoding goes on without; lower --kv_memory", stacklevel=2)
                self.graph_sizes = []
                return self(chunks)
        return self._graphs[size].replay(longs, tables)[:B]


def _compiled(forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """torch.compile for any sizes: equal ones are no reason to compile again, nor is a second engine to give up."""
    function = torch.compile(forward, dynamic=True)

    def run(*args: Any) -> torch.Tensor:
        duck = shapes.patch(use_duck_shape=False)  # pyright: ignore[reportAttributeAccessIssue]
        with duck, dynamo.patch(recompile_limit=RECOMPILE_LIMIT):
            return function(*args)

    return run


class _SingleStep:
    """A `DecodeStep` over the pages."""

    def __init__(self, step: DecodeStep, cache: PagedCache):
        self.step = step
        self.keys, self.values = ([t.flatten(0, 1) for t in pool] for pool in (cache.keys, cache.values))
        self.within = torch.arange(cache.allocator.page_size)

    def __call__(self, chunk: Chunk) -> torch.Tensor:
        assert chunk.sample.table is not None
        pages = torch.tensor(chunk.sample.table.pages)
        slots = (pages[:, None] * len(self.within) + self.within).flatten()[: chunk.first + 1]
        return self.step(torch.tensor(chunk.tokens), slots, self.keys, self.values)


class DecodeGraph:
    """A decode step of a fixed number of sequences as a CUDA graph, with its inputs and its logits."""

    def __init__(self, runner: Runner, size: int):
        cache, device = runner.cache, runner.device
        self.longs = torch.zeros((3, size), dtype=torch.int64, device=device)
        self.longs[2] = -1
        self.tables = torch.zeros((size, 1 + runner.most_pages), dtype=torch.int32, device=device)
        tokens, at, slots = self.longs
        part = Part(self.tables[:, 1:], self.tables[:, 0])
        step = PagedStep(cache.keys, cache.values, at, slots, part, None)
        self.device, self.graph = device, torch.cuda.CUDAGraph()
        with torch.cuda.device(device):
            side = torch.cuda.Stream(device)
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side):  # on padding alone: nothing is written
                for _ in range(WARM_UP):
                    runner.forward(tokens[None], step, None)
            torch.cuda.current_stream(device).wait_stream(side)
            # All graphs share their memory, as only one runs at a time and its logits are read before the next.
            with torch.cuda.graph(self.graph, pool=runner.graph_memory, stream=side):
                self.logits = runner.forward(tokens[None], step, None)

    def replay(self, longs: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
        self.longs.copy_(longs)
        self.tables.copy_(tables)
        with torch.cuda.device(self.device):
            self.graph.replay()
        return self.logits


def graph_sizes(max_batch: int) -> list[int]:
    """Batch sizes to capture: 1, 2, 4, 8, then multiples of 16, up to the first that holds `max_batch`."""
    sizes = [1, 2, 4, 8, *range(16, max_batch + 16, 16)]
    return sizes[: bisect.bisect_left(sizes, max_batch) + 1]
