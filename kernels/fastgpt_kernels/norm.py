"""Fused LayerNorm, alone and with the residual addition before it.

Forward, for each row x of C columns (Ba et al., 2016, "Layer Normalization"), where x is the sum in add_layer_norm:

    mean = sum(x) / C      rstd = 1 / sqrt(sum((x - mean)^2) / C + eps)      y = (x - mean) * rstd * weight + bias

Backward, with n = (x - mean) * rstd and g = dy * weight:

    dx = (g - sum(g) / C - n * sum(g * n) / C) * rstd  [+ dtotal]      dweight = sum of dy * n      dbias = sum of dy

Rows of up to 8192 columns are held whole; longer ones are gone over in tiles, their variance merged tile by tile
(Chan et al., 1979, "Updating formulae and a pairwise algorithm for computing sample variances"). Everything is
computed in float32, and mean and rstd stay float32. A fixed number of programs each sum dweight and dbias over their
rows; a second kernel adds the partial sums in a fixed order, so the result is the same in every run.

Twins: `reference.layer_norm`, `reference.add_layer_norm`. Offered here: `layer_norm`, `add_layer_norm`.
"""

import torch
import triton
import triton.language as tl

from fastgpt_kernels.launch import Launch, Tuning, as_rows, autocast_dtype, check_tensors, tiles, tuning

WIDEST = 65536


@triton.jit
def _load(pointers, inside):
    return tl.load(pointers, mask=inside, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["R"])
def _forward(
    total_ptr,  # (R, C) or None
    y_ptr,  # (R, C)
    mean_ptr,  # (R,)
    rstd_ptr,  # (R,)
    x_ptr,  # (R, C)
    residual_ptr,  # (R, C) or None
    weight_ptr,  # (C,)
    bias_ptr,  # (C,) or None
    x_stride,
    residual_stride,
    R,
    C,
    eps,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]  # row * C passes 2**31
    col = tl.arange(0, COLUMNS)[None, :]
    inside = (row < R) & (col < C)
    x = _load(x_ptr + row * x_stride + col, inside)
    if residual_ptr is not None:
        x += _load(residual_ptr + row * residual_stride + col, inside)
        tl.store(total_ptr + row * C + col, x, mask=inside)
        x = x.to(total_ptr.dtype.element_ty).to(tl.float32)  # what the backward pass will read
    mean = tl.sum(x, axis=1, keep_dims=True) / C
    centred = tl.where(col < C, x - mean, 0.0)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(centred * centred, axis=1, keep_dims=True) / C + eps)
    y = centred * rstd * _load(weight_ptr + col, col < C)
    if bias_ptr is not None:
        y += _load(bias_ptr + col, col < C)
    tl.store(y_ptr + row * C + col, y, mask=inside)
    tl.store(mean_ptr + row, mean, mask=row < R)
    tl.store(rstd_ptr + row, rstd, mask=row < R)


@triton.jit(do_not_specialize=["R"])
def _forward_in_tiles(
    total_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    x_stride,
    residual_stride,
    R,
    C,
    eps,
    ROWS: tl.constexpr,  # 1
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    mean = 0.0
    squares = 0.0  # sum of (x - mean)^2 so far
    for start in range(0, C, COLUMNS):
        col = start + tl.arange(0, COLUMNS)
        inside = col < C
        x = _load(x_ptr + row * x_stride + col, inside)
        if residual_ptr is not None:
            x += _load(residual_ptr + row * residual_stride + col, inside)
            tl.store(total_ptr + row * C + col, x, mask=inside)
            x = x.to(total_ptr.dtype.element_ty).to(tl.float32)
        count = tl.minimum(COLUMNS, C - start).to(tl.float32)
        tile_mean = tl.sum(x) / count
        centred = tl.where(inside, x - tile_mean, 0.0)
        seen = tl.cast(start, tl.float32)
        delta = tile_mean - mean
        mean += delta * (count / (seen + count))
        squares += tl.sum(centred * centred) + delta * delta * (seen * count / (seen + count))
    rstd = 1.0 / tl.sqrt_rn(squares / C + eps)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)
    for start in range(0, C, COLUMNS):
        col = start + tl.arange(0, COLUMNS)
        inside = col < C
        x = _load(x_ptr + row * x_stride + col, inside)
        if residual_ptr is not None:
            x += _load(residual_ptr + row * residual_stride + col, inside)
            x = x.to(total_ptr.dtype.element_ty).to(tl.float32)
        y = (x - mean) * rstd * _load(weight_ptr + col, inside)
        if bias_ptr is not None:
            y += _load(bias_ptr + col, inside)
        tl.store(y_ptr + row * C + col, y, mask=inside)


