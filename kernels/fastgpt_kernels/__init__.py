"""The operations of a GPT, each in columns that compute the same: readable math, stock PyTorch, our kernels.

    from fastgpt_kernels import layer_norm, add_layer_norm, causal_attention, linear_cross_entropy
    from fastgpt_kernels import rms_norm, add_rms_norm, swiglu, relu2
    from fastgpt_kernels import paged_attention, kv_write, linear_int8, quantize

gives the Triton ones, usable in any model: those of the first two lines with forward and backward (but no second
derivatives), those over a paged cache or a weight of 8 bits, which `quantize` makes, forward alone. They are imported
when asked for, and run on a GPU. `fastgpt_kernels.reference` and `fastgpt_kernels.torch_ops` have the same signatures,
need no triton, and run anywhere.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastgpt_kernels.activation import relu2, swiglu
    from fastgpt_kernels.attention import causal_attention
    from fastgpt_kernels.cross_entropy import linear_cross_entropy
    from fastgpt_kernels.int8 import linear_int8
    from fastgpt_kernels.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
    from fastgpt_kernels.paged import kv_write, paged_attention
    from fastgpt_kernels.quantization import quantize

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "causal_attention",
    "kv_write",
    "layer_norm",
    "linear_cross_entropy",
    "linear_int8",
    "paged_attention",
    "quantize",
    "relu2",
    "rms_norm",
    "swiglu",
]

# A module is never named like its function: importing it would put the module in the function's place.
MODULES = {
    "add_layer_norm": "norm",
    "add_rms_norm": "norm",
    "causal_attention": "attention",
    "kv_write": "paged",
    "layer_norm": "norm",
    "linear_cross_entropy": "cross_entropy",
    "linear_int8": "int8",
    "paged_attention": "paged",
    "quantize": "quantization",
    "relu2": "activation",
    "rms_norm": "norm",
    "swiglu": "activation",
}
# The way out, for messages where the kernels cannot run.
INSTEAD = "fastgpt_kernels.reference and fastgpt_kernels.torch_ops have the same signatures and run anywhere"


def __getattr__(name: str) -> Any:
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f"{__name__}.{MODULES[name]}")
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        message = f"{__name__}.{name} needs the package triton, which is not installed; {INSTEAD}"
        raise ModuleNotFoundError(message, name="triton") from None
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *MODULES])
