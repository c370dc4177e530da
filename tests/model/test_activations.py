"""The form that is compiled on a CPU is the GELU that runs uncompiled, with its gradient."""

import pytest
import torch

from fastgpt.model.activations import gelu


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 8e-3)]
)
def test_both_forms_agree_with_their_gradients(monkeypatch, dtype: torch.dtype, tolerance: float):
    values = torch.cat([torch.linspace(-8, 8, 501), torch.tensor([-1e4, -30.0, 0.0, 30.0, 1e4])]).to(dtype)
    results = []
    for compiling in (False, True):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda compiling=compiling: compiling)
        x = values.clone().requires_grad_()
        y = gelu(x)
        assert y.dtype == dtype
        results.append((y, *torch.autograd.grad(y.sum(), x)))
    for plain, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=tolerance, atol=tolerance)
