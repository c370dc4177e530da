"""The backward pass of LayerNorm and RMSNorm, alone and with the residual addition before them.

With n = (x - mean) * rstd and g = dy * weight, for each row of C columns:

    dx = (g - sum(g) / C - n * sum(g * n) / C) * rstd  [+ dtotal]      dweight = sum of dy * n      dbias = sum of dy

In RMSNorm mean and sum(g) are 0, and without a weight g is dy. A fixed number of programs each sum dweight and dbias
over their own rows. A second kernel adds the partial sums in a fixed order, so the result is the same in every run. One
kernel computes all three gradients of rows of up to 8192 columns, which it holds whole. Longer rows take one kernel for
dx, which loops over a row in tiles, and one for the partial sums. All sums are float32.

Twins: the gradients that autograd derives from `reference.layer_norm`, `reference.rms_norm` and those with `add_`.
Offered here, for `norm`: the operation fastgpt::norm_backward, and `load`.
"""

import torch
import triton
import triton.language as tl

from fastgpt_kernels.launch import Launch, Tuning, as_rows, tiles, tuning


@triton.jit
def load(pointers, inside):
    """Numbers in float32, 0 where not `inside`."""
    return tl.load(pointers, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _load_rows(x_ptr, dy_ptr, mean_ptr, rstd_ptr, x_stride, dy_stride, row, col, inside, R):
    """x and dy, (ROWS, COLUMNS), with the rows' mean, if there is one, and rstd, (ROWS, 1)."""
    x = load(x_ptr + row * x_stride + col, inside)
    dy = load(dy_ptr + row * dy_stride + col, inside)
    mean = load(mean_ptr + row, row < R) if mean_ptr is not None else 0.0
    rstd = load(rstd_ptr + row, row < R)
    return x, dy, mean, rstd


@triton.jit
def _load_tile(x_ptr, dy_ptr, weight_ptr, x_stride, dy_stride, row, col, inside):
    """x and g = dy * weight, if there is one, of a part of a row."""
    x = load(x_ptr + row * x_stride + col, inside)
    g = load(dy_ptr + row * dy_stride + col, inside)
    if weight_ptr is not None:
        g *= load(weight_ptr + col, inside)
    return x, g


@triton.jit
def _store_dx(dx_ptr, dresidual_ptr, dtotal_ptr, dtotal_stride, dx, row, col, inside, C):
    """Add the gradient that reaches the sum by other ways, and store the result once for each dtype."""
    if dtotal_ptr is not None:
        dx += load(dtotal_ptr + row * dtotal_stride + col, inside)
    tl.store(dx_ptr + row * C + col, dx, mask=inside)
    if dresidual_ptr is not None:
        tl.store(dresidual_ptr + row * C + col, dx, mask=inside)


@triton.jit
def _store_partials(dweight_ptr, dbias_ptr, dweight, dbias, col, C):
    """This program's sums over its rows."""
    partial = tl.program_id(0).to(tl.int64) * C + col
    if dweight_ptr is not None:
        tl.store(dweight_ptr + partial, tl.sum(dweight, axis=0), mask=col < C)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + partial, tl.sum(dbias, axis=0), mask=col < C)


