"""The backward pass of causal attention: the gradients of q, k and v, without the (Tq, Tk) weights in memory.

From the forward pass come out and lse, log2 of each row's sum of exp(S). Two kernels recompute the weights tile by
tile, so that no sum crosses programs (Dao, 2023, "FlashAttention-2", algorithm 2). In the first, a program owns a tile
of queries and loops over the keys; in the second, it owns a tile of keys and loops over the queries. With
P = 2^(S * log2(e) - lse) and M = keep / (1 - dropout_p):

    delta = sum(dout * out)      dP = (dout v^T) * M      dS = P * (dP - delta)
    dv = (P * M)^T dout          dk = scale * dS^T q      dq = scale * dS k

Accumulators, lse and delta are float32; P and dS are rounded to the inputs' dtype before they are multiplied. Memory
beyond the gradients: delta, 4 bytes a query row. Where several query heads share a key head, each query head also has
its own dk and dv in float32, and these are added up at the end.

Twin: the gradients that autograd derives from `reference.causal_attention`. Offered here, for `attention`: the
operation fastgpt::attention_backward.
"""

import torch
import triton
import triton.language as tl

from fastgpt_kernels.attention_tiles import (
    COUNTS,
    LOG2_E,
    addressable,
    at_head,
    constants,
    keep,
    load_documents,
    load_tile,
    query_tile,
    row_name,
    store_tile,
    visible,
)
from fastgpt_kernels.launch import Launch, Tuning, matmul_tuning, tiles


