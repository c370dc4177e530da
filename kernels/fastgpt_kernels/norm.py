"""Fused LayerNorm and RMSNorm, alone and with the residual addition before them.

For each row x of C columns (Ba et al., 2016, "Layer Normalization"), where x is the sum in add_layer_norm:

    mean = sum(x) / C      rstd = 1 / sqrt(sum((x - mean)^2) / C + eps)      y = (x - mean) * rstd * weight + bias

RMSNorm (Zhang & Sennrich, 2019, "Root Mean Square Layer Normalization") is the same with mean = 0, without a bias and
with or without a weight. The same kernels compute it, with None for what it lacks; its launches have rows of their own.
The backward pass is in `norm_backward`, with its formulas.

A program holds rows of up to 8192 columns whole. It loops over longer rows in tiles and merges their variances tile by
tile (Chan et al., 1979, "Updating formulae and a pairwise algorithm for computing sample variances"). Everything is
computed in float32; mean and rstd are kept in it for the backward pass.

Twins: `reference.layer_norm`, `reference.add_layer_norm`, `reference.rms_norm`, `reference.add_rms_norm`. Offered
here: the four of the same names.
"""

import torch
import triton
import triton.language as tl

from fastgpt_kernels.launch import Launch, Tuning, as_rows, autocast_dtype, check_tensors, tiles, tuning
from fastgpt_kernels.norm_backward import load  # the import also registers the backward operation

WIDEST = 65536


@triton.jit
def _load_input(
    total_ptr, x_ptr, residual_ptr, x_stride, residual_stride, row, col, inside, C, STORE: tl.constexpr
):  # fmt: skip
    """The row to normalize, in float32: x, or the sum as the backward pass will read it; STORE writes that sum."""
    x = load(x_ptr + row * x_stride + col, inside)
    if residual_ptr is not None:
        x += load(residual_ptr + row * residual_stride + col, inside)
        if STORE:
            tl.store(total_ptr + row * C + col, x, mask=inside)
        x = x.to(total_ptr.dtype.element_ty).to(tl.float32)
    return x


@triton.jit(do_not_specialize=["R"])
def _forward(
    total_ptr,  # (R, C) or None
    y_ptr,  # (R, C)
    mean_ptr,  # (R,), or None for RMSNorm
    rstd_ptr,  # (R,)
    x_ptr,  # (R, C)
    residual_ptr,  # (R, C) or None
    weight_ptr, bias_ptr,  # (C,) or None
    x_stride, residual_stride, R, C, eps,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]  # row * C passes 2**31
    col = tl.arange(0, COLUMNS)[None, :]
    inside = (row < R) & (col < C)
    x = _load_input(total_ptr, x_ptr, residual_ptr, x_stride, residual_stride, row, col, inside, C, True)
    if mean_ptr is not None:
        mean = tl.sum(x, axis=1, keep_dims=True) / C
        x = tl.where(col < C, x - mean, 0.0)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(x * x, axis=1, keep_dims=True) / C + eps)
    y = x * rstd
    if weight_ptr is not None:
        y *= load(weight_ptr + col, col < C)
    if bias_ptr is not None:
        y += load(bias_ptr + col, col < C)
    tl.store(y_ptr + row * C + col, y, mask=inside)
    if mean_ptr is not None:
        tl.store(mean_ptr + row, mean, mask=row < R)
    tl.store(rstd_ptr + row, rstd, mask=row < R)


@triton.jit(do_not_specialize=["R"])
def _forward_in_tiles(
    total_ptr, y_ptr, mean_ptr, rstd_ptr, x_ptr, residual_ptr, weight_ptr, bias_ptr,  # as for `_forward`
    x_stride, residual_stride, R, C, eps,
    ROWS: tl.constexpr,  # 1
    COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    mean = 0.0
    squares = 0.0  # sum of (x - mean)^2 so far
    for start in range(0, C, COLUMNS):
        col = start + tl.arange(0, COLUMNS)
        inside = col < C
        x = _load_input(total_ptr, x_ptr, residual_ptr, x_stride, residual_stride, row, col, inside, C, True)
        if mean_ptr is None:
            squares += tl.sum(x * x)
        else:
            count = tl.minimum(COLUMNS, C - start).to(tl.float32)
            tile_mean = tl.sum(x) / count
            centred = tl.where(inside, x - tile_mean, 0.0)
            seen = tl.cast(start, tl.float32)
            delta = tile_mean - mean
            mean += delta * (count / (seen + count))
            squares += tl.sum(centred * centred) + delta * delta * (seen * count / (seen + count))
    rstd = 1.0 / tl.sqrt_rn(squares / C + eps)
    if mean_ptr is not None:
        tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)
    for start in range(0, C, COLUMNS):
        col = start + tl.arange(0, COLUMNS)
        inside = col < C
        x = _load_input(total_ptr, x_ptr, residual_ptr, x_stride, residual_stride, row, col, inside, C, False)
        y = (x - mean) * rstd
        if weight_ptr is not None:
            y *= load(weight_ptr + col, inside)
        if bias_ptr is not None:
            y += load(bias_ptr + col, inside)
        tl.store(y_ptr + row * C + col, y, mask=inside)


