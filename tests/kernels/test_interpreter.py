"""The interpreter as the tests make it faster gives the same bits as Triton's own, and finds overflows."""

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.runtime.interpreter import InterpreterError

from fastgpt_kernels.attention import causal_attention
from fastgpt_kernels.launch import INTERPRETED
from tests.helpers import interpreter
from tests.helpers.parity import DEVICE, outputs_and_gradients

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="kernels are compiled here")


@triton.jit
def combine(result, a, b, operation: tl.constexpr):
    left, right = tl.load(a), tl.load(b)
    if operation == "add":
        tl.store(result, left + right)
    elif operation == "sub":
        tl.store(result, left - right)
    else:
        tl.store(result, left * right)


def test_all_that_is_changed_is_there():
    assert len(interpreter.CHANGES) == len(interpreter.MAKERS)
    assert all(getattr(place, name) is ours for place, name, _, ours in interpreter.CHANGES)


def test_the_numbers_have_the_same_bits(monkeypatch):
    def results() -> list[torch.Tensor]:
        torch.manual_seed(0)
        q, k, v = torch.randn(3, 1, 20, 2, 16, device=DEVICE)
        options = {"dropout_p": 0.25, "seed": torch.tensor(3, device=DEVICE)}
        return outputs_and_gradients(causal_attention, [q, k, v], [torch.ones_like(q)], **options)

    quick = results()
    assert tl.core.is_builtin(tl.load)  # put back
    for place, name, theirs, _ in interpreter.CHANGES:
        monkeypatch.setattr(place, name, theirs)
    assert all(torch.equal(a, b) for a, b in zip(results(), quick, strict=True))
    assert tl.core.is_builtin(tl.load)


@pytest.mark.parametrize(
    ("dtype", "operation", "a", "b", "fits"),
    [
        (torch.int32, "add", 2**31 - 2, 1, True),
        (torch.int32, "add", 2**31 - 1, 1, False),
        (torch.int32, "sub", -(2**31), 1, False),
        (torch.int32, "mul", 2**16, 2**15 - 1, True),
        (torch.int32, "mul", 2**16, 2**15, False),
        (torch.uint8, "add", 255, 0, True),
        (torch.uint8, "sub", 0, 1, False),
        (torch.int64, "add", 2**31 - 1, 1, True),
    ],
)
def test_an_overflow_fails_and_the_largest_numbers_do_not(dtype, operation, a, b, fits):
    given = torch.tensor([a, b], dtype=dtype)
    result = torch.zeros(1, dtype=dtype)
    if not fits:
        with pytest.raises(InterpreterError, match=f"overflow detected for operation {operation}"):
            combine[(1,)](result, given[:1], given[1:], operation)
        return
    combine[(1,)](result, given[:1], given[1:], operation)
    assert result.item() == {"add": a + b, "sub": a - b, "mul": a * b}[operation]
