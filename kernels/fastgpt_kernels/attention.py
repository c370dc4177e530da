"""Causal attention that never holds the (Tq, Tk) weights: forward and backward, with dropout inside.

Forward, in tiles of queries by keys with a running maximum (Dao, 2023, "FlashAttention-2", algorithm 1), for query i
at position p = Tk - Tq + i, over the keys j <= p of its document:

    S = scale * q k^T      P = softmax(S)      out = (P * keep / (1 - dropout_p)) v      lse = log2 of sum of exp(S)

Backward (algorithm 2 there), as two kernels so that nothing is added up across programs: one owns a tile of queries
and goes over the keys, then one owns a tile of keys and goes over the queries. With M = keep / (1 - dropout_p):

    delta = sum(dout * out)      dP = (dout v^T) * M      dS = P * (dP - delta)
    dv = (P * M)^T dout          dk = scale * dS^T q      dq = scale * dS k

Scores are kept times log2(e), so that exponentials are base 2, as lse is. Accumulators and statistics are float32;
P and dS are rounded to the inputs' dtype before they are multiplied. q, k and v may be any views whose last dimension
is contiguous, such as slices of a packed projection. Memory beyond the outputs: lse and delta, 8 bytes a query row,
and, where several query heads share a key, dk and dv of each in float32, added up at the end.

Twin: `reference.causal_attention`. Dropout is `dropout.dropout_mask`'s, bit for bit. Offered here: `causal_attention`.
"""

import math

import torch
import triton
import triton.language as tl

from fastgpt_kernels.dropout import ROUNDS
from fastgpt_kernels.launch import Launch, Tuning, autocast_dtype, check_tensors, matmul_tuning, tiles

LOG2_E = math.log2(math.e)
WIDEST_HEAD = 256
PHILOX_ROUNDS = tl.constexpr(ROUNDS)
# One compilation of the forward pass serves every batch and length, as strides alone align what is loaded wide. The
# backward pass, whose lengths seldom change, is compiled for multiples of 16: it takes 10 registers less to mask lse.
COUNTS = ("heads", "threshold")
LENGTHS = ("Tq", "Tk")


