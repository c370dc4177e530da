"""The kernels of SwiGLU and squared ReLU on a GPU: bfloat16."""

import pytest
import torch

from fastgpt_kernels import activation, torch_ops
from tests.helpers.parity import assert_op_agrees

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("op", ["swiglu", "relu2"])
@pytest.mark.parametrize("width", [33, 128, 344, 512, 1024, 2048, 11008])
def test_bfloat16_is_as_near_the_truth_as_stock_pytorch(width, op):
    torch.manual_seed(0)
    x = torch.randn(100, 2 * width, device="cuda").bfloat16()

    def plain(x):
        return getattr(torch_ops, op)(x.float()).to(x.dtype)

    assert_op_agrees(getattr(activation, op), op, [x], layout="gapped", plain=plain)
