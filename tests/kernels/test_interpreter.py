"""The interpreter as the tests make it faster gives the same bits as Triton's own."""

import pytest
import torch

pytest.importorskip("triton")

import triton.language as tl
from triton.runtime import interpreter

from fastgpt_kernels.attention import causal_attention
from fastgpt_kernels.launch import INTERPRETED
from tests.helpers.parity import DEVICE, outputs_and_gradients

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="kernels are compiled here")


def results() -> list[torch.Tensor]:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 20, 2, 16, device=DEVICE)
    options = {"dropout_p": 0.25, "seed": torch.tensor(3, device=DEVICE)}
    return outputs_and_gradients(causal_attention, [q, k, v], [torch.ones_like(q)], **options)


def test_replacing_the_language_once_gives_the_same_bits(monkeypatch):
    replace_once = interpreter._patch_lang
    quick = results()
    assert tl.core.is_builtin(tl.load)  # put back
    monkeypatch.setattr(interpreter, "_patch_lang", replace_once.replace)
    assert all(torch.equal(a, b) for a, b in zip(results(), quick, strict=True))
    assert tl.core.is_builtin(tl.load)
