"""Every private name of PyTorch that the kernels use, so that a new version of PyTorch is checked in one place.

PyTorch promises nothing about a name with a leading underscore. Both were checked with PyTorch 2.11, 2.13 and 2.14, the
versions that this project has run with.
"""

import torch


def linear_int8_packed(rows: torch.Tensor, weight_int8: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """rows (N, C) times weight_int8 (outputs, C), each output times its scale (outputs,), in the rows' dtype.

    No public name: PyTorch offers the product of a 16-bit and an 8-bit matrix to its own quantization tools alone.
    """
    return torch._weight_int8pack_mm(rows, weight_int8, scale)  # pyright: ignore[reportPrivateImportUsage]


def softmax_backward(grad: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The gradient of scores whose softmax over the last dimension is `weights`, computed in float32 and rounded once.

    No public name: autograd calls it, and `torch.softmax` cannot be differentiated from its output alone.
    """
    return torch.ops.aten._softmax_backward_data(grad, weights, -1, weights.dtype)