@triton.jit
def _accumulate_dq(
    dq, q, dout, lse, delta, k_ptr, v_ptr, k_t, v_t, first, last, doc_ptr, q_doc, position, Tk,
    scale, seed, head, threshold, keep_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DIAGONAL: tl.constexpr, DROPPING: tl.constexpr,
):  # fmt: skip
    """dq with what the keys first .. last add, before it is scaled."""
    for start in range(first, last, COLUMNS):
        key = start + tl.arange(0, COLUMNS)
        k = load_tile(k_ptr, k_t, start, Tk, D, COLUMNS, BLOCK_D, DIAGONAL)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        k_doc = load_documents(doc_ptr, key, key < Tk)
        p = tl.exp2(scores * scale - lse[:, None])
        p = visible(
            p, 0.0, position[:, None], key[None, :], q_doc[:, None], k_doc[None, :], DIAGONAL, doc_ptr is not None
        )
        v = load_tile(v_ptr, v_t, start, Tk, D, COLUMNS, BLOCK_D, DIAGONAL)
        dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        if DROPPING:
            dp = tl.where(keep(seed, head, position, start, threshold, ROWS, COLUMNS), dp * keep_scale, 0.0)
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
    q_ptr,  # (B, Tq, H, D)
    k_ptr, v_ptr,  # (B, Tk, Hkv, D)
    seed_ptr,  # int64 scalar, or None
    doc_ptr,  # (B, Tk), or None
    dout_strides, q_strides, k_strides, v_strides,
    heads, H, Tq, Tk,  # heads: B * H
    scale, dq_scale, threshold, keep_scale,  # scale: dq_scale times log2(e)
    GROUP: tl.constexpr,  # H / Hkv
    D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    head, b, h, first_q = query_tile(heads, H, ROWS)
    before = Tk - Tq + first_q  # the first row's position
    position = before + tl.arange(0, ROWS)
    row = first_q + tl.arange(0, ROWS)
    at = head.to(tl.int64) * Tq + row
    dout = load_tile(at_head(dout_ptr, dout_strides, b, h), dout_strides[1], first_q, Tq, D, ROWS, BLOCK_D, True)
    out = load_tile(out_ptr + (b * Tq * H + h) * D, H * D, first_q, Tq, D, ROWS, BLOCK_D, True)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), axis=1)
    tl.store(delta_ptr + at, delta, mask=row < Tq)
    lse = tl.load(lse_ptr + at, mask=row < Tq, other=float("inf"))  # weight 0 past the last query
    q = load_tile(at_head(q_ptr, q_strides, b, h), q_strides[1], first_q, Tq, D, ROWS, BLOCK_D, True)
    k_ptr = at_head(k_ptr, k_strides, b, h // GROUP)
    v_ptr = at_head(v_ptr, v_strides, b, h // GROUP)
    if doc_ptr is not None:
        doc_ptr += b * Tk
    q_doc = load_documents(doc_ptr, position, position < Tk)
    seed = tl.load(seed_ptr) if seed_ptr is not None else 0
    dq = tl.zeros([ROWS, BLOCK_D], tl.float32)
    diagonal = (before + 1) // COLUMNS * COLUMNS  # every row of the tile sees every key before this one
    last = tl.minimum(before + ROWS, Tk)
    for DIAGONAL in tl.static_range(1, -1, -1):
        dq = _accumulate_dq(
            dq, q, dout, lse, delta, k_ptr, v_ptr, k_strides[1], v_strides[1],
            diagonal if DIAGONAL else 0, last if DIAGONAL else diagonal, doc_ptr, q_doc, position, Tk,
            scale, seed, head, threshold, keep_scale,
            D, BLOCK_D, PRECISION, ROWS, COLUMNS, DIAGONAL, seed_ptr is not None,
        )  # fmt: skip
    store_tile(dq_ptr, b, h, H, first_q, Tq, dq * dq_scale, D, ROWS, BLOCK_D)


@triton.jit
def _accumulate_dk_dv(
    dk, dv, k, v, q_ptr, dout_ptr, lse_ptr, delta_ptr, q_t, dout_t, first, last, doc_ptr, k_doc, key, first_key, Tq, Tk,
    scale, seed, head, threshold, keep_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DIAGONAL: tl.constexpr, DROPPING: tl.constexpr,
):  # fmt: skip
    """dk and dv with what the queries first .. last add, before they are scaled.

    Tiles are transposed, (COLUMNS, ROWS), so that P and dS are the left factors of dv and dk as they are.
    """
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        position = Tk - Tq + row
        q = load_tile(q_ptr, q_t, start, Tq, D, ROWS, BLOCK_D, True)
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        lse = tl.load(lse_ptr + row, mask=row < Tq, other=float("inf"))
        q_doc = load_documents(doc_ptr, position, row < Tq)
        p = tl.exp2(scores * scale - lse[None, :])
        p = visible(
            p, 0.0, position[None, :], key[:, None], q_doc[None, :], k_doc[:, None], DIAGONAL, doc_ptr is not None
        )
        dout = load_tile(dout_ptr, dout_t, start, Tq, D, ROWS, BLOCK_D, True)
        dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
        dropped = p
        if DROPPING:
            kept = tl.trans(keep(seed, head, position, first_key, threshold, ROWS, COLUMNS))
            dropped = tl.where(kept, p, 0.0)
            dp = tl.where(kept, dp * keep_scale, 0.0)
        dv = tl.dot(dropped.to(dout.dtype), dout, dv, input_precision=PRECISION)
        delta = tl.load(delta_ptr + row, mask=row < Tq, other=0.0)
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=["seed_ptr"])
def _backward_keys(
    dk_ptr, dv_ptr,  # (B, Tk, H, D): what each query head adds
    dout_ptr,  # (B, Tq, H, D)
    lse_ptr, delta_ptr,  # (B, H, Tq) float32
    q_ptr,  # (B, Tq, H, D)
    k_ptr, v_ptr,  # (B, Tk, Hkv, D)
    seed_ptr,  # int64 scalar, or None
    doc_ptr,  # (B, Tk), or None
    dout_strides, q_strides, k_strides, v_strides,
    heads, H, Tq, Tk,  # heads: B * H
    scale, dk_scale, threshold, keep_scale,  # scale: dk_scale times log2(e)
    GROUP: tl.constexpr,  # H / Hkv
    D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % heads
    first_key = tl.program_id(0) // heads * COLUMNS  # the keys that most rows see first
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    key = first_key + tl.arange(0, COLUMNS)
    k = load_tile(at_head(k_ptr, k_strides, b, h // GROUP), k_strides[1], first_key, Tk, D, COLUMNS, BLOCK_D, True)
    v = load_tile(at_head(v_ptr, v_strides, b, h // GROUP), v_strides[1], first_key, Tk, D, COLUMNS, BLOCK_D, True)
    q_ptr = at_head(q_ptr, q_strides, b, h)
    dout_ptr = at_head(dout_ptr, dout_strides, b, h)
    lse_ptr += head.to(tl.int64) * Tq
    delta_ptr += head.to(tl.int64) * Tq
    if doc_ptr is not None:
        doc_ptr += b * Tk
    k_doc = load_documents(doc_ptr, key, key < Tk)
    seed = tl.load(seed_ptr) if seed_ptr is not None else 0
    dk = tl.zeros([COLUMNS, BLOCK_D], tl.float32)
    dv = tl.zeros([COLUMNS, BLOCK_D], tl.float32)
    own_row = first_key - (Tk - Tq)  # the query at the first key's position; before the first one, negative
    first = tl.maximum(own_row, 0) // ROWS * ROWS
    below = tl.cdiv(tl.maximum(own_row + COLUMNS - 1, 0), ROWS) * ROWS  # from here on rows see every key of the tile
    for DIAGONAL in tl.static_range(1, -1, -1):
        dk, dv = _accumulate_dk_dv(
            dk, dv, k, v, q_ptr, dout_ptr, lse_ptr, delta_ptr, q_strides[1], dout_strides[1],
            first if DIAGONAL else below, tl.minimum(below, Tq) if DIAGONAL else Tq,
            doc_ptr, k_doc, key, first_key, Tq, Tk, scale, seed, head, threshold, keep_scale,
            D, BLOCK_D, PRECISION, ROWS, COLUMNS, DIAGONAL, seed_ptr is not None,
        )  # fmt: skip
    store_tile(dk_ptr, b, h, H, first_key, Tk, dk * dk_scale, D, COLUMNS, BLOCK_D)
    store_tile(dv_ptr, b, h, H, first_key, Tk, dv * keep_scale, D, COLUMNS, BLOCK_D)


def backward_launches(
    dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, delta: torch.Tensor,
    dout: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    seed: torch.Tensor | None, doc_ids: torch.Tensor | None, dropout_p: float, scale: float, tuning: Tuning,
) -> list[Launch]:  # fmt: skip
    """The launches of a backward pass in their order.

    Args:
        dk, dv: (B, Tk, H, D), so one for each query head, which the caller adds up over the heads that share a key.
        delta: (B, H, Tq) float32; the first launch fills it for the second.
    """
    (B, Tq, H, D), Tk = q.shape, k.shape[1]
    inputs = (
        *(q, k, v, seed, doc_ids),
        *(dout.stride()[:3], q.stride()[:3], k.stride()[:3], v.stride()[:3]),
        *(B * H, H, Tq, Tk, scale * LOG2_E, scale, round(dropout_p * 65536), 1.0 / (1.0 - dropout_p)),
    )
    shared = constants(q, k, tuning)
    name = row_name("attention_backward_queries", seed)
    row = tuning.row(name, D)
    grid = (B * H * tiles(Tq, row.rows),)
    queries = Launch(name, _backward_queries, grid, (dq, delta, dout, out, lse, *inputs), shared | row.constants())
    name = row_name("attention_backward_keys", seed)
    row = tuning.row(name, D)
    grid = (B * H * tiles(Tk, row.columns),)
    keys = Launch(name, _backward_keys, grid, (dk, dv, dout, lse, delta, *inputs), shared | row.constants())
    return [queries, keys]


@torch.library.custom_op("fastgpt::attention_backward", mutates_args=())
def _attention_backward(
    dout: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    seed: torch.Tensor | None, doc_ids: torch.Tensor | None, dropout_p: float, scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """(dq, dk, dv), contiguous."""
    dq, dk, dv = gradients = _attention_backward_shapes(dout, out, lse, q, k, v, seed, doc_ids, dropout_p, scale)
    if q.numel() == 0:
        dk.zero_()
        dv.zero_()
        return gradients
    q, k, v, dout = (addressable(t) for t in (q, k, v, dout))
    doc_ids = None if doc_ids is None else doc_ids.contiguous()
    (_, _, H, D), (B, Tk, Hkv, _) = q.shape, k.shape
    grouped = Hkv != H
    by_head = (B, Tk, H, D)  # in float32, because these are added up
    dks, dvs = (q.new_empty(by_head, dtype=torch.float32) if grouped else t for t in (dk, dv))
    delta, out = torch.empty_like(lse), out.contiguous()
    tuning = matmul_tuning(q.device, q.dtype)
    for launch in backward_launches(
        dq, dks, dvs, delta, dout, out, lse, q, k, v, seed, doc_ids, dropout_p, scale, tuning
    ):
        launch()
    if grouped:
        dk.copy_(dks.unflatten(2, (Hkv, -1)).sum(3))
        dv.copy_(dvs.unflatten(2, (Hkv, -1)).sum(3))
    return gradients


@_attention_backward.register_fake
def _attention_backward_shapes(dout, out, lse, q, k, v, seed, doc_ids, dropout_p, scale):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
