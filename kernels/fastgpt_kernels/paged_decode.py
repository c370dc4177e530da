"""Paged attention of one query a sequence: the part of `paged` that generates, token by token.

For the last token of each sequence, over all its keys:

    S = scale * q k^T      P = softmax(S)      out = P v

Programs share the keys of a sequence in splits, so that even a few long sequences fill a GPU (Dao et al., 2023,
"Flash-Decoding"). All splits have the same length, which the device computes from the lengths of all sequences: ragged
lengths still give even work. A program finds its sequence and split from the lengths, so nothing waits for the host.
The grid depends on shapes alone, so a CUDA graph can be replayed while lengths and tables change. The program of a
sequence with one split writes the output. Otherwise each split stores its unnormalised sum, its sum of weights and its
maximum, and a second kernel adds these up in a fixed order, without atomics:

    top = max over splits of top_s      out = sum(2^(top_s - top) * acc_s) / sum(2^(top_s - top) * total_s)

One query head for a key head uses vector sums only, because tensor cores would multiply 15 rows of padding. Several
query heads are packed into the rows of a matrix product. Accumulators, statistics and what splits store are float32;
exponentials are base 2. Memory beyond the output: (D + 2) * 4 bytes for each head and split, if there may be more than
one split. There is no backward pass.

Twin: `reference.paged_attention` without `starts`. Offered here, for `paged`: the op fastgpt::paged_decode, whose
`chunk` can force the length of the splits.
"""

import torch
import triton
import triton.language as tl

from fastgpt_kernels.attention_tiles import LOG2_E
from fastgpt_kernels.launch import Launch, Tuning, matmul_tuning, tiles, tuning
from fastgpt_kernels.paged_prefill import check_values, constants, find_slots, load_slots

# The fewest keys of a split: for fewer, starting a program and merging its result take longer than reading the keys.
LEAST_CHUNK = 128


@triton.jit
def _split_length(lengths, chunk, heads, programs, LEAST: tl.constexpr, TILE: tl.constexpr):
    """The length of splits: `chunk`; if that is 0, the least at which full splits take at most `programs` programs.

    heads: the programs that share a split. The length is a multiple of TILE, and at least LEAST unless `chunk` says so.
    """
    even = tl.cdiv(tl.sum(lengths.to(tl.int64), axis=0) * heads, programs).to(tl.int32)
    return tl.cdiv(tl.where(chunk > 0, chunk, tl.maximum(even, LEAST)), TILE) * TILE


