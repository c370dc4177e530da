"""Linear layers with a weight of 8 bits: every backend against float64, guarded and poisoned; and quantization.

What nothing was written to is NaN.
"""

import math

import pytest
import torch
import torch._dynamo  # at once, as it keeps torch's functions, and is not to keep the ones of `poisoned`
from hypothesis import strategies as st

from fastgpt_kernels import int8, launch, reference, torch_ops
from fastgpt_kernels.int8 import linear_int8
from fastgpt_kernels.quantization import quantize
from tests.helpers.int8_cases import assert_agrees, case, truth
from tests.helpers.parity import DEVICE, relative_errors, zeros
from tests.helpers.random_cases import random_cases

DTYPES = [torch.float32, torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float16"])
biases = pytest.mark.parametrize("bias", [None, "x", torch.float32], ids=["no bias", "bias", "float32 bias"])


@random_cases(
    3,
    40,
    rows=st.one_of(st.integers(1, int8.FEW_ROWS), st.integers(1, 70)),
    outputs=st.integers(1, 40),
    inputs=st.one_of(st.integers(1, 70), st.integers(1, 300), st.just(256)),
    bias=st.sampled_from([None, "x", torch.float32]),
    layout=st.sampled_from(["dense", "gapped", "transposed", "expanded"]),
    seed=st.integers(0, 99),
)
@dtypes
def test_it_agrees_at_any_shape(dtype, rows, outputs, inputs, bias, layout, seed):
    assert_agrees(case((rows, inputs), outputs, bias, dtype=dtype, layout=layout, seed=seed))


@biases
@dtypes
@pytest.mark.parametrize("shape", [(33,), (1, 33), (2, 2, 33), (3, 7, 33), (2, 0, 33), (0, 33)])
@pytest.mark.covering_array(1)
def test_every_backend_keeps_the_shape_and_the_dtype(shape, dtype, bias, launches):
    made = case(shape, 20, bias, dtype=dtype, layout="swapped")
    if math.prod(shape):
        assert_agrees(made)
        assert [made.name for made in launches] == [
            "int8_product" if math.prod(shape[:-1]) > int8.FEW_ROWS else "int8_rows"
        ]
    for backend in (reference.linear_int8, torch_ops.linear_int8, linear_int8):
        y = backend(*made)
        assert (y.shape, y.dtype) == ((*shape[:-1], 20), dtype)
    assert len(launches) == 2 * (math.prod(shape) > 0)


@pytest.mark.parametrize("rows", [2, 9])
def test_without_outputs_the_result_is_empty(rows, launches):
    x, weight_int8, scale, _ = case((rows, 8), 3)
    for backend in (reference.linear_int8, torch_ops.linear_int8, linear_int8):
        assert backend(x, weight_int8[:0], scale[:0]).shape == (rows, 0)
    assert not launches


@pytest.mark.parametrize("tile", [(16, 16), (32, 64), (64, 32), (128, 16)])
def test_it_agrees_in_every_tile(tile, monkeypatch):
    row = launch._row
    monkeypatch.setattr(
        launch,
        "_row",
        lambda kernel, *rest: launch.Config(*tile, 4, 2) if kernel == "int8_product" else row(kernel, *rest),
    )
    for rows in (5, 70):
        assert_agrees(case((rows, 70), 65, "x"))


@pytest.mark.parametrize("rows", [1, 40])
def test_the_largest_weights_do_not_overflow(rows):
    """127 * 40 * 300 is past float16's largest number, the scaled sum is not; and -128 is a weight like others."""
    weight_int8 = torch.full((3, 300), 127, dtype=torch.int8, device=DEVICE)
    weight_int8[1] = -127
    weight_int8[2] = -128
    x = torch.full((rows, 300), 40.0, dtype=torch.float16, device=DEVICE)
    made = (x, weight_int8, torch.full((3,), 1e-3, device=DEVICE), None)
    assert_agrees(made)
    for y in (
        torch_ops.linear_int8(*made),
        torch_ops._traceable_linear_int8(*made, x.dtype),
        reference.linear_int8(*made),
    ):
        assert relative_errors(y, truth(*made))[0] < 1e-3


def test_every_weight_is_converted_as_it_is():
    """All 256, each by itself, by both kernels."""
    weight_int8 = torch.arange(-128, 128, device=DEVICE).to(torch.int8)[:, None]
    one = torch.ones(256, device=DEVICE)
    for rows in (1, 5):
        x = torch.ones(rows, 1, device=DEVICE)
        assert torch.equal(linear_int8(x, weight_int8, one), weight_int8.t().float().expand(rows, 256))


@pytest.mark.parametrize("backend", [int8, torch_ops, reference], ids=["triton", "torch", "reference"])
@pytest.mark.parametrize("rows", [1, 20])
def test_a_float32_result_of_16_bit_rows_is_not_rounded(rows, backend):
    made = case((rows, 300), 33, "x", dtype=torch.float16)
    y = backend.linear_int8(*made, out_dtype=torch.float32)
    assert y.dtype == torch.float32
    assert max(relative_errors(y, truth(*made))) < 1e-5


def test_the_same_bits_in_every_run():
    for rows in (1, 20):
        made = case((rows, 300), 33, "x", dtype=torch.float16)
        assert torch.equal(linear_int8(*made), linear_int8(*made))


# Of the torch backend: one row and some, pieces that do not divide the weight, widths that int8pack cannot read.
STOCK = [((1, 64), 40), ((16, 96), 7), ((17, 64), 40), ((3, 40), 5), ((2, 300), 2000), ((40, 70), 130)]


@biases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize(("shape", "outputs"), STOCK)
def test_the_paths_of_stock_pytorch_agree_with_float64(shape, outputs, dtype, bias):
    """Those of a CPU, of a GPU and of torch.compile, all of which run on a CPU too."""
    x, weight_int8, scale, b = made = case(shape, outputs, bias, dtype=dtype)
    exact = truth(*made)
    unbiased = exact if b is None else exact - b.double()
    # Two roundings, and that of the scale, each of half a step of the dtype.
    most = 1e-6 if dtype == torch.float32 else 1.5 * torch.finfo(dtype).eps
    for y, expected in (
        (torch_ops.linear_int8(*made), exact),
        (torch_ops._traceable_linear_int8(*made, dtype), exact),
        (torch_ops._linear_of_dequantized(x, weight_int8, scale, dtype), unbiased),
    ):
        assert y.dtype == dtype
        assert max(relative_errors(y, expected)) < most
    for y, expected in (
        (torch_ops.linear_int8(*made, out_dtype=torch.float32), exact),
        (torch_ops._traceable_linear_int8(*made, torch.float32), exact),
        (torch_ops._linear_of_dequantized(x, weight_int8, scale, torch.float32), unbiased),
    ):
        assert y.dtype == torch.float32
        assert max(relative_errors(y, expected)) < 1e-6
    for other in (torch.float16, torch.bfloat16):
        y = torch_ops._linear_of_dequantized(x, weight_int8, scale, other)
        assert y.dtype == other
        assert max(relative_errors(y, unbiased)) < 3 * torch.finfo(torch.bfloat16).eps


@pytest.mark.skipif(DEVICE != "cpu", reason="of the torch backend on a CPU")
@pytest.mark.parametrize("rows", [1, 20])
def test_pieces_of_a_large_weight_make_one_output(rows):
    """More than the 2^18 and 2^22 weights that the torch backend takes at a time."""
    torch.manual_seed(0)
    inputs = 96 if rows == 1 else 1500
    made = case((rows, inputs), 3000, "x")
    assert max(relative_errors(torch_ops.linear_int8(*made), truth(*made))) < 1e-6


@pytest.mark.parametrize("bias", [None, "x"])
@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.covering_array(1)
def test_the_operator_passes_opcheck(rows, bias):
    for out_dtype in (torch.float32, torch.float16):
        torch.library.opcheck(torch.ops.fastgpt.linear_int8.default, (*case((2, rows, 33), 20, bias), out_dtype))


@pytest.mark.parametrize("backend", [int8, torch_ops, reference], ids=["triton", "torch", "reference"])
@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.covering_array(1)
def test_compiled_in_one_graph_it_gives_the_same(rows, backend):
    torch._dynamo.reset()
    made = case((rows, 64), 48, "x")
    compiled = torch.compile(backend.linear_int8, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*made), backend.linear_int8(*made), rtol=1e-5, atol=1e-5)


