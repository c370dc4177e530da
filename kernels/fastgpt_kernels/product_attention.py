"""Causal attention by plain matrix products, with all weights in memory, for dropout and for 16-bit training on a CPU.

    S = scale q k^T + mask        W = softmax(S)        out = dropout(W) v

For 16-bit inputs S is float32, as in every fused kernel. In bfloat16, a score of 40 would be off by up to an eighth,
and its weight by about an eighth of itself. W is rounded to 16 bits. The only (Tq, Tk) matrices that are kept for the
backward pass are W, the dropout mask and W after dropout. The backward pass multiplies in 16 bits; the softmax's own
backward pass, between the products, is in float32.

Offered here: `attention_by_products`.
"""

import math

import torch

from fastgpt_kernels.dropout import apply_dropout, weights_kept
from fastgpt_kernels.float32_product import product_dtype
from fastgpt_kernels.reference import visible
from fastgpt_kernels.torch_private import softmax_backward

# The most float32 scores at once on a CPU: so many stay in the cache until they have become weights.
SCORES = 1 << 20
# The most parts of a batch on a CPU: an estimate on fake tensors walks through each of them too.
PARTS = 64


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
    if q.element_size() == 2:
        keep = weights_kept((*q.shape[:3], k.shape[2]), seed, dropout_p)
        return _Narrow.apply(q, k, v, hidden, scale, keep, 1.0 / (1.0 - dropout_p))
    weights = apply_dropout(_weights(q, k, hidden, scale), seed, dropout_p)
    return torch.bmm(weights.flatten(0, 1), v.flatten(0, 1)).unflatten(0, q.shape[:2])


def _weights(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    """softmax(scale q k^T + mask), (B, H, Tq, Tk), in mask's dtype: the inputs' dtype, or float32 if that has 16 bits.

    mask: (Tq, Tk), or (B, 1, Tq, Tk) by documents.
    """
    (B, H, Tq, _), Tk = q.shape, k.shape[2]
    q, k = q.flatten(0, 1), k.flatten(0, 1).mT
    if q.dtype == mask.dtype or q.device.type != "cuda":
        mask = mask if mask.dim() == 2 else mask.expand(B, H, Tq, Tk).flatten(0, 1)
        scores = torch.baddbmm(mask, q.to(mask.dtype), k.to(mask.dtype), alpha=scale).unflatten(0, (B, H))
    else:
        scores = torch.bmm(q, k, out_dtype=torch.float32).mul_(scale).unflatten(0, (B, H)).add_(mask)
    return scores.softmax(-1)


class _Narrow(torch.autograd.Function):
    """Attention of 16-bit inputs, each product rounded once, after it is scaled.

    keep: bool (B, H, Tq, Tk), the weights that dropout leaves, or None; these are multiplied by keep_scale.
    """

    @staticmethod
    def forward(ctx, q, k, v, mask, scale, keep, keep_scale):
        with torch.autocast(q.device.type, enabled=False):
            weights = _narrow_weights(q, k, mask, scale)
            kept = weights if keep is None else weights * keep
            out = _product(kept, v, keep_scale)
        ctx.save_for_backward(q, k, v, weights, kept, keep)
        ctx.scale, ctx.keep_scale = scale, keep_scale
        return out

    @staticmethod
    def backward(ctx, *grads):
        q, k, v, weights, kept, keep = ctx.saved_tensors
        dv = _product(kept.mT, grads[0], ctx.keep_scale)
        dw = _product(grads[0], v.mT, 1.0)  # without keep_scale: dq and dk are scaled by it, and rounded once
        dw = dw if keep is None else dw.mul_(keep)
        ds = softmax_backward(dw, weights)
        scale = ctx.scale * ctx.keep_scale
        return _product(ds, k, scale), _product(ds.mT, q, scale), dv, None, None, None, None


def _product(a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """scale a b, (B, H, n, m) of (B, H, n, l) and (B, H, l, m), scaled before it is rounded."""
    a, b, shape = a.flatten(0, 1), b.flatten(0, 1), a.shape[:2]
    product = torch.bmm(a, b) if scale == 1.0 else torch.baddbmm(a.new_zeros(()), a, b, beta=0, alpha=scale)
    return product.unflatten(0, shape)


def _narrow_weights(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    (B, H, Tq, _), Tk = q.shape, k.shape[2]
    size = max(1, SCORES // max(1, H * Tq * Tk), math.ceil(B / PARTS))  # sequences
    if size >= B or q.device.type != "cpu" or torch.compiler.is_compiling():
        return _weights(q, k, mask, scale).to(q.dtype)
    weights = q.new_empty(B, H, Tq, Tk)
    for start in range(0, B, size):
        part = slice(start, start + size)
        weights[part] = _weights(q[part], k[part], mask if mask.dim() == 2 else mask[part], scale)
    return weights
