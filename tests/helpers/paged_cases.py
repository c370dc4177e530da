"""Examples of paged attention, and what they must agree with."""

import math
from typing import NamedTuple

import torch

from fastgpt_kernels import reference, torch_ops
from fastgpt_kernels.paged import paged_attention
from tests.helpers.parity import DEVICE, Guards, assert_parity, poisoned

NO_PAGE = 2**30


class Case(NamedTuple):
    """What `paged_attention` takes, and each sequence's own keys and values, (length, Hkv, D)."""

    q: torch.Tensor
    k_pages: torch.Tensor
    v_pages: torch.Tensor
    block_table: torch.Tensor
    lengths: torch.Tensor
    starts: torch.Tensor | None
    keys: list[torch.Tensor]
    values: list[torch.Tensor]

    def inputs(self):
        return self[:5]

    def truth(self, scale=None):
        """Dense attention in float64, sequence by sequence."""
        out = torch.zeros_like(self.q, dtype=torch.float64, memory_format=torch.contiguous_format)
        bounds = range(len(self.lengths) + 1) if self.starts is None else self.starts.tolist()
        for b, (k, v) in enumerate(zip(self.keys, self.values, strict=True)):
            own = slice(bounds[b], bounds[b + 1])
            if len(k) and bounds[b] < bounds[b + 1]:
                q, k, v = (t.double()[None] for t in (self.q[own], k, v))
                out[own] = reference.causal_attention(q, k, v, scale=scale)[0]
        return out


def integers(numbers, dtype=torch.int32):
    return torch.tensor(numbers, dtype=dtype, device=DEVICE)


def case(lengths, P=16, H=2, Hkv=2, D=16, *, queries=None, dtype=torch.float32, room=0, seed=0, spread=1):
    """Sequences of these lengths in pages in no order; `room`: pages of the table that none needs.

    `spread`: the scores' standard deviation.
    """
    torch.manual_seed(seed)
    B, M = len(lengths), max([1, *(math.ceil(n / P) for n in lengths)]) + room
    needed = [math.ceil(n / P) for n in lengths]
    pool = sum(needed) + 2
    order = torch.randperm(pool).tolist()
    k_pages, v_pages = (torch.full((pool, P, Hkv, D), math.nan, device=DEVICE, dtype=dtype) for _ in range(2))
    table = torch.full((B, M), NO_PAGE, device=DEVICE, dtype=torch.int32)
    keys, values = [], []
    for b, length in enumerate(lengths):
        pages = [order.pop() for _ in range(needed[b])]
        table[b, : len(pages)] = integers(pages)
        for pool_of, own in ((k_pages, keys), (v_pages, values)):
            width = spread**0.5 if own is keys else 1
            own.append((width * torch.randn(length, Hkv, D, device=DEVICE)).to(dtype))
            for j, page in enumerate(pages):
                part = own[-1][j * P : (j + 1) * P]
                pool_of[page, : len(part)] = part
    starts = None if queries is None else integers([sum(queries[:b]) for b in range(B + 1)])
    N = B if queries is None else sum(queries)
    q = (spread**0.5 * torch.randn(N, H + 2 * Hkv, D, device=DEVICE)).to(dtype)[:, :H]  # of a packed projection
    return Case(q, k_pages, v_pages, table, integers(lengths), starts, keys, values)


def decode(chunk):
    """The Triton backend with a forced length of the splits."""

    def attention(q, k_pages, v_pages, block_table, lengths, *, starts=None, scale=None):
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        return torch.ops.fastgpt.paged_decode(q, k_pages, v_pages, block_table, lengths, scale, chunk)

    return attention


def assert_agrees(made: Case, ours=paged_attention, **arguments):
    truth = made.truth(**arguments)
    expected = torch_ops.paged_attention(*made.inputs(), starts=made.starts, **arguments)
    guards = Guards()
    names = ("q", "k_pages", "v_pages", "block_table", "lengths")
    placed = [guards.input(t, name) for t, name in zip(made.inputs(), names, strict=True)]
    starts = None if made.starts is None else guards.input(made.starts, "starts")
    with poisoned(guards):
        got = ours(*placed, starts=starts, **arguments)
    assert_parity([got], [expected], [truth], ["out"])
    assert got.is_contiguous()
    return got
