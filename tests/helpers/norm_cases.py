"""Inputs of the norms' kernels, and how many programs share their backward pass."""

import pytest
import torch

from fastgpt_kernels import launch
from tests.helpers.parity import DEVICE, LAYOUTS

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])


def tensors(
    op, shape, dtype, *, gain=True, bias=True, layouts=("dense", "dense"), affine=None, residual=None, offset=None
):
    """The positional arguments of a norm: x, residual where it takes one, weight or None, LayerNorm's bias or None.

    `affine` and `residual` are dtypes, of weight and bias, and of the residual; default `dtype`. `offset` is the mean,
    by default 0, and 1 for RMS norms, which do not take it out.
    """
    rms = "rms" in op
    offset = float(rms) if offset is None else offset

    def make(dtype):
        return lambda shape: (torch.randn(shape, device=DEVICE) * 2 + offset).to(dtype)

    streams = [LAYOUTS[layouts[0]](shape, make(dtype))]
    if op.startswith("add_"):
        streams.append(LAYOUTS[layouts[1]](shape, make(residual or dtype)))
    wanted = (gain,) if rms else (gain, bias)
    vectors = [make(affine or dtype)(shape[-1:]) for _ in wanted]
    return [*streams, *(vector if wants else None for vector, wants in zip(vectors, wanted, strict=True))]


def few_programs(monkeypatch, programs):
    monkeypatch.setitem(launch.PROGRAMS, launch.architecture(torch.device(DEVICE)), programs)
