"""Activations of the MLP: SwiGLU and squared ReLU, forward and backward in one pass over memory each.

SwiGLU (Shazeer, 2020, "GLU Variants Improve Transformer"), for each row x = [a b] of 2 I columns:

    s = 1 / (1 + exp(-a))      y = a s b      da = dy b s (1 + a (1 - s))      db = dy a s

Squared ReLU (So et al., 2021, "Primer: Searching for Efficient Transformers for Language Modeling"), elementwise:

    r = max(x, 0)      y = r^2      dx = 2 dy r

Everything is computed in float32 and rounded once. The backward pass computes from x, so nothing else is kept for it.

Twins: `reference.swiglu`, `reference.relu2`. Offered here: `swiglu`, `relu2`.
"""

import torch
import triton
import triton.language as tl

from fastgpt_kernels.launch import Launch, Tuning, as_rows, autocast_dtype, check_tensors, tiles, tuning


@triton.jit
def _load(pointers, inside):
    """Numbers in float32, 0 where not `inside`."""
    return tl.load(pointers, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _tile(R, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """This program's rows (ROWS, 1) and columns (1, COLUMNS), and which of both are there."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]  # row * width passes 2**31
    col = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return row, col, (row < R) & (col < width)


@triton.jit(do_not_specialize=["R"])
def _swiglu_forward(
    y_ptr,  # (R, width)
    x_ptr,  # (R, 2 width)
    x_stride, R, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, col, inside = _tile(R, width, ROWS, COLUMNS)
    a = _load(x_ptr + row * x_stride + col, inside)
    b = _load(x_ptr + row * x_stride + width + col, inside)
    tl.store(y_ptr + row * width + col, a * tl.sigmoid(a) * b, mask=inside)


@triton.jit(do_not_specialize=["R"])
def _swiglu_backward(
    dx_ptr,  # (R, 2 width)
    dy_ptr,  # (R, width)
    x_ptr,  # (R, 2 width)
    dy_stride, x_stride, R, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, col, inside = _tile(R, width, ROWS, COLUMNS)
    dy = _load(dy_ptr + row * dy_stride + col, inside)
    a = _load(x_ptr + row * x_stride + col, inside)
    b = _load(x_ptr + row * x_stride + width + col, inside)
    s = tl.sigmoid(a)
    tl.store(dx_ptr + row * (2 * width) + col, dy * b * s * (1.0 + a * (1.0 - s)), mask=inside)
    tl.store(dx_ptr + row * (2 * width) + width + col, dy * a * s, mask=inside)


@triton.jit
def _relu2(
    out_ptr,  # (N,): y, or dx where dy is given
    dy_ptr,  # (N,) or None
    x_ptr,  # (N,)
    N, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """N stays specialized on multiples of 16: masked by any other number, loads would be narrow."""
    at = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    x = _load(x_ptr + at, at < N)
    r = tl.where(x < 0, 0.0, x)  # NaN stays NaN
    out = r * r if dy_ptr is None else 2.0 * _load(dy_ptr + at, at < N) * r
    tl.store(out_ptr + at, out, mask=at < N)


def swiglu_forward_launch(y: torch.Tensor, x: torch.Tensor, tuning: Tuning) -> Launch:
    R, width = y.shape
    row = tuning.row("swiglu_forward", width)
    grid = (tiles(R, row.rows), tiles(width, row.columns))
    return Launch("swiglu_forward", _swiglu_forward, grid, (y, x, x.stride(0), R, width), row.constants())


def swiglu_backward_launch(dx: torch.Tensor, dy: torch.Tensor, x: torch.Tensor, tuning: Tuning) -> Launch:
    R, width = dy.shape
    row = tuning.row("swiglu_backward", width)
    grid = (tiles(R, row.rows), tiles(width, row.columns))
    args = (dx, dy, x, dy.stride(0), x.stride(0), R, width)
    return Launch("swiglu_backward", _swiglu_backward, grid, args, row.constants())


def relu2_launch(out: torch.Tensor, dy: torch.Tensor | None, x: torch.Tensor, tuning: Tuning) -> Launch:
    """Forward, or backward where dy is given."""
    name, N = "relu2_forward" if dy is None else "relu2_backward", x.numel()
    row = tuning.row(name, N)
    return Launch(name, _relu2, (tiles(N, row.columns),), (out, dy, x, N), row.constants())


@torch.library.custom_op("fastgpt::swiglu_forward", mutates_args=())
def _swiglu(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    y = _swiglu_shape(x, dtype)
    if x.numel():
        swiglu_forward_launch(as_rows(y), as_rows(x), tuning(x.device, x.dtype))()
    return y


@_swiglu.register_fake
def _swiglu_shape(x, dtype):
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2), dtype=dtype)


@torch.library.custom_op("fastgpt::swiglu_backward", mutates_args=())
def _swiglu_gradient(dy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    dx = _gradient_shape(dy, x)
    if x.numel():
        swiglu_backward_launch(as_rows(dx), as_rows(dy), as_rows(x), tuning(x.device, x.dtype))()
    return dx


@torch.library.custom_op("fastgpt::relu2_forward", mutates_args=())
def _relu2_forward(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    y = _relu2_shape(x, dtype)
    if x.numel():
        relu2_launch(y, None, x.contiguous(), tuning(x.device, x.dtype))()
    return y


@_relu2_forward.register_fake
def _relu2_shape(x, dtype):
    return x.new_empty(x.shape, dtype=dtype)


@torch.library.custom_op("fastgpt::relu2_backward", mutates_args=())
def _relu2_gradient(dy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    dx = _gradient_shape(dy, x)
    if x.numel():
        relu2_launch(dx, dy.contiguous(), x.contiguous(), tuning(x.device, x.dtype))()
    return dx


@_swiglu_gradient.register_fake
@_relu2_gradient.register_fake
def _gradient_shape(dy, x):
    return x.new_empty(x.shape)


def _save(ctx, inputs, output):
    ctx.save_for_backward(inputs[0])


def _backward_of_swiglu(ctx, dy):
    return torch.ops.fastgpt.swiglu_backward(dy, *ctx.saved_tensors), None


def _backward_of_relu2(ctx, dy):
    return torch.ops.fastgpt.relu2_backward(dy, *ctx.saved_tensors), None


_swiglu.register_autograd(_backward_of_swiglu, setup_context=_save)
_relu2_forward.register_autograd(_backward_of_relu2, setup_context=_save)


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """silu(a) * b of the halves a and b of each row, as `reference.swiglu`, in one kernel.

    Args:
        x: (..., 2 I); its rows may lie any distance apart.

    Returns:
        (..., I), in x's dtype, or in autocast's where that is on.

    Raises:
        ValueError: x has an odd number of columns or none, or a dtype or device that kernels cannot work on.
    """
    check_tensors("swiglu", {"x": None}, x=x)
    if x.shape[-1] % 2 or not x.shape[-1]:
        raise ValueError(f"swiglu: x has shape {tuple(x.shape)}; expected an even number of columns above 0")
    return torch.ops.fastgpt.swiglu_forward(x, autocast_dtype(x.device) or x.dtype)


def relu2(x: torch.Tensor) -> torch.Tensor:
    """max(x, 0)^2, as `reference.relu2`, in one kernel.

    Args:
        x: at least one dimension; copied first unless it is contiguous.

    Returns:
        x's shape, in x's dtype, or in autocast's where that is on.

    Raises:
        ValueError: x has no dimension, or a dtype or device that kernels cannot work on.
    """
    check_tensors("relu2", {"x": None}, x=x)
    return torch.ops.fastgpt.relu2_forward(x, autocast_dtype(x.device) or x.dtype)
