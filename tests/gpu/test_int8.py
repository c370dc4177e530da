"""The linear layer with a weight of 8 bits on a GPU: `pytest -m gpu`."""

import pytest
import torch

from fastgpt_kernels import int8, torch_ops
from fastgpt_kernels.int8 import linear_int8
from fastgpt_kernels.quantization import quantize
from tests.helpers.int8_cases import assert_agrees, case, truth
from tests.helpers.parity import DEVICE, assert_parity, relative_errors

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def products_in_full_precision():
    """float32 products are those of float32, not of TF32, here and in stock PyTorch."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


# GPT-2's layers and its output layer, and widths that fit no tile.
LAYERS = [(768, 2304), (3072, 768), (768, 50257), (1600, 4800), (33, 70), (1, 1)]  # inputs, outputs
layers = pytest.mark.parametrize(("inputs", "outputs"), LAYERS)
dtypes = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32], ids=lambda dtype: str(dtype)[6:]
)


@dtypes
@layers
@pytest.mark.parametrize("rows", [1, int8.FEW_ROWS, int8.FEW_ROWS + 1, 16, 64, 1000])
def test_it_agrees_with_float64_as_nearly_as_stock_pytorch_does(rows, inputs, outputs, dtype):
    assert_agrees(case((rows, inputs), outputs, "x", dtype=dtype, layout="gapped"))


@pytest.mark.parametrize("rows", [1, 16, 300])
def test_tf32_agrees_as_nearly_as_that_of_stock_pytorch(rows):
    torch.set_float32_matmul_precision("high")
    made = case((rows, 768), 2304)
    error, plain = (relative_errors(f(*made), truth(*made))[0] for f in (linear_int8, torch_ops.linear_int8))
    assert error <= max(2 * plain, 1e-5)


@pytest.mark.parametrize("rows", [1, 4, 16, 64, 500])
def test_twenty_runs_give_the_same_bits(rows):
    made = case((rows, 3072), 768, "x", dtype=torch.bfloat16)
    first = linear_int8(*made)
    for _ in range(20):
        assert torch.equal(linear_int8(*made), first)


@pytest.mark.parametrize("rows", [1, 8])
def test_a_graph_that_is_replayed_gives_the_same_bits(rows):
    x, *rest = case((rows, 768), 2304, "x", dtype=torch.bfloat16)
    expected = linear_int8(x, *rest)
    buffer = torch.zeros_like(x)
    linear_int8(buffer, *rest)  # compiled before it is captured
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = linear_int8(buffer, *rest)
    buffer.copy_(x)
    graph.replay()
    assert torch.equal(y, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("rows", [1, 8])
def test_stock_pytorch_compiled_agrees(rows, dtype):
    torch._dynamo.reset()
    made = case((rows, 768), 2304, "x", dtype=dtype)
    compiled = torch.compile(torch_ops.linear_int8, fullgraph=True)
    assert_parity([compiled(*made)], [torch_ops.linear_int8(*made)], [truth(*made)])


@pytest.mark.parametrize("rows", [1, 5])
def test_a_weight_of_more_than_2_31_bytes_is_read_to_its_end(rows):
    torch.manual_seed(0)
    inputs, outputs = 4096, 2**19 + 5
    weight_int8 = torch.zeros(outputs, inputs, dtype=torch.int8, device=DEVICE)
    weight_int8[-3:], scale = quantize(torch.randn(3, inputs, device=DEVICE))
    x = torch.randn(rows, inputs, device=DEVICE).bfloat16()
    y = linear_int8(x, weight_int8, scale.repeat(outputs // 3 + 1)[-outputs:])
    assert not y[:, :-3].any()
    exact = x.double() @ (weight_int8[-3:].double() * scale.double()[:, None]).t()
    assert max(relative_errors(y[:, -3:], exact)) < torch.finfo(torch.bfloat16).eps
