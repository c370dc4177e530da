"""The operations of a GPT, each in columns that compute the same: readable math, stock PyTorch, our kernels.

    from fastgpt_kernels import layer_norm, add_layer_norm, causal_attention, linear_cross_entropy

gives the Triton ones, with forward and backward (but no second derivatives), usable in any model. They are imported
when asked for: `fastgpt_kernels.reference` and `fastgpt_kernels.stock` need no triton.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastgpt_kernels.attention import causal_attention
    from fastgpt_kernels.cross_entropy import linear_cross_entropy
    from fastgpt_kernels.norm import add_layer_norm, layer_norm

__all__ = ["add_layer_norm", "causal_attention", "layer_norm", "linear_cross_entropy"]

# A module is never named like its function: importing it would put the module in the function's place.
MODULES = {
    "add_layer_norm": "norm",
    "causal_attention": "attention",
    "layer_norm": "norm",
    "linear_cross_entropy": "cross_entropy",
}


def __getattr__(name: str) -> Any:
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *MODULES])
