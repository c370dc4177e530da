"""Causal attention that never holds the (Tq, Tk) weights in memory, with dropout inside.

Forward, in tiles of queries by keys with a running maximum (Dao, 2023, "FlashAttention-2", algorithm 1), for query i
at position p = Tk - Tq + i, over the keys j <= p of its document:

    S = scale * q k^T      P = softmax(S)      out = (P * keep / (1 - dropout_p)) v      lse = log2 of sum of exp(S)

The backward pass is in `attention_backward`, with its formulas; both passes share `attention_tiles`.

The kernels multiply scores by log2(e), so that exponentials and lse have base 2. Accumulators and statistics are
float32; P is rounded to the inputs' dtype before it is multiplied. q, k and v may be any views whose last dimension is
contiguous, such as slices of a packed projection. Memory beyond the output: lse, 4 bytes a query row.

Twin: `reference.causal_attention`. Dropout equals `dropout.dropout_mask` bit for bit. Offered here: `causal_attention`.
"""

import math

import torch
import triton
import triton.language as tl

from fastgpt_kernels import attention_backward  # noqa: F401 - it registers its operation
from fastgpt_kernels.attention_tiles import (
    COUNTS,
    LOG2_E,
    WIDEST_HEAD,
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
from fastgpt_kernels.launch import Launch, Tuning, autocast_dtype, check_tensors, matmul_tuning, tiles

# One compilation of the forward pass serves every length, because strides alone make loads wide. Training seldom
# changes its lengths, so the backward pass is specialized on them: masking lse then takes 10 registers less.
LENGTHS = ("Tq", "Tk")


@triton.jit
def _attend(
    acc, total, top, q, k_ptr, v_ptr, k_t, v_t, first, last, doc_ptr, q_doc, position, Tk,
    scale, seed, head, threshold,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DIAGONAL: tl.constexpr, DROPPING: tl.constexpr,
):  # fmt: skip
    """Attend to the keys first .. last: the sums so far of weighted values and of weights, and the running maximum."""
    for start in range(first, last, COLUMNS):
        key = start + tl.arange(0, COLUMNS)
        k = load_tile(k_ptr, k_t, start, Tk, D, COLUMNS, BLOCK_D, DIAGONAL)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        k_doc = load_documents(doc_ptr, key, key < Tk)
        scores = visible(
            scores, float("-inf"), position[:, None], key[None, :], q_doc[:, None], k_doc[None, :],
            DIAGONAL, doc_ptr is not None,
        )  # fmt: skip
        new_top = tl.maximum(top, tl.max(scores, axis=1) * scale)
        p = tl.exp2(scores * scale - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, axis=1)  # undropped, as the softmax comes before the dropout
        acc = acc * shrink[:, None]
        if DROPPING:
            p = tl.where(keep(seed, head, position, start, threshold, ROWS, COLUMNS), p, 0.0)
        v = load_tile(v_ptr, v_t, start, Tk, D, COLUMNS, BLOCK_D, DIAGONAL)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
        top = new_top
    return acc, total, top


@triton.jit(do_not_specialize=COUNTS + LENGTHS, do_not_specialize_on_alignment=["seed_ptr"])
def _forward(
    out_ptr,  # (B, Tq, H, D)
    lse_ptr,  # (B, H, Tq) float32
    q_ptr,  # (B, Tq, H, D)
    k_ptr, v_ptr,  # (B, Tk, Hkv, D)
    seed_ptr,  # int64 scalar, or None
    doc_ptr,  # (B, Tk), or None
    q_strides, k_strides, v_strides,
    heads, H, Tq, Tk,  # heads: B * H
    scale, threshold, keep_scale,  # scale: times log2(e); keep_scale: 1 / (1 - dropout_p)
    GROUP: tl.constexpr,  # H / Hkv
    D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    head, b, h, first_q = query_tile(heads, H, ROWS)
    before = Tk - Tq + first_q  # the first row's position
    position = before + tl.arange(0, ROWS)
    q = load_tile(at_head(q_ptr, q_strides, b, h), q_strides[1], first_q, Tq, D, ROWS, BLOCK_D, True)
    k_ptr = at_head(k_ptr, k_strides, b, h // GROUP)
    v_ptr = at_head(v_ptr, v_strides, b, h // GROUP)
    if doc_ptr is not None:
        doc_ptr += b * Tk
    q_doc = load_documents(doc_ptr, position, position < Tk)
    seed = tl.load(seed_ptr) if seed_ptr is not None else 0
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    top = tl.full([ROWS], -1e30, tl.float32)  # finite, so that a tile without a visible key gives 0 and not NaN
    diagonal = (before + 1) // COLUMNS * COLUMNS  # every row of the tile sees every key before this one
    last = tl.minimum(before + ROWS, Tk)
    for DIAGONAL in tl.static_range(1, -1, -1):
        acc, total, top = _attend(
            acc, total, top, q, k_ptr, v_ptr, k_strides[1], v_strides[1],
            diagonal if DIAGONAL else 0, last if DIAGONAL else diagonal, doc_ptr, q_doc, position, Tk,
            scale, seed, head, threshold,
            D, BLOCK_D, PRECISION, ROWS, COLUMNS, DIAGONAL, seed_ptr is not None,
        )  # fmt: skip
    row = first_q + tl.arange(0, ROWS)
    tl.store(lse_ptr + head.to(tl.int64) * Tq + row, top + tl.log2(total), mask=row < Tq)
    out = acc * (keep_scale / total)[:, None]
    store_tile(out_ptr, b, h, H, first_q, Tq, out, D, ROWS, BLOCK_D)


def forward_launch(
    out: torch.Tensor, lse: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    seed: torch.Tensor | None, doc_ids: torch.Tensor | None, dropout_p: float, scale: float, tuning: Tuning,
) -> Launch:  # fmt: skip
    (B, Tq, H, D), Tk = q.shape, k.shape[1]
    name = row_name("attention_forward", seed)
    row = tuning.row(name, D)
    args = (
        *(out, lse, q, k, v, seed, doc_ids),
        *(q.stride()[:3], k.stride()[:3], v.stride()[:3]),
        *(B * H, H, Tq, Tk, scale * LOG2_E, round(dropout_p * 65536), 1.0 / (1.0 - dropout_p)),
    )
    return Launch(name, _forward, (B * H * tiles(Tq, row.rows),), args, constants(q, k, tuning) | row.constants())


@torch.library.custom_op("fastgpt::attention_forward", mutates_args=())
def _attention_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seed: torch.Tensor | None, doc_ids: torch.Tensor | None,
    dropout_p: float, scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(out, base-2 log-sum-exp of the scaled scores (B, H, Tq) in float32)."""
    out, lse = outputs = _attention_forward_shapes(q, k, v, seed, doc_ids, dropout_p, scale)
    if q.numel():
        q, k, v = (addressable(t) for t in (q, k, v))
        doc_ids = None if doc_ids is None else doc_ids.contiguous()
        forward_launch(out, lse, q, k, v, seed, doc_ids, dropout_p, scale, matmul_tuning(q.device, q.dtype))()
    return outputs


@_attention_forward.register_fake
def _attention_forward_shapes(q, k, v, seed, doc_ids, dropout_p, scale):
    B, Tq, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(B, H, Tq, dtype=torch.float32)


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
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    dropout_p: float, seed: torch.Tensor | None, doc_ids: torch.Tensor | None,
) -> None:  # fmt: skip
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
