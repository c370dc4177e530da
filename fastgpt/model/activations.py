"""The activations of the MLP, on any shape, by the names that `ModelConfig.mlp` has for them.

Those that are not here are operations of the table.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from fastgpt.ops.table import Ops


def gelu(x: torch.Tensor) -> torch.Tensor:
    """GELU in its tanh form (Hendrycks & Gimpel, 2016), as GPT-2 has it.

    0.5 x (1 + tanh u) with u = sqrt(2 / pi) (x + 0.044715 x^3), computed in float32. It equals x sigmoid(2 u), which
    code that is compiled for a CPU takes: its exp is faster than its tanh.
    """
    if not torch.compiler.is_compiling() or x.device.type != "cpu":
        return F.gelu(x, approximate="tanh")
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.sigmoid(math.sqrt(8 / math.pi) * (wide + 0.044715 * wide**3))).to(x.dtype)


def gelu_exact(x: torch.Tensor) -> torch.Tensor:
    """GELU as defined, x times the normal distribution function of x (Hendrycks & Gimpel, 2016), as nanoGPT has it."""
    return F.gelu(x)


def relu(x: torch.Tensor) -> torch.Tensor:
    """The positive part, as OPT and some variants of GPT-2 have it."""
    return F.relu(x)


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {f.__name__: f for f in (gelu, gelu_exact, relu)}


def activation(name: str, ops: Ops) -> Callable[[torch.Tensor], torch.Tensor]:
    """The activation of this name."""
    return ACTIVATIONS[name] if name in ACTIVATIONS else getattr(ops, name)
