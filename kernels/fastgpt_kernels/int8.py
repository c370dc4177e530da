"""A linear layer whose weight is stored in 8 bits, with a scale for each output channel.

    y = (x @ weight_int8.T) * scale + bias

Only the weight is quantized (Dettmers et al., 2022, "LLM.int8()", section 2, with a scale for each row); x keeps its
dtype, and sums are float32. Weights are converted in registers, so memory is read at one byte a weight. Decoding waits
for these reads and for little else.

Up to 4 rows of x take `_rows`: each program has a few output channels, its lanes share a row of the weight, and their
sums are added at the end. So few channels a program mean enough programs to fill a GPU at GPT-2's width without
splitting sums among them, which would need a second kernel, longer than the first. The rows of x are neighbours in the
grid, so that all but the first find the weight in the cache. More rows take `_product`, on tensor cores: there the
weight is the left factor, because tensor cores can take that from registers, where the conversion leaves it.

Each sum has a fixed order: the same bits in every run. There is no backward pass.

Twin: `reference.linear_int8`. Offered here: `linear_int8`; `quantization.quantize` makes its weights.
"""

import torch
import triton
import triton.language as tl

from fastgpt_kernels.launch import Launch, Tuning, as_rows, check_tensors, matmul_tuning, tiles, tuning

# Up to this many rows of x, each reads the weight itself; from the second row on, it comes from the cache.
FEW_ROWS = 4


@triton.jit
def _to_float32(weight):
    """int8 to float32, as a byte of a float32's mantissa: 2^23 + 128 + weight, minus the first two terms.

    The conversion instruction takes four times as long as an addition, and longer than reading the weight.
    """
    byte = (weight ^ -128).to(tl.uint8, bitcast=True).to(tl.uint32)
    return (byte | 0x4B000000).to(tl.float32, bitcast=True) - 8388736.0


@triton.jit
def _finish(sums, scale_ptr, bias_ptr, channel, outputs):
    """The outputs: sums, with output channels where `channel` has them, times the scale, plus the bias."""
    y = sums * tl.load(scale_ptr + channel, mask=channel < outputs, other=0.0)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + channel, mask=channel < outputs, other=0.0).to(tl.float32)
    return y


