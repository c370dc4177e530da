"""Shared by attention's forward and backward kernels: tiles of a head, the mask, the dropout, their constants.

A query or key tile is a (ROWS or COLUMNS, BLOCK_D) matrix of one head. Strides are tuples (batch, time, head), in
elements. Triton specializes each integer in a tuple, on 1 and on multiples of 16, whatever `do_not_specialize` says
of the tuple. Strides need that, because it makes loads wide. An integer that must not be specialized stays an argument
of its own.

Offered here, for `attention` and `attention_backward`: `query_tile`, `at_head`, `load_tile`, `store_tile`,
`load_documents`, `visible`, `keep`; `constants`, `row_name` and `addressable` for their launchers and operations.
"""

import math

import torch
import triton
import triton.language as tl

from fastgpt_kernels.dropout import ROUNDS
from fastgpt_kernels.launch import Tuning

LOG2_E = math.log2(math.e)
WIDEST_HEAD = 256
PHILOX_ROUNDS = tl.constexpr(ROUNDS)
COUNTS = ("heads", "threshold")  # not specialized: one compilation serves every batch size and dropout rate


@triton.jit
def query_tile(heads, H, ROWS: tl.constexpr):
    """This program's tile of queries: its head among all B * H, its batch entry, its head in that, its first query."""
    head = tl.program_id(0) % heads
    first = (tl.num_programs(0) // heads - 1 - tl.program_id(0) // heads) * ROWS  # the rows with most keys first
    return head, (head // H).to(tl.int64), (head % H).to(tl.int64), first


@triton.jit
def at_head(ptr, strides, b, h):
    """The offset of a head of a (B, T, heads, D) tensor."""
    return ptr + (b * strides[0] + h * strides[2])


@triton.jit
def load_tile(ptr, stride, first, T, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, BOUNDED: tl.constexpr):
    """Rows first .. first + ROWS of a (T, D) matrix as (ROWS, BLOCK_D), zero outside; BOUNDED: some may be past T."""
    row = tl.arange(0, ROWS)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    pointers = ptr + tl.cast(first, tl.int64) * stride + row * stride + d
    if BOUNDED and D == BLOCK_D:
        return tl.load(pointers, mask=first + row < T, other=0.0)
    elif BOUNDED:
        return tl.load(pointers, mask=(first + row < T) & (d < D), other=0.0)
    elif D == BLOCK_D:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=d < D, other=0.0)


@triton.jit
def store_tile(ptr, b, h, H, first, T, tile, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store rows first .. first + ROWS of head h into a contiguous (B, T, H, D) tensor."""
    row = tl.arange(0, ROWS)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    pointers = ptr + (b * T * H + h) * D + tl.cast(first, tl.int64) * (H * D) + row * (H * D) + d
    tl.store(pointers, tile, mask=(first + row < T) & (d < D))


@triton.jit
def load_documents(doc_ptr, position, inside):
    """The document of each position; without documents `position`, which has the right shape and is not used."""
    if doc_ptr is not None:
        return tl.load(doc_ptr + position, mask=inside, other=0)
    else:
        return position


@triton.jit
def visible(p, hidden, position, key, q_doc, k_doc, DIAGONAL: tl.constexpr, DOCUMENTS: tl.constexpr):
    """`p` where the key is seen, `hidden` elsewhere; the other arguments broadcast to p's shape."""
    if DIAGONAL:
        p = tl.where(key <= position, p, hidden)
    if DOCUMENTS:
        p = tl.where(k_doc == q_doc, p, hidden)
    return p


@triton.jit
def keep(seed, head, position, first, threshold, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The weights of a tile that dropout keeps, (ROWS, COLUMNS), as `dropout.dropout_mask`; `position` is (ROWS,)."""
    call = first // 8 + tl.arange(0, COLUMNS // 8)[None, :]
    zero = tl.zeros([ROWS, COLUMNS // 8], tl.int32)
    w0, w1, w2, w3 = tl.philox(seed, zero + call, zero + position[:, None], zero + head, zero, n_rounds=PHILOX_ROUNDS)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # the last two dimensions count the words in binary
    words = tl.reshape(words, [ROWS, COLUMNS // 32, 4, 4])  # blocks of 32 columns, calls, words
    words = tl.reshape(tl.permute(words, [0, 1, 3, 2]), [ROWS, COLUMNS // 2])
    return tl.interleave((words & 0xFFFF) >= threshold, (words >> 16) >= threshold)


def constants(q: torch.Tensor, k: torch.Tensor, tuning: Tuning) -> dict[str, object]:
    """The arguments that all three kernels are compiled for, besides the tile."""
    D = q.shape[-1]
    block = max(16, 1 << (D - 1).bit_length())  # tensor cores multiply 16 or more
    precision = "tf32" if tuning.kind == "tf32" else "ieee"
    return {"GROUP": q.shape[2] // max(k.shape[2], 1), "D": D, "BLOCK_D": block, "PRECISION": precision}


def row_name(kernel: str, seed: torch.Tensor | None) -> str:
    """A kernel's name in the launch table. With dropout a tile needs more registers, and so has its own rows."""
    return kernel if seed is None else f"{kernel}_dropout"


def addressable(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy where its columns are not adjacent, or its rows so far apart that a tile passes 2**31 elements."""
    return x if x.stride(-1) == 1 and x.stride(1) < 2**31 // 128 else x.contiguous()