def forward_launch(
    total: torch.Tensor | None, y: torch.Tensor, mean: torch.Tensor | None, rstd: torch.Tensor,
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor | None, bias: torch.Tensor | None,
    eps: float, tuning: Tuning,
) -> Launch:  # fmt: skip
    R, C = x.shape
    name = "rms_norm_forward" if mean is None else "norm_forward"
    row = tuning.row(name, C)
    kernel = _forward if row.columns >= C else _forward_in_tiles
    strides = x.stride(0), 0 if residual is None else residual.stride(0)
    args = (total, y, mean, rstd, x, residual, weight, bias, *strides, R, C, eps)
    return Launch(name, kernel, (tiles(R, row.rows),), args, row.constants())


@torch.library.custom_op("fastgpt::norm_forward", mutates_args=())
def _norm_forward(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor | None, bias: torch.Tensor | None,
    eps: float, dtype: torch.dtype, centred: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """(total; y in `dtype`; mean; rstd), of LayerNorm if `centred`, else of RMSNorm.

    total without a residual, and mean unless `centred`, are empty tensors.
    """
    total, y, mean, rstd = outputs = _norm_forward_shapes(x, residual, weight, bias, eps, dtype, centred)
    if x.numel():
        sums = (None, None) if residual is None else (as_rows(total), as_rows(residual))
        weight, bias = (None if t is None else t.contiguous() for t in (weight, bias))
        forward_launch(
            sums[0], as_rows(y), mean if centred else None, rstd, as_rows(x), sums[1], weight, bias,
            eps, tuning(x.device, x.dtype),
        )()  # fmt: skip
    return outputs


@_norm_forward.register_fake
def _norm_forward_shapes(x, residual, weight, bias, eps, dtype, centred):
    if residual is None:
        total = x.new_empty(0)
    else:
        total = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
    rows = x.numel() // x.shape[-1]
    mean = x.new_empty(rows if centred else 0, dtype=torch.float32)
    return total, x.new_empty(x.shape, dtype=dtype), mean, x.new_empty(rows, dtype=torch.float32)


def _save(ctx, inputs, output):
    x, residual, weight, bias, _, _, centred = inputs
    total, _, mean, rstd = output
    ctx.save_for_backward(x if residual is None else total, weight, mean if centred else None, rstd)
    ctx.has_bias, ctx.x_dtype = bias is not None, x.dtype
    ctx.residual_dtype = None if residual is None else residual.dtype
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _backward_of_norm(ctx, dtotal, dy, _dmean, _drstd):
    x, weight, mean, rstd = ctx.saved_tensors
    if ctx.residual_dtype is None:
        dtotal = None
    if dy is None:  # only the sum was used
        dx = None if dtotal is None else dtotal.to(ctx.x_dtype)
        dresidual = None if dtotal is None else dtotal.to(ctx.residual_dtype)
        return dx, dresidual, None, None, None, None, None
    dx, dresidual, dweight, dbias = torch.ops.fastgpt.norm_backward(
        dtotal, dy, x, weight, mean, rstd, ctx.has_bias, ctx.x_dtype, ctx.residual_dtype
    )
    if ctx.residual_dtype is None:
        dresidual = None
    elif ctx.residual_dtype == ctx.x_dtype:
        dresidual = dx
    dweight = None if weight is None else dweight
    return dx, dresidual, dweight, dbias if ctx.has_bias else None, None, None, None


_norm_forward.register_autograd(_backward_of_norm, setup_context=_save)


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, eps: float = 1e-5
) -> torch.Tensor:
    """Layer normalization over the last dimension, as `reference.layer_norm`, in one kernel.

    Args:
        x: (..., C), C <= 65,536; its rows may lie any distance apart.
        weight, bias: (C,), in x's dtype or float32.
        eps: added to the variance.

    Returns:
        (..., C), in x's dtype, or in autocast's where that is on. dweight is summed in float32, in a fixed order.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, named with what was expected.
    """
    _check("layer_norm", x, None, weight, bias)
    dtype = autocast_dtype(x.device) or x.dtype
    return torch.ops.fastgpt.norm_forward(x, None, weight, bias, eps, dtype, True)[1]


