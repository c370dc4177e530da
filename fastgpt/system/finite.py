"""Finds NaN and infinity in tensors."""

from collections.abc import Mapping

import torch


def first_not_finite(tensors: Mapping[str, torch.Tensor]) -> str | None:
    """The name of the first tensor that holds a NaN or an infinity, or None; waits for the device."""
    for name, tensor in tensors.items():
        # A sum that is finite is of numbers that are, and takes one pass without a copy; others may overflow it.
        if tensor.is_floating_point() and not torch.isfinite(tensor.sum()) and not torch.isfinite(tensor).all():
            return name
    return None
