"""The linear layer, with a fast path for one row on a CPU: the product of decoding.

PyTorch gives a float32 product with one row to one core, which then waits for memory. Cut into slices, it is a batch
of products, which all cores share. Slices of inputs are faster than slices of outputs, but need a column-major weight:
`store_by_columns` stores the weights of a model so.
"""

import functools

import torch
import torch.nn as nn
import torch.nn.functional as F

from fastgpt_kernels.float32_product import float32_product
from fastgpt_kernels.row_product import row_product

FEWEST_WEIGHTS = 1 << 16  # a smaller product is too short to share


class Linear(nn.Linear):
    """`nn.Linear` whose forward is `linear`.

    Attributes:
        parts: the rows of each matrix, where the weight packs several; an optimizer may treat them apart.
    """

    parts: tuple[int, ...] = ()

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:  # there PyTorch would import its compiler, to draw nothing
            super().reset_parameters()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return linear(input, self.weight, self.bias)


class Embedding(nn.Embedding):
    """`nn.Embedding` that is also the output layer."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:  # as above
            super().reset_parameters()

    @property
    def dtype(self) -> torch.dtype:
        """That of the vectors that it gives."""
        return self.weight.dtype

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        """Each row's product with x: (..., C) -> (..., V), float32 also of 16 bits."""
        if is_compiled_row(x, self.weight):
            return row_product(x, self.weight).view(*x.shape[:-1], -1)
        if one_row_slices(x, self.weight) > 1:
            return linear(x, self.weight)
        return float32_product(x, self.weight)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x @ weight.T + bias: x (..., I), weight (O, I), bias (O) -> (..., O)."""
    if is_compiled_row(x, weight):
        y = row_product(x, weight).view(*x.shape[:-1], -1)
        return (y if bias is None else y + bias).to(x.dtype)
    slices = one_row_slices(x, weight)
    if slices == 1:
        return F.linear(x, weight, bias)
    outputs, inputs = weight.shape
    if weight.stride(0) == 1:  # by columns: slices of inputs, whose products are summed
        y = torch.bmm(x.view(slices, 1, -1), weight.mT.view(slices, -1, outputs)).sum(0)
    else:
        parts = weight.view(slices, -1, inputs).mT  # (slices, I, O / slices)
        y = torch.bmm(x.view(1, 1, inputs).expand(slices, 1, inputs), parts)
    y = y.view(*x.shape[:-1], outputs)
    return y if bias is None else y + bias


def is_compiled_row(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether this is one row on a CPU, without gradients, in code that is being compiled."""
    return torch.compiler.is_compiling() and not torch.is_grad_enabled() and is_row(x, weight)


def is_row(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether this is one row on a CPU, whose product waits for memory."""
    return x.device.type == "cpu" and x.numel() == weight.shape[1]


def one_row_slices(x: torch.Tensor, weight: torch.Tensor) -> int:
    """The number of slices of the product; 1 leaves it to PyTorch."""
    outputs, inputs = weight.shape
    if torch.is_grad_enabled() or not is_row(x, weight) or weight.numel() < FEWEST_WEIGHTS:
        return 1
    if x.dtype != torch.float32 or weight.dtype != torch.float32 or not x.is_contiguous():
        return 1
    return _slices(inputs if weight.stride(0) == 1 else outputs, torch.get_num_threads())


@functools.cache
def _slices(length: int, threads: int) -> int:
    """At least two slices per core: a power of two that divides the length."""
    if threads == 1:
        return 1
    return min(1 << (2 * threads - 1).bit_length(), length & -length)


def store_by_columns(model: nn.Module) -> None:
    """Make the float32 weights of every `Linear` on a CPU column-major, in place; their values stay."""
    for module in model.modules():
        if isinstance(module, Linear) and module.weight.device.type == "cpu" and module.weight.dtype == torch.float32:
            module.weight.data = module.weight.data.t().contiguous().t()


def store_by_rows(model: nn.Module) -> None:
    """Undo `store_by_columns`, in place."""
    for module in model.modules():
        if isinstance(module, Linear):
            module.weight.data = module.weight.data.contiguous()
