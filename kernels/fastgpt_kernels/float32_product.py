"""Products of 16-bit matrices whose result is float32: logits, which are compared with one another.

A product in 16 bits sums in float32 and rounds each sum at the end, in bfloat16 to 8 bits: logits of 60 and 60.1 become
equal, and one of -90 is off by up to a quarter. Kept in float32, a logit is as good as its factors.

cuBLAS writes float32 by itself (`torch.mm` with `out_dtype`, which PyTorch has on CUDA alone). Elsewhere the factors
are converted, the weight piece by piece. In the backward pass the gradient of the result is rounded to the factors'
dtype, as its products are in 16 bits like all others.

Offered here: `float32_product`, differentiable; `product_by_pieces`, for a weight of any dtype; `product_dtype`.
"""

import torch
import torch.nn.functional as F

# Rows of x up to which the product waits for the weight, so that each weight should be read once.
FEW_ROWS = 16


def float32_product(x: torch.Tensor, weight: torch.Tensor, outputs: int | None = None) -> torch.Tensor:
    """x @ weight.T in float32 of factors in 16 bits, or in autocast's dtype: (..., I), (O, I) -> (..., O).

    Wider factors give a result in their own dtype.

    Args:
        outputs: the columns from here on are -inf, as logits of padding, to which a softmax gives no gradient.
    """
    if x.device.type == "meta":  # which has no autocast
        return x.new_empty(*x.shape[:-1], len(weight), dtype=torch.promote_types(x.dtype, torch.float32))
    dtype = product_dtype(x)
    if dtype.itemsize > 2:
        y = F.linear(x, weight)
        if outputs is not None:
            y[..., outputs:] = -torch.inf
        return y
    with torch.autocast(x.device.type, enabled=False):
        rows, weight = x.reshape(-1, x.shape[-1]).to(dtype), weight.to(dtype)
        trained = torch.is_grad_enabled() and (rows.requires_grad or weight.requires_grad)
        y = _Product.apply(rows, weight, outputs) if trained else _product(rows, weight, outputs)
        return y.view(*x.shape[:-1], len(weight))


def product_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype of the factors of a product with x: x's, or autocast's."""
    narrowed = x.dtype == torch.float32 and torch.is_autocast_enabled(x.device.type)
    return torch.get_autocast_dtype(x.device.type) if narrowed else x.dtype


def product_by_pieces(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x @ weight.T in x's dtype: x (R, I), weight (O, I) in any dtype, of which a piece at a time is converted.

    The pieces share a buffer. For few rows it stays in a core's cache, and all of it in the cache that cores share: it
    is no new memory that the system has to clear first, which took 60 of the 75 milliseconds of 1 row by 50304 x 768.
    """
    outputs, inputs = weight.shape
    step = max(1, (1 << 18 if len(x) <= FEW_ROWS else 1 << 22) // inputs)
    buffer = x.new_empty(min(step, outputs), inputs)
    y = x.new_empty(len(x), outputs)
    for start in range(0, outputs, step):
        part = weight[start : start + step]
        torch.mm(x, buffer[: len(part)].copy_(part).t(), out=y[:, start : start + len(part)])
    return y


def _product(rows: torch.Tensor, weight: torch.Tensor, outputs: int | None) -> torch.Tensor:
    """16-bit rows (R, I) and weight (O, I) -> float32 (R, O)."""
    if rows.device.type == "cuda":
        y = torch.mm(rows, weight.t(), out_dtype=torch.float32)
    elif torch.compiler.is_compiling():
        y = rows.float() @ weight.float().t()
    else:
        y = product_by_pieces(rows.float(), weight)
    if outputs is not None:
        y[:, outputs:] = -torch.inf
    return y


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, weight, outputs):
        ctx.save_for_backward(rows, weight)
        return _product(rows, weight, outputs)

    @staticmethod
    def backward(ctx, *grads):
        rows, weight = ctx.saved_tensors
        grad = grads[0].to(rows.dtype)  # a softmax gives 0 for a logit of -inf
        wants_rows, wants_weight, _ = ctx.needs_input_grad
        return grad @ weight if wants_rows else None, grad.t() @ rows if wants_weight else None, None