def test_there_is_no_gradient():
    x, weight_int8, scale, _ = case((2, 8), 3)
    with pytest.raises(RuntimeError, match="backward"):
        linear_int8(x.requires_grad_(), weight_int8, scale).sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantized_weights_are_off_by_half_a_step_at_most(dtype):
    torch.manual_seed(0)
    weight = torch.randn(33, 70).to(dtype) * torch.logspace(-6, 6, 33, dtype=dtype)[:, None]
    weight_int8, scale = quantize(weight)
    assert (weight_int8.dtype, scale.dtype) == (torch.int8, torch.float32)
    assert weight_int8.is_contiguous()
    assert weight_int8.abs().amax(1).tolist() == [127] * 33
    steps = scale.double()[:, None]
    # Beyond the half step, only what float32 rounds in the scale and in the quotient.
    assert ((weight.double() - weight_int8.double() * steps).abs() <= steps * (0.5 + 127 * 2**-23)).all()
    torch.testing.assert_close(scale, weight.float().abs().amax(1) / 127)


def test_quantizing_rounds_to_even_and_keeps_zeros_and_signs():
    weight = torch.tensor([[127.0, 0.5, 1.5, -2.5], [0.0, 0.0, -0.0, 0.0], [-127.0, -0.5, 3.49, 3.51]])
    weight_int8, scale = quantize(weight)
    assert weight_int8.tolist() == [[127, 0, 2, -2], [0, 0, 0, 0], [-127, 0, 3, 4]]
    assert scale.tolist() == [1, 1, 1]
    smallest = torch.full((1, 2), 1e-45)  # over 127 it is no number, and then it is 0
    assert quantize(smallest)[0].tolist() == [[0, 0]]
    weight_int8, scale = quantize(torch.empty(2, 0).t().contiguous())
    assert (weight_int8.shape, scale.shape) == ((0, 2), (0,))
    weight_int8, scale = quantize(torch.empty(2, 0))
    assert (weight_int8.shape, scale.tolist()) == ((2, 0), [1, 1])
    weight_int8, scale = quantize(torch.empty(2, 3, device="meta"))
    assert (weight_int8.shape, weight_int8.dtype, scale.shape) == ((2, 3), torch.int8, (2,))


