"""The linear layer, with a path for one row on a CPU: what decoding does for every token."""

import torch
import torch.nn as nn
import torch.nn.functional as F

FEWEST_WEIGHTS = 1 << 16  # below, the product is too short to share out


class Linear(nn.Linear):
    """`nn.Linear` whose forward is `linear`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return linear(input, self.weight, self.bias)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x @ weight.T + bias: x (..., I), weight (O, I), bias (O) -> (..., O).

    PyTorch gives a float32 product with one row to one core, which then waits for memory. Cut into slices of
    outputs, it is a batch of products, and a batch is shared out among the cores.
    """
    slices = one_row_slices(x, weight)
    if slices == 1:
        return F.linear(x, weight, bias)
    rows = x.reshape(1, 1, -1).expand(slices, 1, -1)
    parts = weight.view(slices, -1, weight.shape[1]).mT  # (slices, I, O / slices), a view
    y = torch.bmm(rows, parts) if bias is None else torch.baddbmm(bias.view(slices, 1, -1), rows, parts)
    return y.view(*x.shape[:-1], -1)


def one_row_slices(x: torch.Tensor, weight: torch.Tensor) -> int:
    """How many slices of outputs to cut the product into; 1 leaves it to PyTorch."""
    one_row = x.numel() == x.shape[-1] and x.device.type == "cpu" and x.dtype == torch.float32
    if not one_row or torch.is_grad_enabled() or torch.get_num_threads() == 1 or weight.numel() < FEWEST_WEIGHTS:
        return 1
    wanted = 1 << (2 * torch.get_num_threads() - 1).bit_length()  # two or more a core, a power of two
    outputs = weight.shape[0]
    return min(wanted, outputs & -outputs)  # and one that divides the outputs