@triton.jit
def _load_tile(
    ptr, stride, first, T, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, BOUNDED: tl.constexpr
):
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
def _store_tile(ptr, stride, first, T, tile, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    row = tl.arange(0, ROWS)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    pointers = ptr + tl.cast(first, tl.int64) * stride + row * stride + d
    tl.store(pointers, tile, mask=(first + row < T) & (d < D))


@triton.jit
def _keep(seed, head, position, first, threshold, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Which weights of a tile are kept, (ROWS, COLUMNS), as `dropout.dropout_mask` decides; `position` is (ROWS,)."""
    call = first // 8 + tl.arange(0, COLUMNS // 8)[None, :]
    zero = tl.zeros([ROWS, COLUMNS // 8], tl.int32)
    w0, w1, w2, w3 = tl.philox(seed, zero + call, zero + position[:, None], zero + head, zero, n_rounds=PHILOX_ROUNDS)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # the last two dimensions count the words in binary
    words = tl.reshape(words, [ROWS, COLUMNS // 32, 4, 4])  # blocks of 32 columns, calls, words
    words = tl.reshape(tl.permute(words, [0, 1, 3, 2]), [ROWS, COLUMNS // 2])
    return tl.interleave((words & 0xFFFF) >= threshold, (words >> 16) >= threshold)


@triton.jit
def _visible(p, hidden, position, key, q_doc, k_doc, DIAGONAL: tl.constexpr, DOCUMENTS: tl.constexpr):
    """`p` where the key is seen, `hidden` elsewhere; the other arguments broadcast to p's shape."""
    if DIAGONAL:
        p = tl.where(key <= position, p, hidden)
    if DOCUMENTS:
        p = tl.where(k_doc == q_doc, p, hidden)
    return p


@triton.jit
def _attend(
    acc,
    total,
    top,
    q,
    k_ptr,
    v_ptr,
    k_t,
    v_t,
    first,
    last,
    doc_ptr,
    q_doc,
    position,
    Tk,
    scale,
    seed,
    head,
    threshold,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DIAGONAL: tl.constexpr,
    DROPPING: tl.constexpr,
):
    """Attend to the keys first .. last: the sums so far of weighted values and of weights, and the running maximum."""
    for start in range(first, last, COLUMNS):
        key = start + tl.arange(0, COLUMNS)
        k = _load_tile(k_ptr, k_t, start, Tk, D, COLUMNS, BLOCK_D, DIAGONAL)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        k_doc = key
        if doc_ptr is not None:
            k_doc = tl.load(doc_ptr + key, mask=key < Tk, other=0)
        scores = _visible(
            scores,
            float("-inf"),
            position[:, None],
            key[None, :],
            q_doc[:, None],
            k_doc[None, :],
            DIAGONAL,
            doc_ptr is not None,
        )
        new_top = tl.maximum(top, tl.max(scores, axis=1) * scale)
        p = tl.exp2(scores * scale - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, axis=1)  # undropped, as the softmax comes before the dropout
        acc = acc * shrink[:, None]
        if DROPPING:
            p = tl.where(_keep(seed, head, position, start, threshold, ROWS, COLUMNS), p, 0.0)
        v = _load_tile(v_ptr, v_t, start, Tk, D, COLUMNS, BLOCK_D, DIAGONAL)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
        top = new_top
    return acc, total, top


@triton.jit(do_not_specialize=COUNTS + LENGTHS, do_not_specialize_on_alignment=["seed_ptr"])
def _forward(
    out_ptr,  # (B, Tq, H, D)
    lse_ptr,  # (B, H, Tq) float32
    q_ptr,  # (B, Tq, H, D)
    k_ptr,  # (B, Tk, Hkv, D)
    v_ptr,  # (B, Tk, Hkv, D)
    seed_ptr,  # int64 scalar, or None
    doc_ptr,  # (B, Tk), or None
    q_b,
    q_t,
    q_h,
    k_b,
    k_t,
    k_h,
    v_b,
    v_t,
    v_h,
    heads,  # B * H
    H,
    Tq,
    Tk,
    scale,  # times log2(e)
    threshold,
    keep_scale,  # 1 / (1 - dropout_p)
    GROUP: tl.constexpr,  # H / Hkv
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    head = tl.program_id(0) % heads
    first_q = (tl.num_programs(0) // heads - 1 - tl.program_id(0) // heads) * ROWS  # the rows with most keys first
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    before = Tk - Tq + first_q  # the first row's position
    position = before + tl.arange(0, ROWS)
    q = _load_tile(q_ptr + b * q_b + h * q_h, q_t, first_q, Tq, D, ROWS, BLOCK_D, True)
    k_ptr += b * k_b + h // GROUP * k_h
    v_ptr += b * v_b + h // GROUP * v_h
    q_doc = position
    if doc_ptr is not None:
        doc_ptr += b * Tk
        q_doc = tl.load(doc_ptr + position, mask=position < Tk, other=0)
    seed = tl.load(seed_ptr) if seed_ptr is not None else 0
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    top = tl.full([ROWS], -1e30, tl.float32)  # finite, so that a tile without a visible key gives 0 and not NaN
    diagonal = (before + 1) // COLUMNS * COLUMNS  # every row of the tile sees every key before this one
    last = tl.minimum(before + ROWS, Tk)
    for DIAGONAL in tl.static_range(1, -1, -1):
        acc, total, top = _attend(
            acc,
            total,
            top,
            q,
            k_ptr,
            v_ptr,
            k_t,
            v_t,
            diagonal if DIAGONAL else 0,
            last if DIAGONAL else diagonal,
            doc_ptr,
            q_doc,
            position,
            Tk,
            scale,
            seed,
            head,
            threshold,
            D,
            BLOCK_D,
            PRECISION,
            ROWS,
            COLUMNS,
            DIAGONAL,
            seed_ptr is not None,
        )
    row = first_q + tl.arange(0, ROWS)
    tl.store(lse_ptr + head.to(tl.int64) * Tq + row, top + tl.log2(total), mask=row < Tq)
    out = acc * (keep_scale / total)[:, None]
    _store_tile(out_ptr + (b * Tq * H + h) * D, H * D, first_q, Tq, out, D, ROWS, BLOCK_D)


@triton.jit
def _accumulate_dq(
    dq,
    q,
    dout,
    lse,
    delta,
    k_ptr,
    v_ptr,
    k_t,
    v_t,
    first,
    last,
    doc_ptr,
    q_doc,
    position,
    Tk,
    scale,
    seed,
    head,
    threshold,
    keep_scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DIAGONAL: tl.constexpr,
    DROPPING: tl.constexpr,
):
    for start in range(first, last, COLUMNS):
        key = start + tl.arange(0, COLUMNS)
        k = _load_tile(k_ptr, k_t, start, Tk, D, COLUMNS, BLOCK_D, DIAGONAL)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        k_doc = key
        if doc_ptr is not None:
            k_doc = tl.load(doc_ptr + key, mask=key < Tk, other=0)
        p = _visible(
            tl.exp2(scores * scale - lse[:, None]),
            0.0,
            position[:, None],
            key[None, :],
            q_doc[:, None],
            k_doc[None, :],
            DIAGONAL,
            doc_ptr is not None,
        )
        v = _load_tile(v_ptr, v_t, start, Tk, D, COLUMNS, BLOCK_D, DIAGONAL)
        dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        if DROPPING:
            dp = tl.where(_keep(seed, head, position, start, threshold, ROWS, COLUMNS), dp * keep_scale, 0.0)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=["seed_ptr"])
def _backward_queries(
    dq_ptr,  # (B, Tq, H, D)
    delta_ptr,  # (B, H, Tq) float32, written for `_backward_keys`
    dout_ptr,  # (B, Tq, H, D)
    out_ptr,  # (B, Tq, H, D)
    lse_ptr,  # (B, H, Tq) float32
    q_ptr,
    k_ptr,
    v_ptr,
    seed_ptr,
    doc_ptr,
    dout_b,
    dout_t,
    dout_h,
    q_b,
    q_t,
    q_h,
    k_b,
    k_t,
    k_h,
    v_b,
    v_t,
    v_h,
    heads,  # B * H
    H,
    Tq,
    Tk,
    scale,  # times log2(e)
    dq_scale,  # the scale itself
    threshold,
    keep_scale,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    head = tl.program_id(0) % heads
    first_q = (tl.num_programs(0) // heads - 1 - tl.program_id(0) // heads) * ROWS
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    before = Tk - Tq + first_q
    position = before + tl.arange(0, ROWS)
    row = first_q + tl.arange(0, ROWS)
    at = head.to(tl.int64) * Tq + row
    dout = _load_tile(dout_ptr + b * dout_b + h * dout_h, dout_t, first_q, Tq, D, ROWS, BLOCK_D, True)
    out = _load_tile(out_ptr + (b * Tq * H + h) * D, H * D, first_q, Tq, D, ROWS, BLOCK_D, True)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), axis=1)
    tl.store(delta_ptr + at, delta, mask=row < Tq)
    lse = tl.load(lse_ptr + at, mask=row < Tq, other=float("inf"))  # weight 0 past the last query
    q = _load_tile(q_ptr + b * q_b + h * q_h, q_t, first_q, Tq, D, ROWS, BLOCK_D, True)
    k_ptr += b * k_b + h // GROUP * k_h
    v_ptr += b * v_b + h // GROUP * v_h
    q_doc = position
    if doc_ptr is not None:
        doc_ptr += b * Tk
        q_doc = tl.load(doc_ptr + position, mask=position < Tk, other=0)
    seed = tl.load(seed_ptr) if seed_ptr is not None else 0
    dq = tl.zeros([ROWS, BLOCK_D], tl.float32)
    diagonal = (before + 1) // COLUMNS * COLUMNS
    last = tl.minimum(before + ROWS, Tk)
    for DIAGONAL in tl.static_range(1, -1, -1):
        dq = _accumulate_dq(
            dq,
            q,
            dout,
            lse,
            delta,
            k_ptr,
            v_ptr,
            k_t,
            v_t,
            diagonal if DIAGONAL else 0,
            last if DIAGONAL else diagonal,
            doc_ptr,
            q_doc,
            position,
            Tk,
            scale,
            seed,
            head,
            threshold,
            keep_scale,
            D,
            BLOCK_D,
            PRECISION,
            ROWS,
            COLUMNS,
            DIAGONAL,
            seed_ptr is not None,
        )
    _store_tile(dq_ptr + (b * Tq * H + h) * D, H * D, first_q, Tq, dq * dq_scale, D, ROWS, BLOCK_D)


@triton.jit
def _accumulate_dk_dv(
    dk,
    dv,
    k,
    v,
    q_ptr,
    dout_ptr,
    lse_ptr,
    delta_ptr,
    q_t,
    dout_t,
    first,
    last,
    doc_ptr,
    k_doc,
    key,
    first_key,
    Tq,
    Tk,
    scale,
    seed,
    head,
    threshold,
    keep_scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DIAGONAL: tl.constexpr,
    DROPPING: tl.constexpr,
):
    """Tiles lie transposed, (COLUMNS, ROWS): then P and dS are the left factors of dv and dk as they are."""
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        position = Tk - Tq + row
        q = _load_tile(q_ptr, q_t, start, Tq, D, ROWS, BLOCK_D, True)
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        lse = tl.load(lse_ptr + row, mask=row < Tq, other=float("inf"))
        q_doc = row
        if doc_ptr is not None:
            q_doc = tl.load(doc_ptr + position, mask=row < Tq, other=0)
        p = _visible(
            tl.exp2(scores * scale - lse[None, :]),
            0.0,
            position[None, :],
            key[:, None],
            q_doc[None, :],
            k_doc[:, None],
            DIAGONAL,
            doc_ptr is not None,
        )
        dout = _load_tile(dout_ptr, dout_t, start, Tq, D, ROWS, BLOCK_D, True)
        dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
        dropped = p
        if DROPPING:
            keep = tl.trans(_keep(seed, head, position, first_key, threshold, ROWS, COLUMNS))
            dropped = tl.where(keep, p, 0.0)
            dp = tl.where(keep, dp * keep_scale, 0.0)
        dv = tl.dot(dropped.to(dout.dtype), dout, dv, input_precision=PRECISION)
        delta = tl.load(delta_ptr + row, mask=row < Tq, other=0.0)
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=["seed_ptr"])
def _backward_keys(
    dk_ptr,  # (B, Tk, H, D): what each query head adds
    dv_ptr,  # (B, Tk, H, D)
    dout_ptr,  # (B, Tq, H, D)
    lse_ptr,  # (B, H, Tq) float32
    delta_ptr,  # (B, H, Tq) float32
    q_ptr,
    k_ptr,
    v_ptr,
    seed_ptr,
    doc_ptr,
    dout_b,
    dout_t,
    dout_h,
    q_b,
    q_t,
    q_h,
    k_b,
    k_t,
    k_h,
    v_b,
    v_t,
    v_h,
    heads,  # B * H
    H,
    Tq,
    Tk,
    scale,  # times log2(e)
    dk_scale,  # the scale itself
    threshold,
    keep_scale,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    head = tl.program_id(0) % heads
    first_key = tl.program_id(0) // heads * COLUMNS  # the keys that most rows see first
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    key = first_key + tl.arange(0, COLUMNS)
    k = _load_tile(k_ptr + b * k_b + h // GROUP * k_h, k_t, first_key, Tk, D, COLUMNS, BLOCK_D, True)
    v = _load_tile(v_ptr + b * v_b + h // GROUP * v_h, v_t, first_key, Tk, D, COLUMNS, BLOCK_D, True)
    q_ptr += b * q_b + h * q_h
    dout_ptr += b * dout_b + h * dout_h
    lse_ptr += head.to(tl.int64) * Tq
    delta_ptr += head.to(tl.int64) * Tq
    k_doc = key
    if doc_ptr is not None:
        doc_ptr += b * Tk
        k_doc = tl.load(doc_ptr + key, mask=key < Tk, other=0)
    seed = tl.load(seed_ptr) if seed_ptr is not None else 0
    dk = tl.zeros([COLUMNS, BLOCK_D], tl.float32)
    dv = tl.zeros([COLUMNS, BLOCK_D], tl.float32)
    own_row = first_key - (Tk - Tq)  # the query at the first key's position; before the first one, negative
    first = tl.maximum(own_row, 0) // ROWS * ROWS
    below = tl.cdiv(tl.maximum(own_row + COLUMNS - 1, 0), ROWS) * ROWS  # from here on rows see every key of the tile
    for DIAGONAL in tl.static_range(1, -1, -1):
        dk, dv = _accumulate_dk_dv(
            dk,
            dv,
            k,
            v,
            q_ptr,
            dout_ptr,
            lse_ptr,
            delta_ptr,
            q_t,
            dout_t,
            first if DIAGONAL else below,
            tl.minimum(below, Tq) if DIAGONAL else Tq,
            doc_ptr,
            k_doc,
            key,
            first_key,
            Tq,
            Tk,
            scale,
            seed,
            head,
            threshold,
            keep_scale,
            D,
            BLOCK_D,
            PRECISION,
            ROWS,
            COLUMNS,
            DIAGONAL,
            seed_ptr is not None,
        )
    _store_tile(dk_ptr + (b * Tk * H + h) * D, H * D, first_key, Tk, dk * dk_scale, D, COLUMNS, BLOCK_D)
    _store_tile(dv_ptr + (b * Tk * H + h) * D, H * D, first_key, Tk, dv * keep_scale, D, COLUMNS, BLOCK_D)


def forward_launch(
    out: torch.Tensor,
    lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seed: torch.Tensor | None,
    doc_ids: torch.Tensor | None,
    dropout_p: float,
    scale: float,
    tuning: Tuning,
) -> Launch:
    (B, Tq, H, D), Tk = q.shape, k.shape[1]
    name = "attention_forward" + _suffix(seed)
    row = tuning.row(name, D)
    return Launch(
        name,
        _forward,
        (B * H * tiles(Tq, row.rows),),
        (
            *(out, lse, q, k, v, seed, doc_ids),
            *(q.stride()[:3] + k.stride()[:3] + v.stride()[:3]),
            *(B * H, H, Tq, Tk, scale * LOG2_E, round(dropout_p * 65536), 1.0 / (1.0 - dropout_p)),
        ),
        _constants(q, k, tuning) | row.constants(),
    )


def backward_launches(
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    delta: torch.Tensor,
    dout: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seed: torch.Tensor | None,
    doc_ids: torch.Tensor | None,
    dropout_p: float,
    scale: float,
    tuning: Tuning,
) -> list[Launch]:
    """The launches of a backward pass in their order.

    Args:
        dk, dv: (B, Tk, H, D), so one for each query head, which the caller adds up over the heads that share a key.
        delta: (B, H, Tq) float32; the first launch fills it for the second.
    """
    (B, Tq, H, D), Tk = q.shape, k.shape[1]
    inputs = (
        *(q, k, v, seed, doc_ids),
        *(dout.stride()[:3] + q.stride()[:3] + k.stride()[:3] + v.stride()[:3]),
        *(B * H, H, Tq, Tk, scale * LOG2_E, scale, round(dropout_p * 65536), 1.0 / (1.0 - dropout_p)),
    )
    constants = _constants(q, k, tuning)
    names = [f"attention_backward_{part}{_suffix(seed)}" for part in ("queries", "keys")]
    queries, keys = (tuning.row(name, D) for name in names)
    return [
        Launch(
            names[0],
            _backward_queries,
            (B * H * tiles(Tq, queries.rows),),
            (dq, delta, dout, out, lse, *inputs),
            constants | queries.constants(),
        ),
        Launch(
            names[1],
            _backward_keys,
            (B * H * tiles(Tk, keys.columns),),
            (dk, dv, dout, lse, delta, *inputs),
            constants | keys.constants(),
        ),
    ]


def _suffix(seed: torch.Tensor | None) -> str:
    """Of the rows in the launch table: with dropout a tile needs more registers, and has rows of its own."""
    return "" if seed is None else "_dropout"


def _constants(q: torch.Tensor, k: torch.Tensor, tuning: Tuning) -> dict[str, object]:
    D = q.shape[-1]
    block = max(16, 1 << (D - 1).bit_length())  # tensor cores multiply 16 or more
    precision = "tf32" if tuning.kind == "tf32" else "ieee"
    return {"GROUP": q.shape[2] // max(k.shape[2], 1), "D": D, "BLOCK_D": block, "PRECISION": precision}


@torch.library.custom_op("fastgpt::attention_forward", mutates_args=())
def _attention_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seed: torch.Tensor | None,
    doc_ids: torch.Tensor | None,
    dropout_p: float,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, base-2 log-sum-exp of the scaled scores (B, H, Tq) in float32)."""
    out, lse = outputs = _attention_forward_shapes(q, k, v, seed, doc_ids, dropout_p, scale)
    if q.numel():
        q, k, v = (_addressable(t) for t in (q, k, v))
        doc_ids = None if doc_ids is None else doc_ids.contiguous()
        forward_launch(out, lse, q, k, v, seed, doc_ids, dropout_p, scale, matmul_tuning(q.device, q.dtype))()
    return outputs


@_attention_forward.register_fake
def _attention_forward_shapes(q, k, v, seed, doc_ids, dropout_p, scale):
    B, Tq, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(B, H, Tq, dtype=torch.float32)


@torch.library.custom_op("fastgpt::attention_backward", mutates_args=())
def _attention_backward(
    dout: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seed: torch.Tensor | None,
    doc_ids: torch.Tensor | None,
    dropout_p: float,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv), contiguous."""
    dq, dk, dv = gradients = _attention_backward_shapes(dout, out, lse, q, k, v, seed, doc_ids, dropout_p, scale)
    if q.numel() == 0:
        dk.zero_()
        dv.zero_()
        return gradients
    q, k, v, dout = (_addressable(t) for t in (q, k, v, dout))
    doc_ids = None if doc_ids is None else doc_ids.contiguous()
    (_, _, H, D), (B, Tk, Hkv, _) = q.shape, k.shape
    grouped = Hkv != H
    by_head = (B, Tk, H, D)  # in float32, because these are added up
    dks, dvs = (q.new_empty(by_head, dtype=torch.float32) if grouped else t for t in (dk, dv))
    delta, out = torch.empty_like(lse), out.contiguous()
    rows = matmul_tuning(q.device, q.dtype)
    for launch in backward_launches(
        dq, dks, dvs, delta, dout, out, lse, q, k, v, seed, doc_ids, dropout_p, scale, rows
    ):
        launch()
    if grouped:
        dk.copy_(dks.unflatten(2, (Hkv, -1)).sum(3))
        dv.copy_(dvs.unflatten(2, (Hkv, -1)).sum(3))
    return gradients


@_attention_backward.register_fake
def _attention_backward_shapes(dout, out, lse, q, k, v, seed, doc_ids, dropout_p, scale):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _addressable(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy where its columns lie apart, or its rows so far that a tile of them passes 2**31 elements."""
    return x if x.stride(-1) == 1 and x.stride(1) < 2**31 // 128 else x.contiguous()


def _save(ctx, inputs, output):
    q, k, v, seed, doc_ids, ctx.dropout_p, ctx.scale = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, seed, doc_ids, out, lse)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def _backward_of_attention(ctx, dout, _dlse):
    q, k, v, seed, doc_ids, out, lse = ctx.saved_tensors
    gradients = torch.ops.fastgpt.attention_backward(dout, out, lse, q, k, v, seed, doc_ids, ctx.dropout_p, ctx.scale)
    return *gradients, None, None, None, None


_attention_forward.register_autograd(_backward_of_attention, setup_context=_save)


def causal_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    scale: float | None = None,
    doc_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention, aligned at the end, as `reference.causal_attention`, in memory linear in T.

    Args:
        q: (B, Tq, H, D), with Tq <= Tk and D <= 256; a view will do, if its last dimension is contiguous.
        k, v: (B, Tk, Hkv, D), H a multiple of Hkv.
        dropout_p, seed: drop attention weights by `dropout.dropout_mask`; the seed is an int64 scalar tensor on q's
            device, and is not read on the host.
        scale: of the scores; default D ** -0.5.
        doc_ids: integer (B, Tk); a query sees only keys of its own document.

    Returns:
        (B, Tq, H, D), contiguous, in q's dtype, or in autocast's where that is on. Gradients are the same in every run.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, named with what was expected.
    """
    check_tensors("causal_attention", {"q": 4, "k": 4, "v": 4}, q=q, k=k, v=v)
    if (dtype := autocast_dtype(q.device)) is not None:
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    _check(q, k, v, dropout_p, seed, doc_ids)
    if scale is None:
        scale = 1.0 / math.sqrt(q.shape[-1])
    if scale <= 0:  # the kernels take the largest score before they scale it
        q, scale = (-q, -scale) if scale < 0 else (q * 0.0, 1.0)
    if dropout_p == 0.0:
        seed = None
    return torch.ops.fastgpt.attention_forward(q, k, v, seed, doc_ids, dropout_p, scale)[0]


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float,
    seed: torch.Tensor | None,
    doc_ids: torch.Tensor | None,
) -> None:
    op = "causal_attention"
    (B, Tq, H, D), (_, Tk, Hkv, _) = q.shape, k.shape
    for name, t in (("k", k), ("v", v)):
        if t.dtype != q.dtype:
            raise ValueError(f"{op}: {name} {tuple(t.shape)} is {t.dtype}; expected {q.dtype}, as q")
        if t.shape != (B, Tk, Hkv, D):
            expected = f"({B}, Tk, Hkv, {D}), as q {tuple(q.shape)}" if name == "k" else f"{tuple(k.shape)}, as k"
            raise ValueError(f"{op}: {name} has shape {tuple(t.shape)}; expected {expected}")
    if not 1 <= D <= WIDEST_HEAD:
        raise ValueError(f"{op}: q has shape {tuple(q.shape)}; expected a head size of 1 to {WIDEST_HEAD}")
    if Tq > Tk:
        raise ValueError(f"{op}: q has shape {tuple(q.shape)}; expected at most k's {Tk} positions")
    if (H % Hkv if Hkv else H) != 0:
        raise ValueError(f"{op}: q has {H} heads {tuple(q.shape)}; expected a multiple of k's {Hkv}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"{op}: dropout_p is {dropout_p}; expected at least 0 and less than 1")
    if dropout_p > 0 and seed is None:
        raise ValueError(f"{op}: dropout_p={dropout_p} needs a seed, an int64 scalar tensor")
    if seed is not None and (seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != q.device):
        raise ValueError(
            f"{op}: seed {tuple(seed.shape)} is {seed.dtype} on {seed.device}; expected an int64 scalar on {q.device}"
        )
    if doc_ids is None:
        return
    if doc_ids.shape != (B, Tk) or doc_ids.device != q.device:
        raise ValueError(
            f"{op}: doc_ids has shape {tuple(doc_ids.shape)} on {doc_ids.device}; expected ({B}, {Tk}) on {q.device}"
        )
    if doc_ids.is_floating_point() or doc_ids.is_complex() or doc_ids.dtype == torch.bool:
        raise ValueError(f"{op}: doc_ids {tuple(doc_ids.shape)} is {doc_ids.dtype}; expected an integer dtype")
