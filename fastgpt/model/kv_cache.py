"""Keys and values of the tokens so far, so that a new token is computed without the whole context.

`DenseCache` holds a few sequences of one length, `PagedCache` many of any lengths. The model calls either through the
protocol `fastgpt.model.gpt.Cache`: it asks for its tokens' positions, and to attend to all tokens so far.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fastgpt.config.model import ModelConfig
from fastgpt.errors import UsageError
from fastgpt.model.pages import BlockAllocator, BlockTable
from fastgpt.system.device import free_memory
from fastgpt.system.out_of_memory import DoesNotFit
from fastgpt.system.units import counted

if TYPE_CHECKING:
    from fastgpt.ops.table import Ops


MEMORY_SHARE = {"cuda": 0.8}  # of the free memory, for pages
MEMORY_SHARE_ELSEWHERE = 0.25
MOST_PAGES = 1 << 18  # more would make the start slow; only a small model in a large memory could have more


class DenseCache:
    """Two contiguous buffers a layer, keys and values of B sequences of equal length: (B, S, Hkv, D).

    Raises:
        DoesNotFit: the buffers are larger than the free memory.
    """

    def __init__(
        self,
        config: ModelConfig,
        B: int = 1,
        *,
        capacity: int | None = None,
        device: torch.device | str = "cpu",
        dtype=torch.float32,
    ):
        """`capacity`: S, the tokens that fit; default block_size."""
        self.config, self.capacity = config, capacity or config.block_size
        need, free = B * page_bytes(config, self.capacity, dtype), free_memory(torch.device(device))
        if need > free:
            raise DoesNotFit(
                f"`cache` dense takes {counted(need, 'byte')} for a context of {counted(self.capacity, 'token')}, "
                f"and {free:,} are free; use `cache` paged, which takes what there is"
            )
        shape = (config.n_layer, B, self.capacity, config.kv_heads, config.head_dim)
        self.keys = torch.empty(shape, device=device, dtype=dtype).unbind()
        self.values = torch.empty(shape, device=device, dtype=dtype).unbind()
        self.length = 0

    def fork(self, rows: torch.Tensor, room: int) -> "DenseCache":
        """A new cache that begins with the tokens of these sequences, int64 (B,), and has room for more.

        Raises:
            DoesNotFit: it is larger than the free memory.
        """
        keys, length = self.keys[0], self.length
        forked = DenseCache(self.config, len(rows), capacity=length + room, device=keys.device, dtype=keys.dtype)
        for ours, theirs in zip((*self.keys, *self.values), (*forked.keys, *forked.values), strict=True):
            theirs[:, :length] = ours[rows, :length]
        forked.length = length
        return forked

    def positions(self, T: int) -> slice:
        """The positions of the next T tokens. Raises ValueError for more tokens than slots."""
        end = self.length + T
        if end > self.capacity:
            raise ValueError(f"{end} tokens do not fit in a cache of {self.capacity}")
        return slice(self.length, end)

    def attend(self, ops: "Ops", layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Append k and v (B, T, Hkv, D) and attend to all tokens so far: q (B, T, H, D) -> the same shape."""
        return ops.causal_attention(q, *self.append(layer, k, v))

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the keys and values (B, T, Hkv, D) of the next T tokens; return views of all of them so far.

        Raises:
            ValueError: more tokens than slots.
        """
        here = self.positions(k.shape[1])
        keys, values = self.keys[layer], self.values[layer]
        keys[:, here].copy_(k)
        values[:, here].copy_(v)
        return keys[:, : here.stop], values[:, : here.stop]

    def advance(self, tokens: int) -> None:
        """Move on by the tokens that every layer has appended."""
        self.length += tokens

    def clear(self) -> None:
        """Begin anew in the same memory."""
        self.length = 0


class PagedCache:
    """Two pools of pages a layer, keys and values, that sequences of any lengths share: (pages, P, Hkv, D).

    A sequence's pages need not be neighbours, so nothing is moved when it grows, forks or ends. `allocator` knows which
    sequences use a page.
    """

    def __init__(
        self,
        config: ModelConfig,
        pages: int,
        page_size: int = 16,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        prefix_cache: bool = True,
    ):
        row = -(-config.block_size // page_size)
        self.allocator = BlockAllocator(pages, page_size, row=row, prefix_cache=prefix_cache)
        shape = (pages, page_size, config.kv_heads, config.head_dim)
        # On a CPU, memory is taken only as it is written. Each pool has its own storage, because torch.compile copies a
        # tensor that it writes to if the tensor shares its storage.
        pools = [torch.empty(shape, device=device, dtype=dtype) for _ in range(2 * config.n_layer)]
        self.keys, self.values = tuple(pools[::2]), tuple(pools[1::2])

    def reserve(self, table: BlockTable, length: int) -> None:
        """`BlockAllocator.reserve`, which also makes the copies that it asks for."""
        for source, page in self.allocator.reserve(table, length):
            for pool in (*self.keys, *self.values):
                pool[page] = pool[source]


def page_bytes(config: ModelConfig, page_size: int, dtype: torch.dtype) -> int:
    """Bytes of one page: keys and values of all layers."""
    return 2 * config.n_layer * page_size * config.kv_heads * config.head_dim * dtype.itemsize


def pages_that_fit(
    config: ModelConfig, page_size: int, dtype: torch.dtype, device: torch.device, memory: int | None = None
) -> int:
    """The number of pages that `memory` bytes hold; by default, a share of the free memory.

    Raises:
        UsageError: memory for less than one page, or more than is free.
    """
    each, free = page_bytes(config, page_size, dtype), free_memory(device)
    if memory is None:
        memory = int(free * MEMORY_SHARE.get(device.type, MEMORY_SHARE_ELSEWHERE))
    elif memory > free:
        raise UsageError(f"`kv_memory` {memory:,} is above the {counted(free, 'byte')} that are free; ask for less")
    if memory < each:
        raise UsageError(
            f"`kv_memory` {memory:,}: a page of {counted(page_size, 'token')} takes {counted(each, 'byte')}; "
            "give more, or pass a smaller `page_size`"
        )
    return min(memory // each, MOST_PAGES)


@dataclass(frozen=True)
class Sequences:
    """Some sequences of a batch, in the form that `reference.paged_attention` takes."""

    block_table: torch.Tensor  # int32 (B, M)
    lengths: torch.Tensor  # int32 (B,)
    starts: torch.Tensor | None = None  # int32 (B + 1,); None while decoding


@dataclass(frozen=True)
class PagedBatch:
    """The cache of one forward pass over many sequences, whose N tokens are one row to the model: (1, N)."""

    keys: tuple[torch.Tensor, ...]  # of each layer, (pages, P, Hkv, D)
    values: tuple[torch.Tensor, ...]
    at: torch.Tensor  # int64 (N,): each token's position in its sequence
    slots: torch.Tensor  # int64 (N,): each token's slot in the pages, -1 for padding
    decoding: Sequences | None  # one token each; their tokens come first
    reading: Sequences | None  # any number of prompt tokens each (prefill)

    def positions(self, T: int) -> torch.Tensor:
        return self.at

    def attend(self, ops: "Ops", layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Write k and v (1, N, Hkv, D) to their pages and attend: q (1, N, H, D) -> the same shape."""
        keys, values = self.keys[layer], self.values[layer]
        ops.kv_write(k[0], v[0], keys, values, self.slots)
        q, one, many = q[0], self.decoding, self.reading
        if many is None:
            assert one is not None
            return ops.paged_attention(q, keys, values, one.block_table, one.lengths)[None]
        count = 0 if one is None else len(one.lengths)
        out = ops.paged_attention(q[count:], keys, values, many.block_table, many.lengths, starts=many.starts)
        if one is not None:
            first = ops.paged_attention(q[:count], keys, values, one.block_table, one.lengths)
            out = torch.cat([first, out])
        return out[None]

    def advance(self, tokens: int) -> None:
        """Nothing to do: the block tables hold the lengths."""
