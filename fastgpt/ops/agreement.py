"""Compares two implementations of an operation by the rule of the kernels' tests, at run time.

The truth is the reference in float64. A float32 result may be off by 1e-5, relative to the truth, by either of two
measures: the norm of the difference, and its largest number. Where something on the way to a result is narrower than
float32 (16 bits, or TF32 products), what stock PyTorch is off by there sets the limit: twice that. Stock is exact by
luck now and then in a tensor of few numbers, so half an ulp is always allowed to a result in 16 bits, and to a single
number that came from such arithmetic. `tests/helpers/parity.py` holds the kernels to the same limits, test by test.
"""

import math
from collections.abc import Mapping

import torch

FLOAT32_LIMIT = 1e-5

Results = Mapping[str, torch.Tensor]


def disagreement(got: Results, stock: Results, truth: Results, arithmetic: torch.dtype, tf32: bool = False) -> str:
    """The first disagreement in a few words; "" if all results agree.

    Args:
        got, stock: the results of an implementation, and of PyTorch's own, by name.
        truth: the reference's results in float64.
        arithmetic: the narrowest dtype that was computed in.
        tf32: float32 products may be those of TF32.
    """
    for name, t in got.items():
        plain, right = stock[name], truth[name]
        if (t.shape, t.dtype) != (right.shape, plain.dtype):
            return f"{name} is {t.dtype} {tuple(t.shape)}, not {plain.dtype} {tuple(right.shape)}"
        if not t.isfinite().all():
            return f"{name} is not finite"
        if not right.any():
            if t.any():
                return f"{name} should be zero"
            continue
        largest = right.abs().max().item()
        for error, stock_error in zip(_errors(t, right), _errors(plain, right), strict=True):
            most = _limit(t, largest, stock_error, arithmetic, tf32)
            if error > most:
                return f"{name} is off by {error:.1e}, with {most:.1e} allowed"
    return ""


def _errors(t: torch.Tensor, right: torch.Tensor) -> tuple[float, float]:
    """||t - right|| / ||right|| and max|t - right| / max|right|."""
    difference = t.double() - right
    return (difference.norm() / right.norm()).item(), (difference.abs().max() / right.abs().max()).item()


def _limit(t: torch.Tensor, largest: float, stock_error: float, arithmetic: torch.dtype, tf32: bool) -> float:
    """The largest relative error allowed; `largest`: the truth's largest number."""
    narrow = arithmetic.itemsize == 2
    if not narrow and not tf32:
        return FLOAT32_LIMIT
    lucky = t.dtype if t.element_size() == 2 else arithmetic if narrow and t.numel() == 1 else torch.float32
    floor = FLOAT32_LIMIT if lucky == torch.float32 else _half_an_ulp(lucky, largest) / largest
    return max(2 * stock_error, floor)


def _half_an_ulp(dtype: torch.dtype, value: float) -> float:
    """Half the distance between the numbers of a dtype around a positive value."""
    info = torch.finfo(dtype)
    return info.eps / 2 * 2.0 ** math.floor(math.log2(max(value, info.smallest_normal)))
