"""Finds NaN and infinity in tensors."""

from collections.abc import Mapping

import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # others have no sum, or no infinity


def first_not_finite(tensors: Mapping[str, torch.Tensor]) -> str | None:
    """The name of the first tensor that holds a NaN or an infinity, or None; waits for the device."""
    for name, tensor in tensors.items():
        # A finite sum has only finite terms, and takes one pass without a copy. Finite terms may overflow it, though.
        if tensor.dtype in DTYPES and not torch.isfinite(tensor.sum()) and not torch.isfinite(tensor).all():
            return name
    return None
