"""Orthogonalizes matrices, approximately, by products alone: X = U S V^T becomes U V^T.

Each iteration applies an odd polynomial to all singular values: X <- a X + b (X X^T) X + c (X X^T)^2 X. The
coefficients bring them all near 1.

For a wide matrix (m, n) in float32, most products with X are left out: with G = X X^T, (m, m), an iteration multiplies
X by P = a + b G + c G^2, and G by P^2, as polynomials of one matrix commute. So `AT_ONCE` iterations need one product
for G and one that applies all of their factors. In more of them, the rounding of G would grow too much in the smallest
singular values; in 16 bits it would in any.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

AT_ONCE = 3  # iterations
EPS = 1e-7  # the least norm, as in `torch.optim.Muon`
Coefficients = tuple[float, float, float]  # a, b, c


class Method(NamedTuple):
    """A way to orthogonalize.

    Attributes:
        coefficients: (a, b, c) of each iteration, for singular values of at most 1.
        tight: divide X by (sum of s^4)^(1/4) over its singular values s, which costs no product, instead of the larger
            (sum of s^2)^(1/2): fewer iterations bring them near 1.
    """

    coefficients: Sequence[Coefficients]
    tight: bool = False


METHODS = {
    # Keller Jordan's, as in `torch.optim.Muon` (https://kellerjordan.github.io/posts/muon/).
    "newton_schulz": Method(((3.4445, -4.7750, 2.0315),) * 5),
    # Each the best polynomial for the singular values that the one before left, which begin between LEAST and 1: "The
    # Polar Express" (Amsel et al., 2025, arXiv:2505.16932); tests/training/test_orthogonalize.py computes them.
    "polar_express": Method(
        ((1.0, 1.0, 1.0),),
        tight=True,
    ),
}


def orthogonalize(x: torch.Tensor, method: Method) -> torch.Tensor:
    """Bring the singular values of every matrix near 1: (N, m, n) with m <= n -> (N, m, n), in the dtype of x."""
    x = x / _norm(x).clamp(min=EPS)
    together = AT_ONCE if x.shape[2] > x.shape[1] and x.dtype.itemsize > 2 else 1
    for begin in range(0, len(method.coefficients), together):
        gram = torch.bmm(x, x.mT)
        if method.tight and begin == 0:
            fourth = _norm(gram).clamp(min=EPS)
            gram, x = gram / fourth, x / fourth.sqrt()
        x = _apply(method.coefficients[begin : begin + together], gram, x)
    return x


def _apply(coefficients: Sequence[Coefficients], gram: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Some iterations on x (N, m, n), with its G (N, m, m)."""
    if len(coefficients) == 1:
        a, b, c = coefficients[0]
        return torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return torch.bmm(_factor(coefficients, gram), x)


def _norm(x: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)


def _factor(coefficients: Sequence[Coefficients], gram: torch.Tensor) -> torch.Tensor:
    """The product of the factors P of some iterations (N, m, m), from the first one's G (N, m, m)."""
    product = None
    for left, (a, b, c) in zip(reversed(range(len(coefficients))), coefficients, strict=True):
        partial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # without a, which is added by beta below
        if left:
            half = torch.baddbmm(gram, partial, gram, beta=a)
            gram = torch.baddbmm(half, partial, half, beta=a)
        if product is None:
            product = partial
            product.diagonal(dim1=1, dim2=2).add_(a)
        else:
            product = torch.baddbmm(product, partial, product, beta=a)
    assert product is not None, "no iterations"
    return product
