"""Finds NaN and infinity in tensors."""

from collections.abc import Mapping

import torch


def first_not_finite(tensors: Mapping[str, torch.Tensor]) -> str | None:
    """The name of the first tensor that holds a NaN or an infinity, or None; waits for the device."""
    for name, tensor in tensors.items():
        # A finite sum has only finite terms, and takes one pass without a copy. Finite terms may overflow it, though.
        if tensor.is_floating_point() and not torch.isfinite(tensor.sum()) and not torch.isfinite(tensor).all():
            return name
    return None
