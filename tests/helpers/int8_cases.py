"""Examples of linear_int8, and what they must agree with."""

import torch
import torch._dynamo  # at once, as it keeps torch's functions, and is not to keep the ones of `poisoned`

from fastgpt_kernels import torch_ops
from fastgpt_kernels.int8 import linear_int8
from fastgpt_kernels.quantization import quantize
from tests.helpers.parity import DEVICE, LAYOUTS, Guards, assert_parity, poisoned


def case(shape, outputs, bias=None, *, dtype=torch.float32, layout="dense", seed=0):
    """x of a shape, a weight with its scale, and a bias in a dtype, or in x's."""
    torch.manual_seed(seed)
    x = LAYOUTS[layout](shape, lambda shape: torch.randn(shape, device=DEVICE).to(dtype))
    weight_int8, scale = quantize(torch.randn(outputs, shape[-1], device=DEVICE))
    bias_dtype = dtype if bias == "x" else bias
    return x, weight_int8, scale, None if bias is None else torch.randn(outputs, device=DEVICE).to(bias_dtype)


def truth(x, weight_int8, scale, bias):
    """In float64, without any of the backends."""
    y = torch.einsum("...i,oi->...o", x.double(), weight_int8.double() * scale.double()[:, None])
    return y if bias is None else y + bias.double()


def assert_agrees(made):
    guards = Guards()
    names = ("x", "weight_int8", "scale", "bias")
    placed = [None if t is None else guards.input(t, name) for t, name in zip(made, names, strict=True)]
    with poisoned(guards):
        got = linear_int8(*placed)
    assert_parity([got], [torch_ops.linear_int8(*made)], [truth(*made)], ["y"])
    assert got.is_contiguous()
    return got
