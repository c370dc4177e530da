"""Every operation as readable math in plain PyTorch: what the other columns are checked against.

Letters: B batch, Tq queries, Tk keys, H heads, Hkv key/value heads, D head size, C channels, V vocabulary; of a paged
cache: N tokens of all sequences together, P slots a page, M pages that a sequence may have.
Each function takes any floating dtype and computes in it, but 16 bits in float32, with one rounding at the end, also
under autocast; call it in float64 for a ground truth.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from fastgpt_kernels.dropout import apply_dropout

Operation = TypeVar("Operation", bound=Callable)


def in_float32(operation: Operation) -> Operation:
    """The operation on tensors of 16 bits as in float32, without autocast; what it returns is in float32 too."""

    def wide(value: Any) -> Any:
        narrow = isinstance(value, torch.Tensor) and value.is_floating_point() and value.element_size() == 2
        return value.float() if narrow else value

    @functools.wraps(operation)
    def computed(x: torch.Tensor, *inputs: Any, **arguments: Any) -> Any:
        with torch.autocast(x.device.type, enabled=False):
            return operation(wide(x), *map(wide, inputs), **{name: wide(value) for name, value in arguments.items()})

    return computed  # pyright: ignore[reportReturnType]


def rounded(operation: Operation) -> Operation:
    """`in_float32`, with the result rounded to the first tensor's dtype."""
    exact = in_float32(operation)

    @functools.wraps(operation)
    def computed(x: torch.Tensor, *inputs: Any, **arguments: Any) -> Any:
        return exact(x, *inputs, **arguments).to(x.dtype)

    return computed  # pyright: ignore[reportReturnType]


@rounded
def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, eps: float = 1e-5
) -> torch.Tensor:
    """Layer normalization over the last dimension (Ba et al., 2016): (..., C) -> (..., C)."""
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).square().mean(-1, keepdim=True)
    y = (x - mean) / (variance + eps).sqrt() * weight
    return y if bias is None else y + bias


def add_layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    eps: float = 1e-5,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The residual stream and its norm: (x + residual, layer_norm(x + residual)), each (..., C)."""
    total = x + residual
    return total, layer_norm(total, weight, bias, eps=eps)


@rounded
def rms_norm(x: torch.Tensor, weight: torch.Tensor | None = None, *, eps: float = 1e-5) -> torch.Tensor:
    """Root mean square normalization over the last dimension (Zhang & Sennrich, 2019): (..., C) -> (..., C).

    Args:
        weight: (C,), the gain; None for 1.
        eps: added to the mean square.
    """
    y = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return y if weight is None else y * weight


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None = None, *, eps: float = 1e-5
) -> tuple[torch.Tensor, torch.Tensor]:
    """The residual stream and its norm: (x + residual, rms_norm(x + residual)), each (..., C)."""
    total = x + residual
    return total, rms_norm(total, weight, eps=eps)


@rounded
def swiglu(x: torch.Tensor) -> torch.Tensor:
    """silu(a) * b of the halves a and b of the last dimension (Shazeer, 2020): (..., 2 I) -> (..., I).

    silu(a) is a * sigmoid(a). The halves are two linear layers' outputs, packed: a the gate's, b what it scales.
    """
    a, b = x.chunk(2, -1)
    return a * a.sigmoid() * b


@rounded
def relu2(x: torch.Tensor) -> torch.Tensor:
    """The positive part, squared (So et al., 2021), elementwise on any shape."""
    return x.clamp(min=0).square()


@rounded
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
    """Causal attention, aligned at the end: query i sees the keys up to Tk - Tq + i (Vaswani et al., 2017).

    Args:
        q: (B, Tq, H, D), with Tq <= Tk.
        k, v: (B, Tk, Hkv, D); head h of q reads head h // (H / Hkv) (grouped queries, Ainslie et al., 2023).
        dropout_p, seed: drop attention weights by `dropout.dropout_mask`.
        scale: of the scores; default D ** -0.5.
        doc_ids: integer (B, Tk); a query sees only keys of its own document.

    Returns:
        (B, Tq, H, D), in q's dtype.
    """
    weights = apply_dropout(attention_weights(q, k, scale=scale, doc_ids=doc_ids), seed, dropout_p)
    return torch.einsum("bhij,bjhd->bihd", weights, v.repeat_interleave(q.shape[2] // v.shape[2], dim=2))


@in_float32
def attention_weights(
    q: torch.Tensor, k: torch.Tensor, *, scale: float | None = None, doc_ids: torch.Tensor | None = None
) -> torch.Tensor:
    """The share of each key's value in each query's output, before dropout; the arguments of `causal_attention`.

    Returns:
        (B, H, Tq, Tk), exactly 0 for keys that a query does not see; each row sums to 1. Float32 for 16-bit inputs.
    """
    (_, Tq, H, D), (_, Tk, Hkv, _) = q.shape, k.shape
    k = k.repeat_interleave(H // Hkv, dim=2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * (D**-0.5 if scale is None else scale)
    return scores.masked_fill(~visible(Tq, Tk, doc_ids, q.device), float("-inf")).softmax(-1)


def visible(Tq: int, Tk: int, doc_ids: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """The keys that each query sees: bool, (Tq, Tk), or (B, 1, Tq, Tk) with `doc_ids` (B, Tk)."""
    position = torch.arange(Tk, device=device)
    causal = position <= position[Tk - Tq :, None]
    if doc_ids is None:
        return causal
    same = doc_ids[:, Tk - Tq :, None] == doc_ids[:, None, :]
    return (causal & same)[:, None]


@in_float32
def linear_cross_entropy(
    x: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    ignore_index: int = -100,
    valid_vocab: int | None = None,
    reduction: str = "mean",
    softcap: float | None = None,
) -> torch.Tensor:
    """Cross-entropy of the logits x @ weight.T against the targets, in nats.

    Args:
        x: (..., C). weight: (V, C). targets: integer (...), each below valid_vocab or ignore_index.
        ignore_index: rows with this target have loss 0 and count for nothing.
        valid_vocab: columns from here on are padding and stay out of the softmax; default V.
        reduction: "mean" over the rows that count (0 where none does), "sum", or "none" for (...).
        softcap: above 0; the logits are softcap * tanh(logits / softcap) (Gemma team, 2024, "Gemma 2", section 2).

    Returns:
        A scalar, or (...); float32 for 16-bit inputs.
    """
    logits = capped(x @ weight[:valid_vocab].t(), softcap)
    counted = targets != ignore_index
    chosen = targets.where(counted, 0)
    nll = -logits.log_softmax(-1).gather(-1, chosen[..., None]).squeeze(-1)
    return reduce(nll.where(counted, 0.0), counted, reduction)


def capped(logits: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """Logits (...) bounded smoothly to the soft-cap; None bounds nothing."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def reduce(losses: torch.Tensor, counted: torch.Tensor, reduction: str) -> torch.Tensor:
    """Each row's loss, zero where it does not count, to what `reduction` asks for."""
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    if reduction == "mean":
        return losses.sum() / counted.sum().clamp(min=1)
    raise ValueError(f"reduction {reduction!r} is not one of mean, sum, none")


