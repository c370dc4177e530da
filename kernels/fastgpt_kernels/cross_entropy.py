"""Linear cross-entropy that never holds all logits: loss and gradients, chunk by chunk of rows.

For each row x of C channels with target t, over the valid columns of the vocabulary:

    z = x weight^T      lse = log(sum(exp(z)))      loss = lse - z[t]      dz = softmax(z) - onehot(t)
    dx = dz weight      dweight = sum over rows of dz^T x

With a soft-cap c (Gemma team, 2024, "Gemma 2", section 2), where y = x weight^T, and dy takes the place of dz below:

    z = c tanh(y / c)      dy = dz (1 - (z / c)^2)

For each chunk, a product computes the logits in float32, one kernel turns them into dz, and two more products give dx
and dweight (after Hsu et al., 2024, "Liger Kernel", section 3.2). The products are PyTorch's own. Small chunks are
slow, so chunks are as large as LOGITS_BYTES allows. For "mean" and "sum" all this happens in the forward pass, so
nothing is computed twice. For "none", only the backward pass knows the gradient of each row's loss: it computes the
logits again and reads lse. Logits, statistics, losses, dx and the sum of dweight over the chunks are float32. dz has
x's dtype; if that is float32, dz overwrites the logits. dz does not contain the factor 1 / rows, which would underflow
in float16: gradients are scaled once, at the end, and rounded then.

Columns from `valid_vocab` on are padding: they stay out of the softmax and have gradient zero. Rows with `ignore_index`
do not count. Memory beyond the gradients: one chunk of logits and dz, dx and dweight in float32, and under autocast x
and weight in its dtype.

Twin: `reference.linear_cross_entropy`. Offered here: `linear_cross_entropy`.
"""

import math

import torch
import triton
import triton.language as tl

from fastgpt_kernels.launch import DEBUG, Launch, Tuning, autocast_dtype, check_tensors, tiles, tuning

LOGITS_BYTES = 512 * 2**20  # of one chunk of logits with dz
ALIGNMENT = 16  # rows of logits are padded to a multiple of this, so that loads are wide for every vocabulary
LOG2_E = tl.constexpr(math.log2(math.e))
REDUCTIONS = ("mean", "sum", "none")


@triton.jit
def _load_logits(logits_ptr, col, inside, softcap, CAPPED: tl.constexpr):
    """Some of a row's logits, capped, 0 where not `inside`. tanh(u) = 1 - 2 / (exp(2 u) + 1)."""
    z = tl.load(logits_ptr + col, mask=inside, other=0.0)
    if CAPPED:
        z = softcap * (1.0 - 2.0 / (tl.exp2(z * (2.0 * LOG2_E / softcap)) + 1.0))
    return z