@triton.jit(do_not_specialize=["R"])
def _rows(
    y_ptr,  # (R, O)
    x_ptr,  # (R, I)
    weight_ptr,  # (O, I) int8
    scale_ptr,  # (O,) float32
    bias_ptr,  # (O,) or None
    x_stride, R, outputs, inputs,
    ROWS: tl.constexpr,  # output channels
    COLUMNS: tl.constexpr,  # inputs
    num_stages: tl.constexpr,  # Triton's option: this loop is pipelined only on request
):  # fmt: skip
    row = (tl.program_id(0) % R).to(tl.int64)
    channel = (tl.program_id(0) // R).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # channel * I passes 2**31
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in tl.range(0, inputs, COLUMNS, num_stages=num_stages):
        i = start + tl.arange(0, COLUMNS)
        x = tl.load(x_ptr + row * x_stride + i, mask=i < inputs, other=0.0)
        inside = (channel < outputs)[:, None] & (i < inputs)[None, :]
        weight = tl.load(weight_ptr + channel[:, None] * inputs + i[None, :], mask=inside, other=0)
        sums += _to_float32(weight) * x.to(tl.float32)[None, :]
    y = _finish(tl.sum(sums, axis=1), scale_ptr, bias_ptr, channel, outputs)
    tl.store(y_ptr + row * outputs + channel, y, mask=channel < outputs)


@triton.jit(do_not_specialize=["R"])
def _product(
    y_ptr,  # (R, O)
    x_ptr,  # (R, I)
    weight_ptr,  # (O, I) int8
    scale_ptr,  # (O,) float32
    bias_ptr,  # (O,) or None
    x_stride, R, outputs, inputs,
    DEPTH: tl.constexpr,  # inputs of one iteration
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,  # of x
    COLUMNS: tl.constexpr,  # output channels
):  # fmt: skip
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    channel = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    weight_row = channel[:, None]
    sums = tl.zeros([COLUMNS, ROWS], tl.float32)
    for start in range(0, inputs, DEPTH):
        i = start + tl.arange(0, DEPTH)[None, :]
        inside = (weight_row < outputs) & (i < inputs)
        weight = tl.load(weight_ptr + weight_row * inputs + i, mask=inside, other=0)
        x = tl.load(x_ptr + row * x_stride + i, mask=(row < R) & (i < inputs), other=0.0)
        sums = tl.dot(weight.to(x.dtype), tl.trans(x), sums, input_precision=PRECISION)
    channel = channel[None, :]
    y = _finish(tl.trans(sums), scale_ptr, bias_ptr, channel, outputs)
    tl.store(y_ptr + row * outputs + channel, y, mask=(row < R) & (channel < outputs))


def linear_launch(
    y: torch.Tensor, x: torch.Tensor, weight_int8: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None,
    tuning: Tuning,
) -> Launch:  # fmt: skip
    """The launch for rows x (R, I), y (R, O)."""
    (R, inputs), outputs = x.shape, len(weight_int8)
    args = (y, x, weight_int8, scale, bias, x.stride(0), R, outputs, inputs)
    if R <= FEW_ROWS:
        kind = "16-bit" if x.element_size() == 2 else "float32"  # there are no matrix products here
        row = Tuning(tuning.target, kind).row("int8_rows", outputs)
        return Launch("int8_rows", _rows, (R * tiles(outputs, row.rows),), args, row.constants())
    row = tuning.row("int8_product", R)
    # Few rows wait for the weight, so they read whole cache lines of it.
    depth = 32 if x.element_size() == 4 else 64 if row.rows > 16 else 128
    constants = {"DEPTH": depth, "PRECISION": "tf32" if tuning.kind == "tf32" else "ieee"} | row.constants()
    grid = (tiles(R, row.rows), tiles(outputs, row.columns))
    return Launch("int8_product", _product, grid, args, constants)


@torch.library.custom_op("fastgpt::linear_int8", mutates_args=())
def _linear_int8(
    x: torch.Tensor, weight_int8: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, out_dtype: torch.dtype
) -> torch.Tensor:
    y = _linear_int8_shape(x, weight_int8, scale, bias, out_dtype)
    if y.numel():
        row = (tuning if x.numel() <= FEW_ROWS * x.shape[-1] else matmul_tuning)(x.device, x.dtype)
        bias = None if bias is None else bias.contiguous()
        linear_launch(as_rows(y), as_rows(x), weight_int8, scale.contiguous(), bias, row)()
    return y


@_linear_int8.register_fake
def _linear_int8_shape(x, weight_int8, scale, bias, out_dtype):
    return x.new_empty(*x.shape[:-1], len(weight_int8), dtype=out_dtype)


def linear_int8(
    x: torch.Tensor,
    weight_int8: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """(x @ weight_int8.T) * scale + bias, as `reference.linear_int8`, in one kernel.

    Args:
        x: (..., I), with I of at least 1; its rows may lie any distance apart.
        weight_int8: int8 (O, I), contiguous.
        scale: float32 (O,).
        bias: (O,), in x's dtype or float32.
        out_dtype: of the result, to which the float32 sums are rounded; default x's. Logits are float32.

    Returns:
        (..., O), contiguous: the same bits in every run. No gradients.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, named with what was expected.
    """
    _check(x, weight_int8, scale, bias)
    return torch.ops.fastgpt.linear_int8(x, weight_int8, scale, bias, out_dtype or x.dtype)


def _check(x: torch.Tensor, weight_int8: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> None:
    op = "linear_int8"
    check_tensors(op, {"x": None, "scale": 1, "bias": 1}, x=x, scale=scale, bias=bias)
    shape, name = tuple(weight_int8.shape), "weight_int8"
    if weight_int8.dtype != torch.int8:
        raise ValueError(f"{op}: {name} {shape} is {weight_int8.dtype}; expected int8, as quantize gives it")
    if weight_int8.device != x.device:
        raise ValueError(f"{op}: {name} {shape} is on {weight_int8.device}; expected {x.device}, as x")
    if len(shape) != 2 or shape[1] != x.shape[-1] or shape[1] == 0:
        expected = f"(O, {x.shape[-1]}), as x {tuple(x.shape)}, with at least 1 column"
        raise ValueError(f"{op}: {name} has shape {shape}; expected {expected}")
    if not weight_int8.is_contiguous():
        raise ValueError(f"{op}: {name} {shape} has strides {weight_int8.stride()}; expected it contiguous")
    for name, t in (("scale", scale), ("bias", bias)):
        if t is not None and t.shape[0] != shape[0]:
            raise ValueError(f"{op}: {name} has shape {tuple(t.shape)}; expected ({shape[0]},), as weight_int8 {shape}")
    if scale.dtype != torch.float32:
        raise ValueError(f"{op}: scale {tuple(scale.shape)} is {scale.dtype}; expected torch.float32")
    if bias is not None and bias.dtype not in (x.dtype, torch.float32):
        raise ValueError(f"{op}: bias {tuple(bias.shape)} is {bias.dtype}; expected {x.dtype}, as x, or torch.float32")
