"""Every operation by PyTorch's own best path, with the signatures of `reference`, which documents them."""

import math

import torch
import torch.nn.functional as F

from fastgpt_kernels.float32_product import FEW_ROWS, float32_product, product_by_pieces
from fastgpt_kernels.lean_autograd import ReLU2, RMSNorm, SwiGLU
from fastgpt_kernels.product_attention import attention_by_products
from fastgpt_kernels.reference import capped, reduce, visible
from fastgpt_kernels.row_product import row_product
from fastgpt_kernels.torch_private import linear_int8_packed


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


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None = None, *, eps: float = 1e-5) -> torch.Tensor:
    if x.device.type == "cpu" and _trained(x, weight) and not torch.compiler.is_compiling():
        return RMSNorm.apply(x, weight, eps)
    # In one dtype, without which a GPU's fused kernel is not taken.
    dtype = x.dtype if weight is None else torch.promote_types(x.dtype, weight.dtype)
    return F.rms_norm(x.to(dtype), x.shape[-1:], weight if weight is None else weight.to(dtype), eps).to(x.dtype)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None = None, *, eps: float = 1e-5
) -> tuple[torch.Tensor, torch.Tensor]:
    total = x + residual
    return total, rms_norm(total, weight, eps=eps)


def swiglu(x: torch.Tensor) -> torch.Tensor:
    if _trained(x) and not torch.compiler.is_compiling():
        return SwiGLU.apply(x)
    a, b = x.chunk(2, -1)
    return F.silu(a) * b


def relu2(x: torch.Tensor) -> torch.Tensor:
    if _trained(x) and not torch.compiler.is_compiling():
        return ReLU2.apply(x)
    return F.relu(x).square()