def paged_attention(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    block_table: torch.Tensor,
    lengths: torch.Tensor,
    *,
    starts: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Causal attention of each sequence's last tokens, over keys and values in pages (Kwon et al., 2023).

    Args:
        q: (N, H, D), the queries of B sequences one after the other; their own keys and values are in the pages.
        k_pages, v_pages: (pages, P, Hkv, D), the pool that all sequences share.
        block_table: int32 (B, M); entry j is the page of a sequence's positions j * P to (j + 1) * P - 1. Entries
            past the length are never read.
        lengths: int32 (B,), the tokens in the cache, those of q included; 0 marks an empty slot, whose output is 0.
        starts: int32 (B + 1,), from 0 to N: sequence b has the queries starts[b] to starts[b + 1] - 1, which are its
            last tokens, at most lengths[b]. Default: one query a sequence, so N = B.
        scale: of the scores; default D ** -0.5.

    Returns:
        (N, H, D), in q's dtype.
    """
    P = k_pages.shape[1]
    out = torch.zeros_like(q)
    bounds = range(len(q) + 1) if starts is None else starts.tolist()
    for b, length in enumerate(lengths.tolist()):
        if length == 0:
            continue
        own = slice(bounds[b], bounds[b + 1])
        pages = block_table[b, : math.ceil(length / P)]
        k, v = (t[pages].flatten(0, 1)[None, :length] for t in (k_pages, v_pages))
        out[own] = causal_attention(q[None, own], k, v, scale=scale)[0]
    return out


def kv_write(
    k: torch.Tensor, v: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, slots: torch.Tensor
) -> None:
    """Write the keys and values of N tokens to their places in the pages, in place.

    Args:
        k, v: (N, Hkv, D).
        k_pages, v_pages: (pages, P, Hkv, D).
        slots: int64 (N,), page * P + the place in it, each given once; -1 is padding and is not written.
    """
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            page, place = divmod(slot, k_pages.shape[1])
            k_pages[page, place], v_pages[page, place] = k[token], v[token]


def linear_int8(
    x: torch.Tensor,
    weight_int8: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """A linear layer whose weight is stored in 8 bits: y = (x @ weight_int8.T) * scale + bias. For inference alone.

    Args:
        x: (..., I).
        weight_int8: int8 (O, I), from `quantization.quantize`.
        scale: float32 (O,), what 1 in each row of the weight stands for; there is no zero point.
        bias: (O,).
        out_dtype: of the result; default x's. Logits are float32.

    Returns:
        (..., O); computed in float32 where x is in 16 bits.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    y = (x.to(dtype) @ weight_int8.to(dtype).t()) * scale
    return (y if bias is None else y + bias).to(out_dtype or x.dtype)