@triton.jit(
    do_not_specialize=["valid", "ignore_index"],
    do_not_specialize_on_alignment=["loss_ptr", "lse_ptr", "targets_ptr", "factor_ptr"],  # a chunk may start anywhere
)
def _softmax_gradient(
    logits_ptr,  # (R, width) float32
    gradient_ptr,  # (R, width): may be the logits themselves; None without GRADIENT
    loss_ptr,  # (R,) float32, or None where lse is given
    lse_ptr,  # (R, 2) float32, the log-sum-exp in two parts: written, or read where there is no loss
    targets_ptr,  # (R,)
    factor_ptr,  # (R,) float32: multiplies each row's gradient, or None
    width, valid, ignore_index, softcap,
    CAPPED: tl.constexpr,
    GRADIENT: tl.constexpr,
    ROWS: tl.constexpr,  # 1
    COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * width
    if GRADIENT:
        gradient_ptr += row * width
    target = tl.load(targets_ptr + row)
    counted = target != ignore_index
    inside = (target >= 0) & (target < valid)
    if loss_ptr is not None:
        chosen = _load_logits(logits_ptr, target, inside, softcap, CAPPED)  # before dz overwrites it
        chosen = tl.where(inside, chosen, float("nan"))
        top = float("-inf")
        total = 0.0
        for start in range(0, valid, COLUMNS):
            col = start + tl.arange(0, COLUMNS)
            # Masked by the aligned width, because a mask by `valid` would make loads narrow.
            z = _load_logits(logits_ptr, col, col < width, softcap, CAPPED)
            z = tl.where(col < valid, z, float("-inf"))
            new_top = tl.maximum(top, tl.max(z))
            total = total * tl.exp2((top - new_top) * LOG2_E) + tl.sum(tl.exp2((z - new_top) * LOG2_E))
            top = new_top
        rest = tl.log2(total)  # stored separately: added to a large logit, it would be rounded away
        tl.store(lse_ptr + 2 * row, top)
        tl.store(lse_ptr + 2 * row + 1, rest)
        tl.store(loss_ptr + row, tl.where(counted, (top - chosen) + rest / LOG2_E, 0.0))
    else:
        top = tl.load(lse_ptr + 2 * row)
        rest = tl.load(lse_ptr + 2 * row + 1)
    if GRADIENT:
        factor = 1.0
        if factor_ptr is not None:
            factor = tl.load(factor_ptr + row)
        for start in range(0, width, COLUMNS):
            col = start + tl.arange(0, COLUMNS)
            capped = _load_logits(logits_ptr, col, col < width, softcap, CAPPED)
            z = tl.where(col < valid, capped, float("-inf"))
            dz = tl.exp2((z - top) * LOG2_E - rest) - tl.where(col == target, 1.0, 0.0)
            if CAPPED:
                dz *= 1.0 - (capped / softcap) * (capped / softcap)
            dz = tl.where(inside, dz * factor, float("nan"))
            tl.store(gradient_ptr + col, tl.where(counted, dz, 0.0), mask=col < width)


@triton.jit
def _scale(out_ptr, in_ptr, factor_ptr, N, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """out = in * factor over N numbers, in float32; the factor is a float32 scalar on the device.

    N stays specialized on multiples of 16: masked by any other number, loads would be narrow. Of gradients whose rows
    are a multiple of 16 wide, N always is one too, so their number of rows compiles nothing anew.
    """
    at = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    scaled = tl.load(in_ptr + at, mask=at < N, other=0.0).to(tl.float32) * tl.load(factor_ptr)
    tl.store(out_ptr + at, scaled, mask=at < N)


def gradient_launch(
    logits: torch.Tensor,  # (R, width) float32, contiguous
    gradient: torch.Tensor | None,  # (R, width), contiguous: of any dtype, or the logits themselves
    loss: torch.Tensor | None,
    lse: torch.Tensor,  # (R, 2)
    targets: torch.Tensor, factor: torch.Tensor | None, valid: int, ignore_index: int, softcap: float,
    tuning: Tuning,
) -> Launch:  # fmt: skip
    R, width = logits.shape
    row = tuning.row("cross_entropy", width)
    return Launch(
        "cross_entropy",
        _softmax_gradient,
        (R,),
        (logits, gradient, loss, lse, targets, factor, width, valid, ignore_index, softcap or 1.0),
        {"CAPPED": softcap > 0, "GRADIENT": gradient is not None} | row.constants(),
    )


def scale_launch(out: torch.Tensor, x: torch.Tensor, factor: torch.Tensor, tuning: Tuning) -> Launch:
    N = x.numel()
    row = tuning.row("scale", N)
    return Launch("scale", _scale, (tiles(N, row.columns),), (out, x, factor, N), row.constants())


def rows_per_chunk(rows: int, width: int, itemsize: int) -> int:
    """The rows of a chunk: at most what fits in LOGITS_BYTES, about equal for all chunks, in multiples of 128.

    `itemsize`: bytes of a logit, plus those of its gradient if that has its own buffer.
    """
    fitting = max(1, LOGITS_BYTES // (width * itemsize))
    chunks = max(1, math.ceil(rows / fitting))
    even = math.ceil(rows / chunks)
    return min(fitting, math.ceil(even / 128) * 128)


class _Chunks:
    """Computes logits, their gradient, dx and dweight for chunk after chunk of a batch's rows."""

    def __init__(
        self,
        x: torch.Tensor,  # (R, C)
        weight: torch.Tensor,  # (V, C)
        targets: torch.Tensor,  # (R,)
        valid: int, ignore_index: int, softcap: float, dtype: torch.dtype, need_dx: bool, need_dweight: bool,
    ):  # fmt: skip
        self.x, self.weight, self.targets = x.to(dtype), weight.to(dtype), targets.contiguous()
        self.valid, self.ignore_index, self.softcap = valid, ignore_index, softcap
        self.dx = x.new_empty(x.shape if need_dx else 0, dtype=torch.float32)
        self.dweight = weight.new_zeros(weight.shape if need_dweight else 0, dtype=torch.float32)

    def run(self, loss: torch.Tensor | None, lse: torch.Tensor, factor: torch.Tensor | None) -> None:
        """Fill loss (R,) and lse (R, 2), or only read lse if there is no loss, and compute the gradients needed."""
        (R, _), V = self.x.shape, len(self.weight)
        if R == 0:
            return
        width = math.ceil(V / ALIGNMENT) * ALIGNMENT
        with_gradient = self.dx.numel() > 0 or self.dweight.numel() > 0
        apart = with_gradient and self.x.dtype != torch.float32
        rows = rows_per_chunk(R, width, 4 + self.x.element_size() if apart else 4)
        logits = self.x.new_empty(min(rows, R), width, dtype=torch.float32)
        dz = self.x.new_empty(logits.shape) if apart else logits
        for start in range(0, R, rows):
            part = slice(start, min(start + rows, R))
            z, gradient = logits[: part.stop - start], dz[: part.stop - start]
            _multiply(z[:, :V], self.x[part], self.weight.t(), add=False)
            gradient_launch(
                z, gradient if with_gradient else None, None if loss is None else loss[part], lse[part],
                self.targets[part], None if factor is None else factor[part], self.valid, self.ignore_index,
                self.softcap, tuning(self.x.device, self.x.dtype),
            )()  # fmt: skip
            if self.dx.numel():
                _multiply(self.dx[part], gradient[:, :V], self.weight, add=False)
            if self.dweight.numel():
                _multiply(self.dweight, gradient[:, :V].t(), self.x[part], add=True)


def _multiply(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, add: bool) -> None:
    """out = a @ b, or out += a @ b, in float32 for factors of any dtype."""
    if a.dtype == torch.float32:
        torch.addmm(out, a, b, beta=add, out=out)
    elif a.device.type == "cuda":
        torch.addmm(out, a, b, out_dtype=torch.float32, beta=add, out=out)
    else:
        torch.addmm(out, a.float(), b.float(), beta=add, out=out)


@torch.library.custom_op("fastgpt::linear_cross_entropy_forward", mutates_args=())
def _forward(
    x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, ignore_index: int, valid: int, softcap: float,
    reduction: str, dtype: torch.dtype, need_dx: bool, need_dweight: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """(loss; lse (R, 2); a factor; dx and dweight before that factor, or empty tensors).

    lse holds each row's largest logit, and log2 of the sum of exp(z - largest). Products are in `dtype`. With
    reduction "none" the backward pass computes the gradients.
    """
    if x.device.type == "cpu" or DEBUG:
        _check_targets(targets, ignore_index, valid)
    _, lse, factor, dx, dweight = _forward_shapes(
        x, weight, targets, ignore_index, valid, softcap, reduction, dtype, need_dx, need_dweight
    )
    now = reduction != "none"
    flat = targets.reshape(-1)
    losses = lse.new_empty(len(lse))
    chunks = _Chunks(
        x.reshape(-1, x.shape[-1]), weight, flat, valid, ignore_index, softcap, dtype,
        need_dx and now, need_dweight and now,
    )  # fmt: skip
    chunks.run(losses, lse, None)
    factor.fill_(1.0)
    if not now:
        return losses.view(targets.shape), lse, factor, dx, dweight
    if reduction == "mean":
        torch.div(factor, (flat != ignore_index).sum().clamp(min=1), out=factor)
    return losses.sum() * factor, lse, factor, chunks.dx, chunks.dweight


@_forward.register_fake
def _forward_shapes(x, weight, targets, ignore_index, valid, softcap, reduction, dtype, need_dx, need_dweight):
    now = reduction != "none"
    R = targets.numel()
    loss = x.new_empty(() if now else targets.shape, dtype=torch.float32)
    lse, factor = x.new_empty((R, 2), dtype=torch.float32), x.new_empty((), dtype=torch.float32)
    dx = x.new_empty((R, x.shape[-1]) if need_dx and now else 0, dtype=torch.float32)
    dweight = weight.new_empty(weight.shape if need_dweight and now else 0, dtype=torch.float32)
    return loss, lse, factor, dx, dweight


@torch.library.custom_op("fastgpt::linear_cross_entropy_scale", mutates_args=())
def _scaled(x: torch.Tensor, factor: torch.Tensor, shape: list[int], dtype: torch.dtype) -> torch.Tensor:
    """x * factor, a float32 scalar, computed in float32 and returned in `dtype` and `shape`."""
    out = _scaled_shape(x, factor, shape, dtype)
    if x.numel():
        scale_launch(out, x, factor, tuning(x.device, x.dtype))()
    return out


@_scaled.register_fake
def _scaled_shape(x, factor, shape, dtype):
    return x.new_empty(shape, dtype=dtype)


@torch.library.custom_op("fastgpt::linear_cross_entropy_backward", mutates_args=())
def _backward(
    dloss: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, lse: torch.Tensor,
    ignore_index: int, valid: int, softcap: float, dtype: torch.dtype, need_dx: bool, need_dweight: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """(dx and dweight, or empty tensors, before a factor; the factor), for losses that were not reduced.

    The factor is the power of 2 above the largest dloss. Each row's dloss is divided by it and then multiplies dz. The
    quotient has dloss's own digits and is below 1, so 16 bits hold the product, rounded as in a plain backward pass.
    """
    dloss = dloss.reshape(-1).float().where(targets.reshape(-1) != ignore_index, 0.0)
    _, exponent = torch.frexp(dloss.abs().amax() if dloss.numel() else dloss.new_zeros(()))
    factor = torch.ldexp(dloss.new_ones(()), exponent)
    chunks = _Chunks(
        x.reshape(-1, x.shape[-1]), weight, targets.reshape(-1), valid, ignore_index, softcap, dtype,
        need_dx, need_dweight,
    )  # fmt: skip
    chunks.run(None, lse, dloss / factor)
    return chunks.dx, chunks.dweight, factor


@_backward.register_fake
def _backward_shapes(dloss, x, weight, targets, lse, ignore_index, valid, softcap, dtype, need_dx, need_dweight):
    dx = x.new_empty((targets.numel(), x.shape[-1]) if need_dx else 0, dtype=torch.float32)
    dweight = weight.new_empty(weight.shape if need_dweight else 0, dtype=torch.float32)
    return dx, dweight, x.new_empty((), dtype=torch.float32)


def _save(ctx, inputs, output):
    x, weight, targets, *settings = inputs
    ctx.ignore_index, ctx.valid, ctx.softcap, ctx.reduction, ctx.dtype, ctx.need_dx, ctx.need_dweight = settings
    _, lse, factor, dx, dweight = output
    ctx.shapes, ctx.dtypes = (x.shape, weight.shape), (x.dtype, weight.dtype)
    if ctx.reduction == "none":
        ctx.save_for_backward(x, weight, targets, lse)
    else:
        ctx.save_for_backward(factor, dx, dweight)
    ctx.mark_non_differentiable(lse, factor, dx, dweight)
    ctx.set_materialize_grads(False)  # would make zeros for dx and dweight, as large as they are


def _backward_of_loss(ctx, dloss, *_others):
    if ctx.reduction == "none":
        arguments = (ctx.ignore_index, ctx.valid, ctx.softcap, ctx.dtype, ctx.need_dx, ctx.need_dweight)
        *gradients, factor = torch.ops.fastgpt.linear_cross_entropy_backward(dloss, *ctx.saved_tensors, *arguments)
    else:
        factor, *gradients = ctx.saved_tensors
        factor = dloss * factor
    dx, dweight = (
        torch.ops.fastgpt.linear_cross_entropy_scale(gradient, factor, shape, dtype) if needed else None
        for gradient, shape, dtype, needed in zip(
            gradients, ctx.shapes, ctx.dtypes, (ctx.need_dx, ctx.need_dweight), strict=True
        )
    )
    return dx, dweight, *[None] * 8


_forward.register_autograd(_backward_of_loss, setup_context=_save)


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
    """Cross-entropy of the logits x @ weight.T, as `reference.linear_cross_entropy`, without all logits in memory.

    Args:
        x: (..., C). weight: (V, C), in x's dtype; under autocast any, and products are in autocast's.
        targets: integer (...), each below valid_vocab or ignore_index. On a GPU the caller must ensure this, because
            a check would wait for the GPU: any other target makes loss and gradients NaN. FASTGPT_DEBUG=1 in the
            environment checks all targets.
        ignore_index: rows with this target have loss 0 and do not count.
        valid_vocab: columns from here on are padding and stay out of the softmax; default V.
        reduction: "mean" over the rows that count (0 where none does), "sum", or "none" for (...).
        softcap: above 0; the logits are softcap * tanh(logits / softcap).

    Returns:
        Float32, in nats. Gradients are computed in the forward pass, and only where x or weight needs one; with
        reduction "none", in the backward pass.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, a target out of range where they are checked, a
            soft-cap that is not above 0.
    """
    autocast = autocast_dtype(x.device)
    valid = weight.shape[0] if valid_vocab is None else valid_vocab
    _check(x, weight, targets, valid, reduction, softcap, autocast)
    grad = torch.is_grad_enabled()
    need_dx, need_dweight = grad and x.requires_grad, grad and weight.requires_grad
    return torch.ops.fastgpt.linear_cross_entropy_forward(
        x, weight, targets, ignore_index, valid, softcap or 0.0, reduction, autocast or x.dtype, need_dx, need_dweight
    )[0]


def _check(
    x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor,
    valid: int, reduction: str, softcap: float | None, autocast: torch.dtype | None,
) -> None:  # fmt: skip
    op = "linear_cross_entropy"
    check_tensors(op, {"x": None, "weight": 2}, x=x, weight=weight)
    if x.shape[-1] == 0:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}; expected at least 1 column")
    if weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"{op}: weight has shape {tuple(weight.shape)}; expected (V, {x.shape[-1]}), as x {tuple(x.shape)}"
        )
    if weight.dtype != x.dtype and autocast is None:
        raise ValueError(f"{op}: weight {tuple(weight.shape)} is {weight.dtype}; expected {x.dtype}, as x")
    if targets.shape != x.shape[:-1] or targets.device != x.device:
        raise ValueError(
            f"{op}: targets has shape {tuple(targets.shape)} on {targets.device}; "
            f"expected {tuple(x.shape[:-1])} on {x.device}, as x"
        )
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise ValueError(f"{op}: targets {tuple(targets.shape)} is {targets.dtype}; expected an integer dtype")
    if not 1 <= valid <= weight.shape[0]:
        raise ValueError(f"{op}: valid_vocab is {valid}; expected 1 to {weight.shape[0]}, the rows of weight")
    if reduction not in REDUCTIONS:
        raise ValueError(f"{op}: reduction {reduction!r} is not one of {', '.join(REDUCTIONS)}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"{op}: softcap is {softcap}; expected a number above 0, or None")


def _check_targets(targets: torch.Tensor, ignore_index: int, valid: int) -> None:
    wrong = targets[(targets != ignore_index) & ((targets < 0) | (targets >= valid))]
    if wrong.numel():
        raise ValueError(
            f"linear_cross_entropy: targets {tuple(targets.shape)} holds {wrong[0].item()}; expected 0 to "
            f"{valid - 1}, or ignore_index {ignore_index}"
        )
