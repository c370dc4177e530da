"""Paged attention of several queries a sequence: the part of `paged` that reads prompts, whole or in chunks.

As `attention`'s forward pass, for query i of a sequence's last n tokens, at position p = length - n + i, over the keys
j <= p:

    S = scale * q k^T      P = softmax(S)      out = P v

A program has ROWS rows: some queries of one sequence, each with PACK of the query heads that share a key head. PACK is
a power of two. The device finds a program's sequence from `starts`, so that the host need not know the lengths.
Accumulators and statistics are float32, exponentials are base 2, and P is rounded to the inputs' dtype
before it is multiplied. There is no backward pass.

Twin: `reference.paged_attention` with `starts`. Offered here, for `paged`: the op fastgpt::paged_prefill.
"""

import math

import torch
import triton
import triton.language as tl

from fastgpt_kernels.attention_tiles import LOG2_E
from fastgpt_kernels.launch import DEBUG, Launch, Tuning, matmul_tuning


@triton.jit
def find_slots(table_ptr, start, last, P: tl.constexpr, COLUMNS: tl.constexpr):
    """The slots of positions start .. start + COLUMNS, int64; `start` is a multiple of COLUMNS, before `last`.

    Table entries from position `last` on are not read, and those positions get an arbitrary slot.
    """
    lane = tl.arange(0, COLUMNS)
    if P % COLUMNS == 0:  # all of them lie in one page
        page = tl.load(table_ptr + start // P).to(tl.int64)
        return page * P + start % P + lane
    else:
        page = tl.load(table_ptr + (start + lane) // P, mask=start + lane < last, other=0).to(tl.int64)
        return page * P + (start + lane) % P


@triton.jit
def load_slots(ptr, slot, stride, seen, D: tl.constexpr, BLOCK_D: tl.constexpr, BOUNDED: tl.constexpr):
    """One head's rows in these slots, (slots, BLOCK_D); BOUNDED: zero where not `seen`, which may hold anything."""
    d = tl.arange(0, BLOCK_D)[None, :]
    pointers = ptr + slot[:, None] * stride + d
    if BOUNDED and D == BLOCK_D:
        return tl.load(pointers, mask=seen[:, None], other=0.0)
    elif BOUNDED:
        return tl.load(pointers, mask=seen[:, None] & (d < D), other=0.0)
    elif D == BLOCK_D:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=d < D, other=0.0)


@triton.jit
def _attend(
    acc, total, top, q, k_ptr, v_ptr, table_ptr, stride, first, last, position, scale,
    P: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    COLUMNS: tl.constexpr, DIAGONAL: tl.constexpr,
):  # fmt: skip
    """Attend to the keys first .. last: the sums so far of weighted values and of weights, and the running maximum."""
    for start in range(first, last, COLUMNS):
        key = start + tl.arange(0, COLUMNS)
        slot = find_slots(table_ptr, start, last, P, COLUMNS)
        k = load_slots(k_ptr, slot, stride, key < last, D, BLOCK_D, DIAGONAL)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if DIAGONAL:
            scores = tl.where(key[None, :] <= position[:, None], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1) * scale)
        p = tl.exp2(scores * scale - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, axis=1)
        v = load_slots(v_ptr, slot, stride, key < last, D, BLOCK_D, DIAGONAL)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        top = new_top
    return acc, total, top


