"""Examples of linear cross-entropy, and what they must agree with."""

import math
import unittest.mock

import pytest
import torch

from fastgpt_kernels import cross_entropy, torch_ops
from tests.helpers.parity import (
    DEVICE,
    LAYOUTS,
)

REDUCTIONS = ["mean", "sum", "none"]
DTYPES = [torch.float32, torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float16"])
reductions = pytest.mark.parametrize("reduction", REDUCTIONS)


def inputs_of(lead, C, V, dtype=torch.float32, layouts=("dense", "dense")):
    """x (*lead, C) and weight (V, C), whose logits are a few units wide."""

    def make(width):
        return lambda shape: (torch.randn(shape, device=DEVICE) * width).to(dtype)

    return [LAYOUTS[layouts[0]]((*lead, C), make(1.0)), LAYOUTS[layouts[1]]((V, C), make(2 * C**-0.5))]


def labels(lead, valid, *, ignored=0.0, ignore_index=-100, dtype=torch.int64):
    t = torch.randint(valid, tuple(lead), device=DEVICE, dtype=dtype)
    return t.masked_fill_(torch.rand(t.shape, device=DEVICE) < ignored, ignore_index)


def chunks_of(rows, V, dtype=torch.float32, *, gradients=True):
    """Meanwhile no chunk of logits has more than this many rows."""
    width = math.ceil(V / cross_entropy.ALIGNMENT) * cross_entropy.ALIGNMENT
    apart = dtype.itemsize if gradients and dtype != torch.float32 else 0  # the logits' gradient; else in their place
    return unittest.mock.patch.object(cross_entropy, "LOGITS_BYTES", rows * width * (4 + apart))


def grad_of(reduction, lead):
    return torch.randn(() if reduction != "none" else lead, device=DEVICE)


def plain(x, weight, targets, **arguments):
    """Stock PyTorch, which wants a dimension of rows and targets in int64."""
    targets = targets.long()
    if x.dim() > 1:
        return torch_ops.linear_cross_entropy(x, weight, targets, **arguments)
    return torch_ops.linear_cross_entropy(x[None], weight, targets[None], **arguments).view(targets.shape)