@triton.jit(do_not_specialize=["R"])
def _backward(
    dx_ptr,  # (R, C)
    dresidual_ptr,  # (R, C), or None where dx serves for both
    dweight_ptr,  # (programs, C) float32: partial sums
    dbias_ptr,  # (programs, C) float32, or None
    dtotal_ptr,  # (R, C) or None
    dy_ptr,  # (R, C)
    x_ptr,  # (R, C)
    mean_ptr,  # (R,)
    rstd_ptr,  # (R,)
    weight_ptr,  # (C,)
    dtotal_stride,
    dy_stride,
    x_stride,
    R,
    C,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    col = tl.arange(0, COLUMNS)
    within = col < C
    weight = _load(weight_ptr + col, within)[None, :]
    dweight = tl.zeros([ROWS, COLUMNS], tl.float32)
    dbias = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(program * ROWS, R, programs * ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        inside = (row < R) & within[None, :]
        x = _load(x_ptr + row * x_stride + col[None, :], inside)
        dy = _load(dy_ptr + row * dy_stride + col[None, :], inside)
        mean = _load(mean_ptr + row, row < R)
        rstd = _load(rstd_ptr + row, row < R)
        n = tl.where(inside, (x - mean) * rstd, 0.0)
        g = dy * weight
        mean_g = tl.sum(g, axis=1, keep_dims=True) / C
        mean_gn = tl.sum(g * n, axis=1, keep_dims=True) / C
        dx = (g - mean_g - n * mean_gn) * rstd
        if dtotal_ptr is not None:
            dx += _load(dtotal_ptr + row * dtotal_stride + col[None, :], inside)
        tl.store(dx_ptr + row * C + col[None, :], dx, mask=inside)
        if dresidual_ptr is not None:
            tl.store(dresidual_ptr + row * C + col[None, :], dx, mask=inside)
        dweight += dy * n
        dbias += dy
    partial = program * C + col
    tl.store(dweight_ptr + partial, tl.sum(dweight, axis=0), mask=within)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + partial, tl.sum(dbias, axis=0), mask=within)


@triton.jit(do_not_specialize=["R"])
def _backward_in_tiles(
    dx_ptr,
    dresidual_ptr,
    dtotal_ptr,
    dy_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    dtotal_stride,
    dy_stride,
    x_stride,
    R,
    C,
    ROWS: tl.constexpr,  # 1
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    mean = tl.load(mean_ptr + row)
    rstd = tl.load(rstd_ptr + row)
    sum_g = 0.0
    sum_gn = 0.0
    for start in range(0, C, COLUMNS):
        col = start + tl.arange(0, COLUMNS)
        inside = col < C
        x = _load(x_ptr + row * x_stride + col, inside)
        g = _load(dy_ptr + row * dy_stride + col, inside)
        g *= _load(weight_ptr + col, inside)
        sum_g += tl.sum(g)
        sum_gn += tl.sum(g * (x - mean) * rstd)
    for start in range(0, C, COLUMNS):
        col = start + tl.arange(0, COLUMNS)
        inside = col < C
        x = _load(x_ptr + row * x_stride + col, inside)
        g = _load(dy_ptr + row * dy_stride + col, inside)
        g *= _load(weight_ptr + col, inside)
        dx = (g - sum_g / C - (x - mean) * rstd * (sum_gn / C)) * rstd
        if dtotal_ptr is not None:
            dx += _load(dtotal_ptr + row * dtotal_stride + col, inside)
        tl.store(dx_ptr + row * C + col, dx, mask=inside)
        if dresidual_ptr is not None:
            tl.store(dresidual_ptr + row * C + col, dx, mask=inside)


@triton.jit(do_not_specialize=["R"])
def _weight_partials(
    dweight_ptr,  # (programs, C) float32
    dbias_ptr,  # (programs, C) float32, or None
    dy_ptr,  # (R, C)
    x_ptr,  # (R, C)
    mean_ptr,  # (R,)
    rstd_ptr,  # (R,)
    dy_stride,
    x_stride,
    R,
    C,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    col = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    dweight = tl.zeros([ROWS, COLUMNS], tl.float32)
    dbias = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(program * ROWS, R, programs * ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        inside = (row < R) & (col < C)[None, :]
        x = _load(x_ptr + row * x_stride + col[None, :], inside)
        dy = _load(dy_ptr + row * dy_stride + col[None, :], inside)
        mean = _load(mean_ptr + row, row < R)
        rstd = _load(rstd_ptr + row, row < R)
        dweight += dy * (x - mean) * rstd
        dbias += dy
    partial = program * C + col
    tl.store(dweight_ptr + partial, tl.sum(dweight, axis=0), mask=col < C)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + partial, tl.sum(dbias, axis=0), mask=col < C)


@triton.jit(do_not_specialize=["N"])
def _sum_partials(
    out_ptr,  # (C,)
    partials_ptr,  # (N, C) float32
    N,
    C,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    col = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, N, ROWS):
        row = tl.cast(start, tl.int64) + tl.arange(0, ROWS)[:, None]
        total += tl.load(partials_ptr + row * C + col[None, :], mask=(row < N) & (col < C)[None, :], other=0.0)
    tl.store(out_ptr + col, tl.sum(total, axis=0), mask=col < C)


def forward_launch(
    total: torch.Tensor | None,
    y: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    tuning: Tuning,
) -> Launch:
    R, C = x.shape
    row = tuning.row("norm_forward", C)
    return Launch(
        "norm_forward",
        _forward if row.columns >= C else _forward_in_tiles,
        (tiles(R, row.rows),),
        (total, y, mean, rstd, x, residual, weight, bias, x.stride(0), _stride(residual), R, C, eps),
        row.constants(),
    )


def backward_launches(
    dx: torch.Tensor,
    dresidual: torch.Tensor | None,
    dweight: torch.Tensor,
    dbias: torch.Tensor | None,
    dtotal: torch.Tensor | None,
    dy: torch.Tensor,
    x: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor,
    tuning: Tuning,
) -> list[Launch]:
    """The launches of a backward pass in their order."""
    R, C = x.shape
    row = tuning.row("norm_backward", C)
    programs = min(tuning.programs, tiles(R, row.rows))
    dweights = x.new_empty(programs, C, dtype=torch.float32)
    dbiases = None if dbias is None else torch.empty_like(dweights)
    strides = _stride(dtotal), dy.stride(0), x.stride(0)
    if row.columns >= C:
        partials = (dweights, dbiases)
        args = (dx, dresidual, *partials, dtotal, dy, x, mean, rstd, weight, *strides, R, C)
        launches = [Launch("norm_backward", _backward, (programs,), args, row.constants())]
    else:
        args = (dx, dresidual, dtotal, dy, x, mean, rstd, weight, *strides, R, C)
        by_column = tuning.row("norm_weight_partials", C)
        grid = (programs, tiles(C, by_column.columns))
        partial_args = (dweights, dbiases, dy, x, mean, rstd, *strides[1:], R, C)
        launches = [
            Launch("norm_backward", _backward_in_tiles, (R,), args, row.constants()),
            Launch("norm_weight_partials", _weight_partials, grid, partial_args, by_column.constants()),
        ]
    last = tuning.row("sum_partials", C)
    for out, parts in ((dweight, dweights), (dbias, dbiases)):
        if out is not None:
            grid = (tiles(C, last.columns),)
            launches.append(Launch("sum_partials", _sum_partials, grid, (out, parts, programs, C), last.constants()))
    return launches


def _stride(x: torch.Tensor | None) -> int:
    return 0 if x is None else x.stride(0)


@torch.library.custom_op("fastgpt::norm_forward", mutates_args=())
def _norm_forward(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(total, or an empty tensor without a residual; y in `dtype`; mean; rstd)."""
    total, y, mean, rstd = outputs = _norm_forward_shapes(x, residual, weight, bias, eps, dtype)
    if x.numel():
        forward_launch(
            None if residual is None else as_rows(total),
            as_rows(y),
            mean,
            rstd,
            as_rows(x),
            None if residual is None else as_rows(residual),
            weight.contiguous(),
            None if bias is None else bias.contiguous(),
            eps,
            tuning(x.device, x.dtype),
        )()
    return outputs


@_norm_forward.register_fake
def _norm_forward_shapes(x, residual, weight, bias, eps, dtype):
    if residual is None:
        total = x.new_empty(0)
    else:
        total = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
    rows = x.numel() // x.shape[-1]
    mean = x.new_empty(rows, dtype=torch.float32)
    return total, x.new_empty(x.shape, dtype=dtype), mean, torch.empty_like(mean)


@torch.library.custom_op("fastgpt::norm_backward", mutates_args=())
def _norm_backward(
    dtotal: torch.Tensor | None,
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    has_bias: bool,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dx; dresidual where its dtype differs from dx's; dweight; dbias), each an empty tensor where there is none.

    `x` is what was normalized: the sum, in add_layer_norm.
    """
    dx, dresidual, dweight, dbias = outputs = _norm_backward_shapes(
        dtotal, dy, x, weight, mean, rstd, has_bias, x_dtype, residual_dtype
    )
    if x.numel() == 0:
        dweight.zero_()
        dbias.zero_()
        return outputs
    for launch in backward_launches(
        as_rows(dx),
        as_rows(dresidual) if dresidual.numel() else None,
        dweight,
        dbias if has_bias else None,
        None if dtotal is None else as_rows(dtotal),
        as_rows(dy),
        as_rows(x),
        mean,
        rstd,
        weight.contiguous(),
        tuning(x.device, x.dtype),
    ):
        launch()
    return outputs


@_norm_backward.register_fake
def _norm_backward_shapes(dtotal, dy, x, weight, mean, rstd, has_bias, x_dtype, residual_dtype):
    dx = x.new_empty(x.shape, dtype=x_dtype)
    apart = residual_dtype is not None and residual_dtype != x_dtype
    dresidual = x.new_empty(x.shape, dtype=residual_dtype) if apart else x.new_empty(0)
    return dx, dresidual, weight.new_empty(weight.shape), weight.new_empty(weight.shape if has_bias else 0)


def _save(ctx, inputs, output):
    x, residual, weight, bias, _, _ = inputs
    total, _, mean, rstd = output
    ctx.save_for_backward(x if residual is None else total, weight, mean, rstd)
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
        return dx, dresidual, None, None, None, None
    dx, dresidual, dweight, dbias = torch.ops.fastgpt.norm_backward(
        dtotal, dy, x, weight, mean, rstd, ctx.has_bias, ctx.x_dtype, ctx.residual_dtype
    )
    if ctx.residual_dtype is None:
        dresidual = None
    elif ctx.residual_dtype == ctx.x_dtype:
        dresidual = dx
    return dx, dresidual, dweight, dbias if ctx.has_bias else None, None, None


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
    return torch.ops.fastgpt.norm_forward(x, None, weight, bias, eps, dtype)[1]


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
    total, y, _, _ = torch.ops.fastgpt.norm_forward(x, residual, weight, bias, eps, dtype)
    return total, y


def _check(
    op: str, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor | None
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
        if parameter.dtype not in (x.dtype, torch.float32) or parameter.dtype != weight.dtype:
            raise ValueError(
                f"{op}: {name} {tuple(parameter.shape)} is {parameter.dtype}; expected {x.dtype}, as x, or "
                "float32, the same for weight and bias"
            )
    if residual is None:
        return
    if residual.shape != x.shape:
        raise ValueError(f"{op}: residual has shape {tuple(residual.shape)}; expected {tuple(x.shape)}, as x")
    if residual.dtype != x.dtype and torch.float32 not in (residual.dtype, x.dtype):
        raise ValueError(f"{op}: residual {tuple(x.shape)} is {residual.dtype}; expected {x.dtype}, as x, or float32")