def _trained(*inputs: torch.Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)


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
    if dropout_p > 0 or prefers_products(q, Tk):
        k, v = (t.repeat_interleave(H // Hkv, dim=1) if Hkv != H else t for t in (k, v))
        return attention_by_products(q, k, v, dropout_p, seed, scale, doc_ids).transpose(1, 2)
    triangle = Tq == Tk and doc_ids is None
    sees_all = Tq == 1 and doc_ids is None
    mask = None if triangle or sees_all else visible(Tq, Tk, doc_ids, q.device)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=triangle, scale=scale, enable_gqa=Hkv != H)
    return out.transpose(1, 2)


def prefers_products(q: torch.Tensor, Tk: int) -> bool:
    """Whether plain matrix products beat the fused SDPA without dropout: with gradients, on a CPU, in 16 bits they do.

    SDPA's backward is slow in bfloat16 there. Products need memory for all weights, so long contexts go to SDPA.
    """
    if q.device.type != "cpu" or not _trained(q):
        return False
    return q.element_size() == 2 and Tk <= 1024


# Columns up to which training in 16 bits on a CPU has float32 logits. A wider output layer is a large part of a model
# (a third of GPT-2's products), and on a CPU that multiplies bfloat16 in hardware a float32 product takes up to six
# times as long: more than a tenth of the step. On all CPUs alike, so that a run goes on elsewhere as it began.
NARROW_HEAD = 8192


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
    if valid_vocab is not None and x.device.type == "cpu":
        weight, valid_vocab = weight[:valid_vocab], None
    narrow = _trained(x, weight) and x.device.type == "cpu" and len(weight) > NARROW_HEAD
    if softcap is not None:
        weight, valid_vocab = weight[:valid_vocab], None  # a masked logit of -inf would be capped
    # A GPU's matrix kernels want the padded width, whose logits are masked.
    logits = F.linear(x, weight) if narrow else float32_product(x, weight, valid_vocab)
    # float32 for 16-bit logits, and float64 stays what it is
    logits = capped(logits.reshape(-1, logits.shape[-1]).to(torch.promote_types(logits.dtype, torch.float32)), softcap)
    flat = targets.flatten().long()
    if reduction == "mean":
        total = F.cross_entropy(logits, flat, ignore_index=ignore_index, reduction="sum")
        return total / (targets != ignore_index).sum().clamp(min=1)
    losses = F.cross_entropy(logits, flat, ignore_index=ignore_index, reduction="none")
    return reduce(losses.view(targets.shape), targets != ignore_index, reduction)


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
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if scale < 0:  # as above
        q, scale = -q, -scale
    if torch.compiler.is_compiling():
        return torch.ops.fastgpt.paged_attention_stock(q, k_pages, v_pages, block_table, lengths, starts, scale)
    if starts is None and q.device.type != "cpu":
        return _decode_without_waiting(q, k_pages, v_pages, block_table, lengths, scale)
    return _attend_one_by_one(q, k_pages, v_pages, block_table, lengths, starts, scale)


@torch.library.custom_op("fastgpt::paged_attention_stock", mutates_args=())
def _opaque_paged_attention(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    block_table: torch.Tensor,
    lengths: torch.Tensor,
    starts: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """`paged_attention` as one piece to torch.compile, which cannot trace what is read on the host."""
    return paged_attention(q, k_pages, v_pages, block_table, lengths, starts=starts, scale=scale).contiguous()


@_opaque_paged_attention.register_fake
def _paged_attention_shape(q, k_pages, v_pages, block_table, lengths, starts, scale):
    return q.new_empty(q.shape)


def _attend_one_by_one(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    block_table: torch.Tensor,
    lengths: torch.Tensor,
    starts: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """SDPA for each sequence at its own length: nothing is padded, and pages that lie side by side are not copied."""
    (N, H, _), (_, P, Hkv, D) = q.shape, k_pages.shape
    contiguous = k_pages.is_contiguous() and v_pages.is_contiguous()
    if starts is None:
        queries = q.unsqueeze(2).split(1) if N > 1 else (q.unsqueeze(2),)  # each (1, H, 1, D)
    else:
        queries = [own.transpose(0, 1)[None] for own in q.split(starts.diff().tolist())]  # each (1, H, Tq, D)
    outs = []
    for own, pages, length in zip(queries, block_table.tolist(), lengths.tolist(), strict=True):
        if length == 0:
            outs.append(torch.zeros_like(own))
            continue
        pages = pages[: -(-length // P)]
        first = pages[0]
        if contiguous and pages == list(range(first, first + len(pages))):
            shape, strides, start = (1, Hkv, length, D), (0, D, Hkv * D, 1), first * P * Hkv * D
            k = k_pages.as_strided(shape, strides, k_pages.storage_offset() + start)
            v = v_pages.as_strided(shape, strides, v_pages.storage_offset() + start)
        else:
            k, v = (t[pages].flatten(0, 1)[None, :length].transpose(1, 2) for t in (k_pages, v_pages))
        Tq = 1 if starts is None else own.shape[2]
        mask = None if Tq in (1, length) else visible(Tq, length, None, q.device)
        triangle = Tq == length and Tq > 1
        outs.append(
            F.scaled_dot_product_attention(
                own, k, v, attn_mask=mask, is_causal=triangle, scale=scale, enable_gqa=Hkv != H
            )
        )
    if not outs:
        return torch.empty_like(q)
    if starts is None:
        return (torch.cat(outs) if N > 1 else outs[0]).squeeze(2)
    return torch.cat(outs, dim=2)[0].transpose(0, 1)


def _decode_without_waiting(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    block_table: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """One query a sequence, over copies of all its pages: for a GPU, where reading the lengths would mean to wait."""
    (_, P, Hkv, _), M = k_pages.shape, block_table.shape[1]
    slot = torch.arange(M * P, device=q.device)
    seen = slot < lengths[:, None]  # (B, M * P)
    pages = block_table.where(seen[:, ::P], 0)  # what stands past the length need not be a page
    k, v = (t[pages].flatten(1, 2).transpose(1, 2) for t in (k_pages, v_pages))  # each (B, Hkv, M * P, D)
    v = v.where(seen[:, None, :, None], 0)  # nor need what stands in unwritten slots be finite
    k = k.where(seen[:, None, :, None], 0)
    mask = (seen | (lengths == 0)[:, None])[:, None, None]
    out = F.scaled_dot_product_attention(q[:, :, None], k, v, attn_mask=mask, scale=scale, enable_gqa=Hkv != q.shape[1])
    return out[:, :, 0]


def kv_write(
    k: torch.Tensor, v: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, slots: torch.Tensor
) -> None:
    if torch.compiler.is_compiling():
        torch.ops.fastgpt.kv_write_stock(k, v, k_pages, v_pages, slots)
        return
    if slots.device.type == "cpu":
        _kv_write_on_cpu(k, v, k_pages, v_pages, slots)
        return
    if len(slots) == 0:
        return
    padding = slots < 0
    # Without waiting for the device: padding repeats the write of a token that is none, or the page's own content.
    last = slots.argmax()
    token = torch.arange(len(slots), device=slots.device).where(~padding, last)
    slots = slots[token]
    for t, pages in ((k, k_pages), (v, v_pages)):
        flat, place = pages.view(-1, *pages.shape[2:]), slots.clamp(min=0)  # not a copy, which would be lost
        flat.index_copy_(0, place, torch.where((slots >= 0)[:, None, None], t[token], flat[place]))


def _kv_write_on_cpu(
    k: torch.Tensor, v: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, slots: torch.Tensor
) -> None:
    if len(slots) == 1:  # decoding a single sequence: half the time of index_copy_
        page, place = divmod(int(slots), k_pages.shape[1])
        if page >= 0:
            k_pages[page, place], v_pages[page, place] = k, v
        return
    padding = slots < 0
    if padding.any():
        k, v, slots = k[~padding], v[~padding], slots[~padding]
    for t, pages in ((k, k_pages), (v, v_pages)):
        pages.view(-1, *pages.shape[2:]).index_copy_(0, slots, t)


@torch.library.custom_op("fastgpt::kv_write_stock", mutates_args=("k_pages", "v_pages"))
def _opaque_kv_write(
    k: torch.Tensor, v: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, slots: torch.Tensor
) -> None:
    """`kv_write` as one piece to torch.compile."""
    kv_write(k, v, k_pages, v_pages, slots)


@_opaque_kv_write.register_fake
def _kv_write_shape(k, v, k_pages, v_pages, slots):
    return None


def linear_int8(
    x: torch.Tensor,
    weight_int8: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    out_dtype = out_dtype or x.dtype
    if torch.compiler.is_compiling():
        return _traceable_linear_int8(x, weight_int8, scale, bias, out_dtype)
    outputs, inputs = weight_int8.shape
    rows = x.reshape(-1, inputs)
    if x.device.type != "cpu":
        # _weight_int8pack_mm runs on CUDA too, but in float32 alone, and a thread goes over a whole row of the weight.
        y = _linear_of_dequantized(rows, weight_int8, scale, out_dtype)
    elif len(rows) <= FEW_ROWS and x.dtype == out_dtype == torch.bfloat16 and inputs % 32 == 0:
        # Other widths it reads past the end of the rows. Milliseconds on two cores with AVX512-BF16, weights not in
        # the cache, of 2304 x 768 and 50304 x 768: for 1 row 0.4 and 6.2 (dequantized at once 1.2, 24), for 16 rows
        # 1.1 and 34 (1.1, 28), for 64 rows 2.6 and 77 (1.3, 35). In float32 it is slower throughout: 1.0 and 27 for a
        # row, 40 and 924 for 64 (dequantized 0.6 and 15, 1.9 and 50).
        y = linear_int8_packed(rows.contiguous(), weight_int8, scale.to(x.dtype))
    else:
        # Scaled after the product, whose sums of up to 127 |x| would pass float16's largest number.
        dtype = torch.float32 if x.dtype == torch.float16 else torch.promote_types(x.dtype, out_dtype)
        y = product_by_pieces(rows.to(dtype), weight_int8).mul_(scale.to(dtype)).to(out_dtype)
    y = y.view(*x.shape[:-1], outputs)
    return y if bias is None else y.add_(bias)


def _traceable_linear_int8(
    x: torch.Tensor, weight_int8: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, out_dtype: torch.dtype
) -> torch.Tensor:
    """For one row inductor makes a single loop of this, which runs as fast as the weight is read."""
    outputs, inputs = weight_int8.shape
    if x.numel() == inputs:
        on_cpu = x.device.type == "cpu"
        y = row_product(x, weight_int8) if on_cpu else (weight_int8.float() * x.reshape(inputs)).sum(-1)
        y = y * scale if bias is None else y * scale + bias
        return y.to(out_dtype).view(*x.shape[:-1], outputs)
    if x.device.type == "cuda" and x.element_size() == 2 and out_dtype == torch.float32:
        y = float32_product(x, weight_int8) * scale  # 16-bit factors, of which the integers are exact ones
        return y if bias is None else y + bias
    # Scaled before the product: inductor would take one scaled after it for a _weight_int8pack_mm, slow for many rows.
    weight = weight_int8 * scale[:, None]
    if out_dtype != x.dtype:
        return F.linear(x.to(out_dtype), weight.to(out_dtype), None if bias is None else bias.to(out_dtype))
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _linear_of_dequantized(
    rows: torch.Tensor, weight_int8: torch.Tensor, scale: torch.Tensor, out_dtype: torch.dtype
) -> torch.Tensor:
    """F.linear after a kernel that writes the weight in x's dtype, at most 2^26 numbers at a time to bound the memory.

    A float32 result of 16 bits is scaled after the product, of which the integers are exact factors. Otherwise the
    weight is scaled before it, as sums of up to 127 |x| would pass float16's largest number.
    """
    exact = rows.element_size() == 2 and out_dtype == torch.float32
    step = max(1, (1 << 26) // weight_int8.shape[1])
    parts = []
    for part, part_scale in zip(weight_int8.split(step), scale.split(step), strict=True):
        if exact:
            parts.append(float32_product(rows, part).mul_(part_scale))
            continue
        weight = torch.empty(part.shape, dtype=rows.dtype, device=rows.device)
        parts.append(F.linear(rows, torch.mul(part, part_scale[:, None], out=weight)).to(out_dtype))
    return torch.cat(parts, -1) if len(parts) > 1 else parts[0]