def add_layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    eps: float = 1e-5,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum and its norm, as `reference.add_layer_norm`, in one pass over memory.

    Args:
        x, residual: (..., C) of one shape; one of them may be float32 beside 16 bits, and then the sum is float32.
        weight, bias, eps: as in `layer_norm`.

    Returns:
        x + residual, and its norm in the same dtype, or in autocast's where that is on; each (..., C).

    Raises:
        ValueError: as `layer_norm`.
    """
    _check("add_layer_norm", x, residual, weight, bias)
    dtype = autocast_dtype(x.device) or torch.promote_types(x.dtype, residual.dtype)
    total, y, _, _ = torch.ops.fastgpt.norm_forward(x, residual, weight, bias, eps, dtype, True)
    return total, y


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None = None, *, eps: float = 1e-5) -> torch.Tensor:
    """RMS normalization over the last dimension, as `reference.rms_norm`, in one kernel.

    Args:
        x: (..., C), C <= 65,536. Rows that do not all lie at one distance, such as heads within a packed projection,
            are copied first.
        weight: (C,), in x's dtype or float32, or None.
        eps: added to the mean square.

    Returns:
        (..., C), in x's dtype, or in autocast's where that is on. dweight is summed in float32, in a fixed order.

    Raises:
        ValueError: as `layer_norm`.
    """
    _check("rms_norm", x, None, weight, None)
    dtype = autocast_dtype(x.device) or x.dtype
    return torch.ops.fastgpt.norm_forward(x, None, weight, None, eps, dtype, False)[1]


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None = None, *, eps: float = 1e-5
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum and its norm, as `reference.add_rms_norm`, in one pass over memory.

    Args:
        x, residual: as in `add_layer_norm`.
        weight, eps: as in `rms_norm`.

    Returns:
        x + residual, and its norm in the same dtype, or in autocast's where that is on; each (..., C).

    Raises:
        ValueError: as `layer_norm`.
    """
    _check("add_rms_norm", x, residual, weight, None)
    dtype = autocast_dtype(x.device) or torch.promote_types(x.dtype, residual.dtype)
    total, y, _, _ = torch.ops.fastgpt.norm_forward(x, residual, weight, None, eps, dtype, False)
    return total, y


def _check(
    op: str, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor | None, bias: torch.Tensor | None
) -> None:
    dims = {"x": None, "residual": x.dim(), "weight": 1, "bias": 1}
    check_tensors(op, dims, x=x, residual=residual, weight=weight, bias=bias)
    C = x.shape[-1]
    if not 1 <= C <= WIDEST:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}; expected 1 to {WIDEST:,} columns")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is None:
            continue
        if parameter.shape[0] != C:
            raise ValueError(f"{op}: {name} has shape {tuple(parameter.shape)}; expected ({C},), the columns of x")
        differ = weight is not None and parameter.dtype != weight.dtype
        if parameter.dtype not in (x.dtype, torch.float32) or differ:
            rest = "float32" if bias is None else "float32, the same for weight and bias"
            raise ValueError(
                f"{op}: {name} {tuple(parameter.shape)} is {parameter.dtype}; expected {x.dtype}, as x, or {rest}"
            )
    if residual is None:
        return
    if residual.shape != x.shape:
        raise ValueError(f"{op}: residual has shape {tuple(residual.shape)}; expected {tuple(x.shape)}, as x")
    if residual.dtype != x.dtype and torch.float32 not in (residual.dtype, x.dtype):
        raise ValueError(f"{op}: residual {tuple(x.shape)} is {residual.dtype}; expected {x.dtype}, as x, or float32")
