"""A model with int8 matrices, one scale per output channel: decoding reads a quarter of the bytes.

Activations, norms, biases and positions stay as they are. The token embedding is quantized by its rows, which
are the channels of a tied output layer. `fastgpt_kernels.quantization` says how large the error is. The products are
the table's operation `linear_int8`.
"""

import torch
import torch.nn as nn

from fastgpt.model.gpt import GPT, MLP, Attention
from fastgpt.model.linear import Embedding, Linear
from fastgpt.ops.table import Ops
from fastgpt_kernels.quantization import quantize


class QuantizedLinear(nn.Module):
    """A `Linear` that is only read: weight int8 (O, I), scale float32 (O,)."""

    weight: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, layer: Linear, ops: Ops):
        super().__init__()
        self.ops = ops
        weight, scale = quantize(layer.weight)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., I) -> (..., O)."""
        return self.ops.linear_int8(x, self.weight, self.scale, self.bias)


class QuantizedEmbedding(nn.Module):
    """An `Embedding` that is only read: weight int8 (V, C), scale float32 (V,)."""

    weight: torch.Tensor
    scale: torch.Tensor

    def __init__(self, embedding: Embedding, ops: Ops):
        super().__init__()
        self.ops, self.dtype = ops, embedding.weight.dtype
        weight, scale = quantize(embedding.weight)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(...) -> (..., C)."""
        return (self.weight[tokens] * self.scale[tokens][..., None]).to(self.dtype)

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        """(..., C) -> (..., V), float32 also of 16 bits."""
        return self.ops.linear_int8(x, self.weight, self.scale, out_dtype=torch.promote_types(x.dtype, torch.float32))


def quantize_model(model: GPT) -> None:
    """Replace every matrix but the position embedding by its int8 form, in place; for a model that is only read."""
    for part in [m for m in model.modules() if isinstance(m, Attention | MLP)]:
        for name, layer in list(part.named_children()):
            if isinstance(layer, Linear):
                part.add_module(name, QuantizedLinear(layer, model.ops))
    for name in ("wte", "lm_head"):
        if isinstance(embedding := getattr(model, name), Embedding):
            model.add_module(name, QuantizedEmbedding(embedding, model.ops))
