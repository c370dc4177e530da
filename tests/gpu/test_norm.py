"""The LayerNorm and RMSNorm kernels on a GPU: bfloat16, and repeated bits."""

import pytest
import torch

from fastgpt_kernels import norm, torch_ops
from tests.helpers.parity import assert_op_agrees, outputs_and_gradients

pytestmark = pytest.mark.gpu

OPS = ["layer_norm", "add_layer_norm", "rms_norm", "add_rms_norm"]
ops = pytest.mark.parametrize("op", OPS)


def randn(*shape, dtype=torch.bfloat16):
    return torch.randn(shape, device="cuda").to(dtype)


def inputs_of(op, R, C, dtype=torch.bfloat16):
    """x, residual where the operation takes one, weight, and bias where it takes one."""
    streams, affine = 2 if op.startswith("add_") else 1, 2 if op.endswith("layer_norm") else 1
    return [*(randn(R, C, dtype=dtype) for _ in range(streams)), *(randn(C, dtype=dtype) for _ in range(affine))]


@ops
@pytest.mark.parametrize("last", [True, False])  # the bias; of RMSNorm the weight
@pytest.mark.parametrize("C", [33, 64, 127, 128, 384, 768, 1023, 1024, 1600, 4096, 4097, 8192, 8193, 65536])
def test_bfloat16_is_as_near_the_truth_as_stock_pytorch(C, last, op):
    torch.manual_seed(0)
    *others, affine = inputs_of(op, 1000 if C <= 8192 else 40, C)
    assert_op_agrees(getattr(norm, op), op, [*others, affine if last else None], layout="gapped")


@pytest.mark.parametrize("D", [32, 64, 128])
def test_the_heads_of_a_packed_projection_agree(D):
    torch.manual_seed(0)
    q = randn(2, 100, 3, 6, D).unbind(2)[0]
    assert_op_agrees(norm.rms_norm, "rms_norm", [q, randn(D)])


@pytest.mark.parametrize("affine", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("C", [33, 768, 8193])
def test_a_float32_stream_beside_a_bfloat16_branch_agrees(C, affine):
    torch.manual_seed(0)
    inputs = [randn(50, C), randn(50, C, dtype=torch.float32), randn(C, dtype=affine), randn(C, dtype=affine)]

    def plain(x, residual, weight, bias):
        total = x + residual
        return total, torch_ops.layer_norm(total, weight.float(), bias.float())

    assert_op_agrees(norm.add_layer_norm, "add_layer_norm", inputs, plain=plain)


@ops
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("R", "C"), [(8192, 768), (3001, 1600), (4096, 33), (300, 20000)])
def test_20_backward_runs_give_the_same_bits(R, C, dtype, op):
    torch.manual_seed(0)
    inputs = inputs_of(op, R, C, dtype)
    grads = [randn(R, C, dtype=dtype) for t in inputs if t.dim() == 2]
    first = outputs_and_gradients(getattr(norm, op), inputs, grads)
    for _ in range(19):
        again = outputs_and_gradients(getattr(norm, op), inputs, grads)
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_it_runs_on_the_tensors_gpu_and_not_on_the_current_one():
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(shape, device="cuda:1") for shape in ((5, 33), (33,), (33,)))
    assert torch.cuda.current_device() == 0
    torch.testing.assert_close(norm.layer_norm(x, weight, bias), torch_ops.layer_norm(x, weight, bias))
