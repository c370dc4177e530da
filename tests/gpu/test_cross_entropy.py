"""Linear cross-entropy on a GPU: bfloat16, repeated bits, nothing that waits."""

import pytest
import torch

from fastgpt_kernels.cross_entropy import linear_cross_entropy
from tests.helpers.cross_entropy_cases import chunks_of, grad_of, inputs_of, labels, plain, reductions
from tests.helpers.parity import assert_op_agrees, outputs_and_gradients, same_bits

pytestmark = pytest.mark.gpu

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


@pytest.fixture(autouse=True)
def products_in_full_precision():
    """float32 products are those of float32, not of TF32, here and in stock PyTorch."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@dtypes
@reductions
@pytest.mark.parametrize("softcap", [None, 15.0])
@pytest.mark.parametrize(
    ("R", "C", "V", "valid_vocab"),
    [(300, 768, 50304, 50257), (257, 33, 50257, None), (1000, 384, 65, None), (64, 129, 4097, 4095), (5, 7, 1025, 3)],
)
def test_agrees_with_float64_as_nearly_as_stock_pytorch_does(R, C, V, valid_vocab, reduction, dtype, softcap):
    torch.manual_seed(0)
    arguments = {"valid_vocab": valid_vocab, "reduction": reduction, "plain": plain, "softcap": softcap}
    arguments["targets"] = labels((R,), valid_vocab or V, ignored=0.1)
    for rows in (R, 100):
        with chunks_of(rows, V, dtype):
            assert_op_agrees(linear_cross_entropy, "linear_cross_entropy", inputs_of((R,), C, V, dtype), **arguments)


@dtypes
@reductions
@pytest.mark.parametrize(("R", "C", "V"), [(4096, 768, 50304), (3001, 129, 5003)])
def test_20_backward_runs_give_the_same_bits(R, C, V, reduction, dtype):
    torch.manual_seed(0)
    inputs, grad = inputs_of((R,), C, V, dtype), grad_of(reduction, (R,))
    arguments = {"targets": labels((R,), V, ignored=0.1), "reduction": reduction}
    with chunks_of(1500, V, dtype):
        first = outputs_and_gradients(linear_cross_entropy, inputs, [grad], **arguments)
        for _ in range(19):
            assert same_bits(outputs_and_gradients(linear_cross_entropy, inputs, [grad], **arguments), first)


@reductions
def test_nothing_waits_for_the_gpu(reduction):
    torch.manual_seed(0)
    inputs, grad = inputs_of((300,), 64, 1000, torch.bfloat16), grad_of(reduction, (300,))
    arguments = {"targets": labels((300,), 1000, ignored=0.1), "reduction": reduction}
    outputs_and_gradients(linear_cross_entropy, inputs, [grad], **arguments)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        outputs_and_gradients(linear_cross_entropy, inputs, [grad], **arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
