"""Weights in 8 bits, for `linear_int8`: a quarter of float32's bytes, which is what decoding waits for.

Offered here: `quantize`.
"""

import torch

LARGEST = 127  # and -128 stays unused, so that a weight and its negative are stored alike


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round each row of a weight to integers: weight is about weight_int8 * scale[:, None], off by half a scale.

    A row is an output channel; its largest magnitude becomes 127. The rounding is to nearest, ties to even.

    Args:
        weight: floating (O, I).

    Returns:
        weight_int8: int8 (O, I), contiguous, in [-127, 127].
        scale: float32 (O,), positive; 1 for a row of zeros.

    Raises:
        ValueError: the weight is no floating matrix, or holds inf or NaN.
    """
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(f"quantize: weight has shape {tuple(weight.shape)}, {weight.dtype}; expected floating (O, I)")
    exact = weight.detach().float()
    largest = exact.abs().amax(1) if exact.numel() else exact.new_zeros(len(exact))
    if weight.device.type != "meta" and not largest.isfinite().all():
        raise ValueError(f"quantize: weight {tuple(weight.shape)} holds inf or NaN; expected finite numbers")
    scale = largest / LARGEST
    scale = scale.where(scale > 0, 1.0)
    return (exact / scale[:, None]).round_().clamp_(-LARGEST, LARGEST).to(torch.int8).contiguous(), scale