@triton.jit(do_not_specialize=["R"])
def _backward(
    dx_ptr,  # (R, C)
    dresidual_ptr,  # (R, C), or None where dx serves for both
    dweight_ptr, dbias_ptr,  # (programs, C) float32, partial sums, or None
    dtotal_ptr,  # (R, C) or None
    dy_ptr, x_ptr,  # (R, C)
    mean_ptr,  # (R,), or None for RMSNorm
    rstd_ptr,  # (R,)
    weight_ptr,  # (C,) or None
    dtotal_stride, dy_stride, x_stride, R, C,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    col = tl.arange(0, COLUMNS)
    weight = load(weight_ptr + col, col < C)[None, :] if weight_ptr is not None else 1.0
    dweight = tl.zeros([ROWS, COLUMNS], tl.float32)
    dbias = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(program * ROWS, R, programs * ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        inside = (row < R) & (col < C)[None, :]
        x, dy, mean, rstd = _load_rows(
            x_ptr, dy_ptr, mean_ptr, rstd_ptr, x_stride, dy_stride, row, col[None, :], inside, R
        )
        n = tl.where(inside, (x - mean) * rstd, 0.0)
        g = dy * weight
        mean_g = tl.sum(g, axis=1, keep_dims=True) / C if mean_ptr is not None else 0.0
        mean_gn = tl.sum(g * n, axis=1, keep_dims=True) / C
        dx = (g - mean_g - n * mean_gn) * rstd
        _store_dx(dx_ptr, dresidual_ptr, dtotal_ptr, dtotal_stride, dx, row, col[None, :], inside, C)
        dweight += dy * n
        dbias += dy
    _store_partials(dweight_ptr, dbias_ptr, dweight, dbias, col, C)


@triton.jit(do_not_specialize=["R"])
def _backward_in_tiles(
    dx_ptr,  # (R, C)
    dresidual_ptr, dtotal_ptr,  # (R, C) or None
    dy_ptr, x_ptr, mean_ptr, rstd_ptr, weight_ptr,  # as for `_backward`
    dtotal_stride, dy_stride, x_stride, R, C,
    ROWS: tl.constexpr,  # 1
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """dx of one row, in two passes over it; `_weight_partials` has the other gradients."""
    row = tl.program_id(0).to(tl.int64)
    mean = tl.load(mean_ptr + row) if mean_ptr is not None else 0.0
    rstd = tl.load(rstd_ptr + row)
    sum_g = 0.0
    sum_gn = 0.0
    for start in range(0, C, COLUMNS):
        col = start + tl.arange(0, COLUMNS)
        x, g = _load_tile(x_ptr, dy_ptr, weight_ptr, x_stride, dy_stride, row, col, col < C)
        if mean_ptr is not None:
            sum_g += tl.sum(g)
        sum_gn += tl.sum(g * (x - mean) * rstd)
    for start in range(0, C, COLUMNS):
        col = start + tl.arange(0, COLUMNS)
        x, g = _load_tile(x_ptr, dy_ptr, weight_ptr, x_stride, dy_stride, row, col, col < C)
        dx = (g - sum_g / C - (x - mean) * rstd * (sum_gn / C)) * rstd
        _store_dx(dx_ptr, dresidual_ptr, dtotal_ptr, dtotal_stride, dx, row, col, col < C, C)


@triton.jit(do_not_specialize=["R"])
def _weight_partials(
    dweight_ptr,  # (programs, C) float32
    dbias_ptr,  # (programs, C) float32, or None
    dy_ptr, x_ptr, mean_ptr, rstd_ptr,  # as for `_backward`
    dy_stride, x_stride, R, C,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Partial sums of dweight and dbias over some rows, for a tile of columns."""
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    col = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    dweight = tl.zeros([ROWS, COLUMNS], tl.float32)
    dbias = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(program * ROWS, R, programs * ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        inside = (row < R) & (col < C)[None, :]
        x, dy, mean, rstd = _load_rows(
            x_ptr, dy_ptr, mean_ptr, rstd_ptr, x_stride, dy_stride, row, col[None, :], inside, R
        )
        dweight += dy * (x - mean) * rstd
        dbias += dy
    _store_partials(dweight_ptr, dbias_ptr, dweight, dbias, col, C)


@triton.jit(do_not_specialize=["N"])
def _sum_partials(
    out_ptr,  # (C,)
    partials_ptr,  # (N, C) float32
    N, C, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    col = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, N, ROWS):
        row = tl.cast(start, tl.int64) + tl.arange(0, ROWS)[:, None]
        total += tl.load(partials_ptr + row * C + col[None, :], mask=(row < N) & (col < C)[None, :], other=0.0)
    tl.store(out_ptr + col, tl.sum(total, axis=0), mask=col < C)


def backward_launches(
    dx: torch.Tensor, dresidual: torch.Tensor | None, dweight: torch.Tensor | None, dbias: torch.Tensor | None,
    dtotal: torch.Tensor | None, dy: torch.Tensor, x: torch.Tensor, mean: torch.Tensor | None, rstd: torch.Tensor,
    weight: torch.Tensor | None, tuning: Tuning,
) -> list[Launch]:  # fmt: skip
    """The launches of a backward pass in their order."""
    R, C = x.shape
    kind = "rms_norm" if mean is None else "norm"
    row = tuning.row(f"{kind}_backward", C)
    programs = min(tuning.programs, tiles(R, row.rows))
    partials = [None if t is None else x.new_empty(programs, C, dtype=torch.float32) for t in (dweight, dbias)]
    inputs = (dtotal, dy, x, mean, rstd, weight)
    sizes = (0 if dtotal is None else dtotal.stride(0), dy.stride(0), x.stride(0), R, C)
    if row.columns >= C:
        args = (dx, dresidual, *partials, *inputs, *sizes)
        launches = [Launch(f"{kind}_backward", _backward, (programs,), args, row.constants())]
    else:
        args = (dx, dresidual, *inputs, *sizes)
        launches = [Launch(f"{kind}_backward", _backward_in_tiles, (R,), args, row.constants())]
        if dweight is not None:
            by_column = tuning.row(f"{kind}_weight_partials", C)
            grid = (programs, tiles(C, by_column.columns))
            args = (*partials, dy, x, mean, rstd, *sizes[1:])
            launches.append(Launch(f"{kind}_weight_partials", _weight_partials, grid, args, by_column.constants()))
    last = tuning.row("sum_partials", C)
    for out, parts in zip((dweight, dbias), partials, strict=True):
        if out is not None:
            grid = (tiles(C, last.columns),)
            launches.append(Launch("sum_partials", _sum_partials, grid, (out, parts, programs, C), last.constants()))
    return launches


@torch.library.custom_op("fastgpt::norm_backward", mutates_args=())
def _norm_backward(
    dtotal: torch.Tensor | None, dy: torch.Tensor,
    x: torch.Tensor, weight: torch.Tensor | None, mean: torch.Tensor | None, rstd: torch.Tensor,
    has_bias: bool, x_dtype: torch.dtype, residual_dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """(dx; dresidual where its dtype differs from dx's; dweight; dbias), each an empty tensor where there is none.

    `x` is what was normalized: the sum, where there is a residual. RMSNorm has no `mean`.
    """
    dx, dresidual, dweight, dbias = outputs = _norm_backward_shapes(
        dtotal, dy, x, weight, mean, rstd, has_bias, x_dtype, residual_dtype
    )
    if x.numel() == 0:
        dweight.zero_()
        dbias.zero_()
        return outputs
    for launch in backward_launches(
        as_rows(dx), as_rows(dresidual) if dresidual.numel() else None,
        None if weight is None else dweight, dbias if has_bias else None,
        None if dtotal is None else as_rows(dtotal), as_rows(dy), as_rows(x), mean, rstd,
        None if weight is None else weight.contiguous(), tuning(x.device, x.dtype),
    ):  # fmt: skip
        launch()
    return outputs


@_norm_backward.register_fake
def _norm_backward_shapes(dtotal, dy, x, weight, mean, rstd, has_bias, x_dtype, residual_dtype):
    dx = x.new_empty(x.shape, dtype=x_dtype)
    apart = residual_dtype is not None and residual_dtype != x_dtype
    dresidual = x.new_empty(x.shape, dtype=residual_dtype) if apart else x.new_empty(0)
    like = x if weight is None else weight
    dweight, dbias = (like.new_empty(x.shape[-1] if there else 0) for there in (weight is not None, has_bias))
    return dx, dresidual, dweight, dbias