def test_quantizing_names_what_is_no_weight():
    with pytest.raises(ValueError, match=r"weight has shape \(3,\), torch.float32; expected floating \(O, I\)"):
        quantize(torch.zeros(3))
    with pytest.raises(ValueError, match=r"torch.int8; expected floating"):
        quantize(torch.zeros(3, 2, dtype=torch.int8))
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match=r"weight \(2, 2\) holds inf or NaN"):
            quantize(torch.tensor([[1.0, 2.0], [bad, 0.0]]))


BYTE, HALF = torch.int8, torch.float16
RIGHT = {"x": zeros(2, 8), "weight_int8": zeros(4, 8, dtype=BYTE), "scale": zeros(4), "bias": zeros(4)}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"x": zeros()}, "x has shape (); expected at least 1 dimension"),
        ({"x": zeros(2, 8, dtype=BYTE)}, "x (2, 8) is torch.int8; expected float32, float16 or bfloat16"),
        ({"weight_int8": zeros(4, 8)}, "weight_int8 (4, 8) is torch.float32; expected int8, as quantize gives it"),
        ({"weight_int8": zeros(4, 8, dtype=torch.uint8)}, "weight_int8 (4, 8) is torch.uint8; expected int8"),
        ({"weight_int8": zeros(4, 9, dtype=BYTE)}, "weight_int8 has shape (4, 9); expected (O, 8), as x (2, 8)"),
        ({"weight_int8": zeros(8, dtype=BYTE)}, "weight_int8 has shape (8,); expected (O, 8), as x (2, 8)"),
        ({"x": zeros(2, 0), "weight_int8": zeros(4, 0, dtype=BYTE)}, "(4, 0); expected (O, 0), as x (2, 0), with at"),
        ({"weight_int8": zeros(8, 4, dtype=BYTE).t()}, "weight_int8 (4, 8) has strides (1, 4); expected it contiguous"),
        ({"weight_int8": zeros(4, 8, dtype=BYTE, device="meta")}, "weight_int8 (4, 8) is on meta; expected cpu, as x"),
        ({"scale": zeros(4, 1)}, "scale has shape (4, 1); expected 1 dimensions"),
        ({"scale": zeros(3)}, "scale has shape (3,); expected (4,), as weight_int8 (4, 8)"),
        ({"scale": zeros(4, dtype=HALF)}, "scale (4,) is torch.float16; expected torch.float32"),
        ({"bias": zeros(1)}, "bias has shape (1,); expected (4,), as weight_int8 (4, 8)"),
        ({"bias": zeros(4, dtype=HALF)}, "bias (4,) is torch.float16; expected torch.float32, as x, or torch.float32"),
    ],
)
def test_it_names_what_does_not_fit(changed, words):
    if DEVICE != "cpu" and "cpu" in words:
        pytest.skip("on a GPU the device has another name")
    with pytest.raises(ValueError) as caught:
        linear_int8(**(RIGHT | changed))
    assert str(caught.value).startswith("linear_int8: ")
    assert words in str(caught.value)
