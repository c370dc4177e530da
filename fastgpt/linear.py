"""The linear layer, with a path for one row on a CPU: what decoding does for every token.

PyTorch gives a float32 product with one row to one core, which then waits for memory. Cut into slices, it is a batch
of products, and a batch is shared out among the cores. Slices of inputs are faster than slices of outputs, but want
the weight stored by columns: `store_by_columns` turns a model that is only read.
"""

import functools

import torch
import torch.nn as nn
import torch.nn.functional as F

FEWEST_WEIGHTS = 1 << 16  # below, the product is too short to share out


class Linear(nn.Linear):
    """`nn.Linear` whose forward is `linear`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return linear(input, self.weight, self.bias)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x @ weight.T + bias: x (..., I), weight (O, I), bias (O) -> (..., O)."""
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


def one_row_slices(x: torch.Tensor, weight: torch.Tensor) -> int:
    """How many slices to cut the product into; 1 leaves it to PyTorch."""
    outputs, inputs = weight.shape
    if torch.is_grad_enabled() or x.numel() != inputs or weight.numel() < FEWEST_WEIGHTS:
        return 1
    if x.device.type != "cpu" or x.dtype != torch.float32 or weight.dtype != torch.float32 or not x.is_contiguous():
        return 1
    return _slices(inputs if weight.stride(0) == 1 else outputs, torch.get_num_threads())


@functools.cache
def _slices(length: int, threads: int) -> int:
    """Two or more for each core, in a power of two that divides the length."""
    if threads == 1:
        return 1
    return min(1 << (2 * threads - 1).bit_length(), length & -length)


def store_by_columns(model: nn.Module) -> None:
    """Store the weights of every `Linear` in float32 on a CPU by columns, in place; the values stay."""
    for module in model.modules():
        if isinstance(module, Linear) and module.weight.device.type == "cpu" and module.weight.dtype == torch.float32:
            module.weight.data = module.weight.data.t().contiguous().t()