@triton.jit(
    do_not_specialize=["table_b", "lengths_b", "B"],
    do_not_specialize_on_alignment=["table_ptr", "lengths_ptr", "starts_ptr"],
)
def _prefill(
    out_ptr,  # (N, H, D)
    q_ptr,  # (N, H, D)
    k_ptr, v_ptr,  # (pages, P, Hkv, D)
    table_ptr,  # (B, M)
    lengths_ptr,  # (B,)
    starts_ptr,  # (B + 1,)
    q_t, q_h, table_b, lengths_b, B, H, Hkv,
    scale,  # times log2(e)
    GROUP: tl.constexpr,  # H / Hkv
    PACK: tl.constexpr,  # heads of a group that one program has; divides GROUP and ROWS
    P: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_B: tl.constexpr,  # at least B
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    QUERIES: tl.constexpr = ROWS // PACK
    packs = H // PACK
    item = tl.program_id(0) // packs
    sequence = tl.arange(0, BLOCK_B)
    start = tl.load(starts_ptr + sequence, mask=sequence < B, other=0)
    end = tl.load(starts_ptr + sequence + 1, mask=sequence < B, other=0)
    items = tl.cumsum((end - start + QUERIES - 1) // QUERIES, axis=0)  # of the sequences up to each
    b = tl.sum((items <= item).to(tl.int32), axis=0)
    if b >= B:  # the grid has room for a ragged last tile in every sequence
        return
    tile = item - tl.max(tl.where(items <= item, items, 0), axis=0)
    own = tl.load(starts_ptr + b)
    n = tl.load(starts_ptr + b + 1) - own
    length = tl.load(lengths_ptr + b * lengths_b)
    first_q = ((n - 1) // QUERIES - tile) * QUERIES  # the rows with most keys first
    row = tl.arange(0, ROWS)
    query = first_q + row // PACK
    head = (tl.program_id(0) % packs * PACK + row % PACK).to(tl.int64)
    token = (own + query).to(tl.int64)
    d = tl.arange(0, BLOCK_D)[None, :]
    inside = (query < n)[:, None] & (d < D)
    q = tl.load(q_ptr + token[:, None] * q_t + head[:, None] * q_h + d, mask=inside, other=0.0)
    kv_head = tl.program_id(0) % packs * PACK // GROUP
    table_ptr += b.to(tl.int64) * table_b
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    top = tl.full([ROWS], -1e30, tl.float32)  # finite, so that a tile without a visible key gives 0 and not NaN
    before = length - n + first_q  # the first query's position; negative in an empty slot
    diagonal = tl.maximum(before + 1, 0) // COLUMNS * COLUMNS  # every query of the tile sees every key before this one
    last = tl.minimum(before + QUERIES, length)
    for DIAGONAL in tl.static_range(2):
        acc, total, top = _attend(
            acc, total, top, q, k_ptr + kv_head * D, v_ptr + kv_head * D, table_ptr, Hkv * D,
            diagonal if DIAGONAL else 0, last if DIAGONAL else diagonal, length - n + query, scale,
            P, D, BLOCK_D, PRECISION, COLUMNS, DIAGONAL,
        )  # fmt: skip
    out = acc / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(out_ptr + (token[:, None] * H + head[:, None]) * D + d, out, mask=inside)


def prefill_launch(
    out: torch.Tensor, q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor,
    block_table: torch.Tensor, lengths: torch.Tensor, starts: torch.Tensor, scale: float, tuning: Tuning,
) -> Launch:  # fmt: skip
    (N, H, D), Hkv, B = q.shape, k_pages.shape[2], len(lengths)
    row = tuning.row("paged_prefill", D)
    pack = math.gcd(H // Hkv, row.rows)
    # The sum over the sequences of ceil(n / queries) is at most N / queries + B.
    items = N // (row.rows // pack) + B
    return Launch(
        "paged_prefill",
        _prefill,
        (items * (H // pack),),
        (
            *(out, q, k_pages, v_pages, block_table, lengths, starts),
            *(q.stride(0), q.stride(1), block_table.stride(0), lengths.stride(0), B, H, Hkv, scale * LOG2_E),
        ),
        {"PACK": pack} | constants(q, k_pages, B, tuning) | row.constants(),
    )


def constants(q: torch.Tensor, k_pages: torch.Tensor, B: int, tuning: Tuning) -> dict[str, object]:
    """The arguments that both kernels over pages are compiled for."""
    (_, H, D), (_, P, Hkv, _) = q.shape, k_pages.shape
    return {
        "GROUP": H // Hkv,
        "P": P,
        "D": D,
        "BLOCK_D": max(16, triton.next_power_of_2(D)),  # tensor cores multiply 16 or more
        "BLOCK_B": max(16, triton.next_power_of_2(B)),
        "PRECISION": "tf32" if tuning.kind == "tf32" else "ieee",
    }


def check_values(
    q: torch.Tensor, k_pages: torch.Tensor, block_table: torch.Tensor, lengths: torch.Tensor,
    starts: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """Raises ValueError if a number points outside. On a GPU it reads nothing, unless FASTGPT_DEBUG=1."""
    if q.device.type != "cpu" and not DEBUG:
        return
    op, room = "paged_attention", block_table.shape[1] * k_pages.shape[1]
    outside = lengths[(lengths < 0) | (lengths > room)]
    if outside.numel():
        raise ValueError(
            f"{op}: lengths {tuple(lengths.shape)} holds {outside[0].item()}; expected 0 to {room}, the slots of "
            f"block_table {tuple(block_table.shape)} at {k_pages.shape[1]} a page"
        )
    first = torch.arange(block_table.shape[1], device=q.device) * k_pages.shape[1]  # position of each page
    pages = block_table[first < lengths[:, None]]
    outside = pages[(pages < 0) | (pages >= len(k_pages))]
    if outside.numel():
        raise ValueError(
            f"{op}: block_table {tuple(block_table.shape)} holds {outside[0].item()}; expected 0 to "
            f"{len(k_pages) - 1}, the pages of k_pages {tuple(k_pages.shape)}"
        )
    if starts is None:
        return
    queries = starts.diff()
    if starts[0] != 0 or starts[-1] != len(q) or (queries < 0).any():
        raise ValueError(
            f"{op}: starts {tuple(starts.shape)} is {starts.tolist()}; expected it to rise from 0 to {len(q)}"
        )
    if ((queries > lengths) & (lengths > 0)).any():
        raise ValueError(
            f"{op}: starts {tuple(starts.shape)} is {starts.tolist()}; expected no more queries than lengths "
            f"{lengths.tolist()} has tokens"
        )


@torch.library.custom_op("fastgpt::paged_prefill", mutates_args=())
def _paged_prefill(
    q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, block_table: torch.Tensor, lengths: torch.Tensor,
    starts: torch.Tensor, scale: float,
) -> torch.Tensor:  # fmt: skip
    """`paged.paged_attention` of some last tokens of each sequence, for a scale above 0."""
    check_values(q, k_pages, block_table, lengths, starts)
    out = _paged_prefill_shape(q, k_pages, v_pages, block_table, lengths, starts, scale)
    if q.numel():
        q, block_table = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, block_table))
        starts, rows = starts.contiguous(), matmul_tuning(q.device, q.dtype)
        prefill_launch(out, q, k_pages, v_pages, block_table, lengths, starts, scale, rows)()
    return out


@_paged_prefill.register_fake
def _paged_prefill_shape(q, k_pages, v_pages, block_table, lengths, starts, scale):
    return q.new_empty(q.shape)