@triton.jit
def _count_splits(lengths, chunk, inside):
    """The number of splits of each sequence: at least one, and 0 for padding."""
    return tl.where(inside, tl.maximum((lengths + chunk - 1) // chunk, 1), 0)


@triton.jit
def _rescale(acc, total, top, new_top):
    """The sums so far, rescaled to a new maximum."""
    shrink = tl.exp2(top - new_top)
    return acc * shrink[:, None], total * shrink


@triton.jit
def _add_up(acc, total, top):
    """The sums over all rows, as one row: acc (1, BLOCK_D), total (1,), top (1,)."""
    new_top = tl.max(top, axis=0, keep_dims=True)
    acc, total = _rescale(acc, total, top, new_top)
    return tl.sum(acc, axis=0, keep_dims=True), tl.sum(total, axis=0, keep_dims=True), new_top


@triton.jit
def _attend_by_sums(
    q,  # (1, BLOCK_D)
    k_ptr, v_ptr, table_ptr, stride, first, last, scale,
    P: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One query over the keys first .. last. Each lane keeps its own sums, so warps synchronize only at the end."""
    q = q.to(tl.float32) * scale
    acc = tl.zeros([COLUMNS, BLOCK_D], tl.float32)
    total = tl.zeros([COLUMNS], tl.float32)
    top = tl.full([COLUMNS], -1e30, tl.float32)  # finite, so that a lane without a key gives 0 and not NaN
    for start in tl.range(first, last, COLUMNS, num_stages=STAGES):
        seen = start + tl.arange(0, COLUMNS) < last
        slot = find_slots(table_ptr, start, last, P, COLUMNS)
        k = load_slots(k_ptr, slot, stride, seen, D, BLOCK_D, True)
        scores = tl.where(seen, tl.sum(k.to(tl.float32) * q, axis=1), float("-inf"))
        new_top = tl.maximum(top, scores)
        p = tl.exp2(scores - new_top)
        acc, total = _rescale(acc, total, top, new_top)
        v = load_slots(v_ptr, slot, stride, seen, D, BLOCK_D, True)
        acc += p[:, None] * v.to(tl.float32)
        total += p
        top = new_top
    return _add_up(acc, total, top)


@triton.jit
def _attend_by_products(
    q,  # (ROWS, BLOCK_D)
    k_ptr, v_ptr, table_ptr, stride, first, last, scale,
    P: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """As `_attend_by_sums`, for the query heads of a group at once."""
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    top = tl.full([ROWS], -1e30, tl.float32)
    for start in range(first, last, COLUMNS):
        seen = start + tl.arange(0, COLUMNS) < last
        slot = find_slots(table_ptr, start, last, P, COLUMNS)
        k = load_slots(k_ptr, slot, stride, seen, D, BLOCK_D, True)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        scores = tl.where(seen[None, :], scores * scale, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        p = tl.exp2(scores - new_top[:, None])
        acc, total = _rescale(acc, total, top, new_top)
        v = load_slots(v_ptr, slot, stride, seen, D, BLOCK_D, True)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
        total += tl.sum(p, axis=1)
        top = new_top
    return acc, total, top


@triton.jit(
    do_not_specialize=["table_b", "lengths_b", "B", "chunk", "programs"],
    do_not_specialize_on_alignment=["table_ptr", "lengths_ptr"],
)
def _decode(
    out_ptr,  # (B, H, D)
    partial_ptr,  # (splits of all sequences, H, D) float32; None where every sequence has one split
    statistics_ptr,  # (splits of all sequences, H, 2) float32: the sum of weights, and the maximum in base 2
    q_ptr,  # (B, H, D)
    k_ptr, v_ptr,  # (pages, P, Hkv, D)
    table_ptr,  # (B, M)
    lengths_ptr,  # (B,)
    q_t, q_h, table_b, lengths_b,
    B, H, Hkv, chunk, programs,
    scale,  # times log2(e)
    GROUP: tl.constexpr,  # H / Hkv
    P: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_B: tl.constexpr,  # at least B, where there are splits
    LEAST: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr,  # heads of a group that one program has
    COLUMNS: tl.constexpr,
    num_stages: tl.constexpr,  # Triton's option: this loop is pipelined only on request
):  # fmt: skip
    PARTS: tl.constexpr = (GROUP + ROWS - 1) // ROWS
    heads = Hkv * PARTS
    item = tl.program_id(0) // heads
    kv_head = tl.program_id(0) % heads // PARTS
    b = item
    splits = 1
    first = 0
    if partial_ptr is not None:
        sequence = tl.arange(0, BLOCK_B)
        lengths = tl.load(lengths_ptr + sequence * lengths_b, mask=sequence < B, other=0)
        chunk = _split_length(lengths, chunk, heads, programs, LEAST, COLUMNS)
        each = _count_splits(lengths, chunk, sequence < B)
        items = tl.cumsum(each, axis=0)  # of the sequences up to each
        b = tl.sum((items <= item).to(tl.int32), axis=0)
        if b >= B:  # the grid has room for as many splits as lengths of this shape could need
            return
        splits = tl.sum(tl.where(sequence == b, each, 0), axis=0)
        first = (item - tl.max(tl.where(items <= item, items, 0), axis=0)) * chunk
    last = tl.load(lengths_ptr + b * lengths_b)
    if partial_ptr is not None:
        last = tl.minimum(last, first + chunk)
    b = b.to(tl.int64)
    own = tl.program_id(0) % PARTS * ROWS + tl.arange(0, ROWS)  # within the group
    head = (kv_head * GROUP + own).to(tl.int64)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    inside = (own < GROUP)[:, None] & (d < D)
    q = tl.load(q_ptr + b * q_t + head * q_h + d, mask=inside, other=0.0)
    k_ptr += kv_head * D
    v_ptr += kv_head * D
    table_ptr += b * table_b
    if GROUP == 1:
        sums = _attend_by_sums(
            q, k_ptr, v_ptr, table_ptr, Hkv * D, first, last, scale, P, D, BLOCK_D, COLUMNS, num_stages
        )
    else:
        sums = _attend_by_products(
            q, k_ptr, v_ptr, table_ptr, Hkv * D, first, last, scale, P, D, BLOCK_D, PRECISION, ROWS, COLUMNS
        )
    acc, total, top = sums
    if splits == 1:
        out = acc / tl.where(total > 0, total, 1.0)[:, None]  # 0 in an empty slot
        tl.store(out_ptr + (b * H + head) * D + d, out, mask=inside)
    elif partial_ptr is not None:
        at = item.to(tl.int64) * H + head
        tl.store(partial_ptr + at * D + d, acc, mask=inside)
        tl.store(statistics_ptr + at * 2, total[:, None], mask=(own < GROUP)[:, None])
        tl.store(statistics_ptr + at * 2 + 1, top[:, None], mask=(own < GROUP)[:, None])


@triton.jit(do_not_specialize=["lengths_b", "B", "chunk", "programs"], do_not_specialize_on_alignment=["lengths_ptr"])
def _merge(
    out_ptr,  # (B, H, D)
    partial_ptr,  # (splits of all sequences, H, D) float32
    statistics_ptr,  # (splits of all sequences, H, 2) float32
    lengths_ptr,  # (B,)
    lengths_b, B, H, heads, chunk, programs,
    D: tl.constexpr, BLOCK_B: tl.constexpr, LEAST: tl.constexpr,
    TILE: tl.constexpr,  # the keys of `_decode`'s tile
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,  # at least D
):  # fmt: skip
    """The output of one head of a sequence with several splits."""
    b = tl.program_id(0) // H
    head = tl.program_id(0) % H
    sequence = tl.arange(0, BLOCK_B)
    lengths = tl.load(lengths_ptr + sequence * lengths_b, mask=sequence < B, other=0)
    chunk = _split_length(lengths, chunk, heads, programs, LEAST, TILE)
    each = _count_splits(lengths, chunk, sequence < B)
    splits = tl.sum(tl.where(sequence == b, each, 0), axis=0)
    if splits == 1:  # its program wrote the output
        return
    first = tl.sum(tl.where(sequence < b, each, 0), axis=0)
    d = tl.arange(0, COLUMNS)
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    top = tl.full([ROWS], -1e30, tl.float32)
    for start in range(0, splits, ROWS):
        row = start + tl.arange(0, ROWS)
        at = (first + row).to(tl.int64) * H + head
        inside = row < splits
        part = tl.load(partial_ptr + at[:, None] * D + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0)
        part_total = tl.load(statistics_ptr + at * 2, mask=inside, other=0.0)
        part_top = tl.load(statistics_ptr + at * 2 + 1, mask=inside, other=-1e30)
        new_top = tl.maximum(top, part_top)
        acc, total = _rescale(acc, total, top, new_top)
        part, part_total = _rescale(part, part_total, part_top, new_top)
        acc += part
        total += part_total
        top = new_top
    acc, total, _ = _add_up(acc, total, top)
    out = acc / total[:, None]
    tl.store(out_ptr + (b.to(tl.int64) * H + head) * D + d[None, :], out, mask=(d < D)[None, :])


def decode_launches(
    out: torch.Tensor, q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor,
    block_table: torch.Tensor, lengths: torch.Tensor, scale: float, chunk: int, tuning: Tuning,
) -> list[Launch]:  # fmt: skip
    """The launches of one decoded token in their order; only one if no sequence in this table can have two splits.

    All sequences have at most B * ceil(M * P / least) splits. If the device chooses the splits' length, they also have
    at most programs / heads + B: a sequence has ceil(length / chunk) < length / chunk + 1 of them, or 1 if empty, and
    the chunk is at least the sum of the lengths * heads / programs.
    """
    (B, H, D), (_, P, Hkv, _), M = q.shape, k_pages.shape, block_table.shape[1]
    name = "paged_decode" if Hkv == H else "paged_decode_grouped"
    row = tuning.row(name, D)
    heads = Hkv * tiles(H // Hkv, row.rows)  # programs that share a split
    least = tiles(chunk or LEAST_CHUNK, row.columns) * row.columns
    most = tiles(M * P, least)
    items = B * max(1, most) if chunk else min(B * max(1, most), tuning.decode_programs // heads + B)
    partial = statistics = None
    if most > 1:
        partial, statistics = (q.new_empty(items, H, n, dtype=torch.float32) for n in (D, 2))
    kind = "16-bit" if out.element_size() == 2 else "float32"  # the second kernel multiplies no matrices
    shared = constants(q, k_pages, 1 if partial is None else B, tuning) | {"LEAST": LEAST_CHUNK}
    decode = Launch(
        name,
        _decode,
        (items * heads,),
        (
            *(out, partial, statistics, q, k_pages, v_pages, block_table, lengths),
            *(q.stride(0), q.stride(1), block_table.stride(0), lengths.stride(0)),
            *(B, H, Hkv, chunk, tuning.decode_programs, scale * LOG2_E),
        ),
        shared | row.constants(),
    )
    if partial is None:
        return [decode]
    merge = Launch(
        "paged_merge",
        _merge,
        (B * H,),
        (out, partial, statistics, lengths, lengths.stride(0), B, H, heads, chunk, tuning.decode_programs),
        {name: shared[name] for name in ("D", "BLOCK_B", "LEAST")}
        | {"TILE": row.columns}
        | Tuning(tuning.target, kind).row("paged_merge", D).constants(),
    )
    return [decode, merge]


@torch.library.custom_op("fastgpt::paged_decode", mutates_args=())
def _paged_decode(
    q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, block_table: torch.Tensor, lengths: torch.Tensor,
    scale: float, chunk: int,
) -> torch.Tensor:  # fmt: skip
    """`paged_attention` of one query a sequence, for a scale above 0.

    chunk: keys of a split, rounded up to a tile. 0, as in `paged_attention`, lets the device choose.
    """
    check_values(q, k_pages, block_table, lengths)
    out = _paged_decode_shape(q, k_pages, v_pages, block_table, lengths, scale, chunk)
    if q.numel():
        q, block_table = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, block_table))
        rows = (tuning if q.shape[1] == k_pages.shape[2] else matmul_tuning)(q.device, q.dtype)
        for launch in decode_launches(out, q, k_pages, v_pages, block_table, lengths, scale, chunk, rows):
            launch()
    return out


@_paged_decode.register_fake
def _paged_decode_shape(q, k_pages, v_pages, block_table, lengths, scale, chunk):
    return q.new_empty(q.shape)
