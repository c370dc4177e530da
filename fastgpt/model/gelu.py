"""GELU in its tanh form (Hendrycks & Gimpel, 2016), as GPT-2 has it."""

import math

import torch
import torch.nn.functional as F


def gelu(x: torch.Tensor) -> torch.Tensor:
    """0.5 x (1 + tanh u) with u = sqrt(2 / pi) (x + 0.044715 x^3), computed in float32; any shape.

    It equals x sigmoid(2 u), which code that is compiled for a CPU takes: its exp is faster than its tanh.
    """
    if not torch.compiler.is_compiling() or x.device.type != "cpu":
        return F.gelu(x, approximate="tanh")
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.sigmoid(math.sqrt(8 / math.pi) * (wide + 0.044715 * wide**3))).to(x.dtype)
