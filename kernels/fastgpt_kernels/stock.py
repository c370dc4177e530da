"""Every operation by PyTorch's own best path, with the signatures of `reference`, which documents them."""

import math

import torch
import torch.nn.functional as F

from fastgpt_kernels.dropout import apply_dropout
from fastgpt_kernels.reference import reduce, visible


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, eps: float = 1e-5
) -> torch.Tensor:
    return torch.layer_norm(x, weight.shape, weight, bias, eps)


def add_layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    eps: float = 1e-5,
) -> tuple[torch.Tensor, torch.Tensor]:
    total = x + residual
    return total, torch.layer_norm(total, weight.shape, weight, bias, eps)


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
    (_, Tq, H, D), (_, Tk, Hkv, _) = q.shape, k.shape
    scale = 1 / math.sqrt(D) if scale is None else scale
    if scale < 0:  # which would turn SDPA's mask of -inf into +inf
        q, scale = -q, -scale
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # each (B, heads, T, D)
    if dropout_p > 0 or _prefers_products(q, Tk):
        k, v = (t.repeat_interleave(H // Hkv, dim=1) if Hkv != H else t for t in (k, v))
        return _attention_by_products(q, k, v, dropout_p, seed, scale, doc_ids).transpose(1, 2)
    triangle = Tq == Tk and doc_ids is None
    sees_all = Tq == 1 and doc_ids is None
    mask = None if triangle or sees_all else visible(Tq, Tk, doc_ids, q.device)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=triangle, scale=scale, enable_gqa=Hkv != H)
    return out.transpose(1, 2)


def _prefers_products(q: torch.Tensor, Tk: int) -> bool:
    """Whether plain matrix products beat the fused SDPA: with gradients, on a CPU, in 16 bits they do.

    SDPA's backward is slow in bfloat16 there. Products need memory for all weights, so long contexts go to SDPA.
    """
    if q.device.type != "cpu" or not (q.requires_grad and torch.is_grad_enabled()):
        return False
    return q.element_size() == 2 and Tk <= 1024


def _attention_by_products(
    q: torch.Tensor,  # (B, H, Tq, D)
    k: torch.Tensor,  # (B, H, Tk, D)
    v: torch.Tensor,
    dropout_p: float,
    seed: torch.Tensor | None,
    scale: float,
    doc_ids: torch.Tensor | None,
) -> torch.Tensor:
    B, H, Tq, _ = q.shape
    Tk = k.shape[2]
    hidden = ~visible(Tq, Tk, doc_ids, q.device)
    bias = torch.zeros_like(hidden, dtype=q.dtype).masked_fill(hidden, float("-inf"))
    bias = bias if bias.dim() == 2 else bias.expand(B, H, Tq, Tk).flatten(0, 1)
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))  # each (B * H, T, D)
    weights = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=scale).softmax(-1)
    if dropout_p > 0:
        weights = apply_dropout(weights.view(B, H, Tq, Tk), seed, dropout_p).flatten(0, 1)
    return torch.bmm(weights, v).unflatten(0, (B, H))


def linear_cross_entropy(
    x: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    ignore_index: int = -100,
    valid_vocab: int | None = None,
    reduction: str = "mean",
) -> torch.Tensor:
    if valid_vocab is not None and x.device.type == "cpu":
        weight, valid_vocab = weight[:valid_vocab], None
    logits = F.linear(x, weight)
    if valid_vocab is not None:
        # A GPU's matrix kernels want the padded width; the padding is masked afterwards.
        logits[..., valid_vocab:] = float("-inf")
    # float32 for 16-bit logits, and float64 stays what it is
    logits = logits.reshape(-1, logits.shape[-1]).to(torch.promote_types(logits.dtype, torch.float32))
    flat = targets.flatten().long()
    if reduction == "mean":
        total = F.cross_entropy(logits, flat, ignore_index=ignore_index, reduction="sum")
        return total / (targets != ignore_index).sum().clamp(min=1)
    losses = F.cross_entropy(logits, flat, ignore_index=ignore_index, reduction="none")
    return reduce(losses.view(targets.shape), targets != ignore_index, reduction)
