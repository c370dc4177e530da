"""Causal attention by plain matrix products, which hold all weights: for dropout, and for training in 16 bits on a CPU.

    S = scale q k^T + mask        W = softmax(S)        out = dropout(W) v

Of 16-bit inputs S is float32, as in every fused kernel: rounded to bfloat16, a score of 40 is off by up to an eighth,
and its weight by as much relatively. W is rounded to 16 bits and is all that is kept for the backward pass, whose
products are in 16 bits; the softmax's own backward pass is in float32 between them.

Offered here: `attention_by_products`.
"""

import torch

from fastgpt_kernels.dropout import apply_dropout
from fastgpt_kernels.float32_product import product_dtype
from fastgpt_kernels.reference import visible

# Scores that are float32 at once on a CPU: they stay in the cache until they are weights.
SCORES = 1 << 20


def attention_by_products(
    q: torch.Tensor,  # (B, H, Tq, D)
    k: torch.Tensor,  # (B, H, Tk, D)
    v: torch.Tensor,
    dropout_p: float,
    seed: torch.Tensor | None,
    scale: float,
    doc_ids: torch.Tensor | None,
) -> torch.Tensor:
    """(B, H, Tq, D), in q's dtype or autocast's; arguments as of `reference.causal_attention`, with heads first.

    k and v have as many heads as q.
    """
    dtype = product_dtype(q)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    seen = visible(q.shape[2], k.shape[2], doc_ids, q.device)
    hidden = torch.zeros_like(seen, dtype=torch.promote_types(q.dtype, torch.float32)).masked_fill(~seen, -torch.inf)
    narrow = q.element_size() == 2
    weights = _Weights.apply(q, k, hidden, scale) if narrow else _weights(q, k, hidden, scale)
    weights = apply_dropout(weights, seed, dropout_p)
    return torch.bmm(weights.flatten(0, 1), v.flatten(0, 1)).unflatten(0, q.shape[:2])


def _weights(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    """softmax(scale q k^T + mask), (B, H, Tq, Tk), in mask's dtype: that of the inputs, or float32 for 16 bits.

    mask: (Tq, Tk), or (B, 1, Tq, Tk) by documents.
    """
    (B, H, Tq, _), Tk = q.shape, k.shape[2]
    mask = mask if mask.dim() == 2 else mask.expand(B, H, Tq, Tk).flatten(0, 1)
    q, k = q.flatten(0, 1), k.flatten(0, 1).mT
    if q.dtype == mask.dtype or q.device.type != "cuda":
        scores = torch.baddbmm(mask, q.to(mask.dtype), k.to(mask.dtype), alpha=scale)
    else:
        scores = torch.bmm(q, k, out_dtype=torch.float32).mul_(scale).add_(mask)
    return scores.softmax(-1).unflatten(0, (B, H))


class _Weights(torch.autograd.Function):
    """`_weights` of 16-bit inputs, in their dtype."""

    @staticmethod
    def forward(ctx, q, k, mask, scale):
        with torch.autocast(q.device.type, enabled=False):
            weights = _narrow_weights(q, k, mask, scale)
        ctx.save_for_backward(q, k, weights)
        ctx.scale = scale
        return weights

    @staticmethod
    def backward(ctx, *grads):
        q, k, weights = ctx.saved_tensors
        ds = torch.ops.aten._softmax_backward_data(grads[0], weights, -1, weights.dtype).flatten(0, 1)
        dq = torch.bmm(ds, k.flatten(0, 1)) * ctx.scale
        dk = torch.bmm(ds.mT, q.flatten(0, 1)) * ctx.scale
        return dq.view_as(q), dk.view_as(k), None, None


def _narrow_weights(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    (B, H, Tq, _), Tk = q.shape, k.shape[2]
    size = max(1, SCORES // max(1, H * Tq * Tk))  # sequences
    if size >= B or q.device.type != "cpu" or torch.compiler.is_compiling():
        return _weights(q, k, mask, scale).to(q.dtype)
    weights = q.new_empty(B, H, Tq, Tk)
    for start in range(0, B, size):
        part = slice(start, start + size)
        weights[part] = _weights(q[part], k[part], mask if mask.dim() == 2 else mask[part], scale)
    return weights
