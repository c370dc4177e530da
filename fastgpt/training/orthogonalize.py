"""Orthogonalizes matrices, approximately, by products alone: X = U S V^T becomes U V^T.

Each iteration applies an odd polynomial to all singular values: X <- a X + b (X X^T) X + c (X X^T)^2 X. The
coefficients bring them all near 1.

For a wide matrix (m, n) in float32, most products with X are left out: with G = X X^T, (m, m), an iteration multiplies
X by P = a + b G + c G^2, and G by P^2, as polynomials of one matrix commute. So several iterations need one product for
G and one that applies all of their factors. The rounding of G grows with the smallest singular values, which limits how
many; in 16 bits there is no room for it.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

MOST_GROWTH = 50  # of the smallest singular values between two products for G: float32 stays within 1e-5 of float64
MARGIN = 1.02  # for rounding
EPS = 1e-7  # the least norm, as in `torch.optim.Muon`
Coefficients = tuple[float, float, float]  # a, b, c


class Method(NamedTuple):
    """A way to orthogonalize.

    Attributes:
        coefficients: (a, b, c) of each iteration, for singular values of at most 1.
        tight: divide X by (sum of s^4)^(1/4) over its singular values s, which costs no product, instead of the larger
            (sum of s^2)^(1/2), so that fewer iterations bring them near 1; and by `MARGIN`, as beyond 1 they grow.
    """

    coefficients: Sequence[Coefficients]
    tight: bool = False


METHODS = {
    # Keller Jordan's, as in `torch.optim.Muon` (https://kellerjordan.github.io/posts/muon/).
    "newton_schulz": Method(((3.4445, -4.7750, 2.0315),) * 5),
    # Each is the best polynomial for the singular values that those before it make of any from 0.003 to 1: "The Polar
    # Express" (Amsel et al., 2025, arXiv:2505.16932). They end between 0.35 and 1.65, which trains as well as closer
    # to 1. tests/training/test_orthogonalize.py computes them.
    "polar_express": Method(
        (
            (8.3836736, -24.765906, 18.357082),
            (4.0434204, -3.011405, 0.56951215),
            (3.5055706, -2.6266538, 0.5257194),
        ),
        tight=True,
    ),
}


def orthogonalize(x: torch.Tensor, method: Method) -> torch.Tensor:
    """Bring the singular values of every matrix near 1: (N, m, n) with m <= n -> (N, m, n), in the dtype of x."""
    x = x / _norm(x).clamp(min=EPS)
    apart = x.shape[2] == x.shape[1] or x.dtype.itemsize == 2
    scaling = method.tight
    for coefficients in ([c] for c in method.coefficients) if apart else _together(method.coefficients):
        gram = torch.bmm(x, x.mT)
        if scaling:
            scale = _norm(gram).clamp(min=EPS) * MARGIN**2
            gram, x, scaling = gram / scale, x / scale.sqrt(), False
        x = _apply(coefficients, gram, x)
    return x


def product_flops(m: int, n: int, method: Method, itemsize: int = 4) -> int:
    """Floating-point operations of the products for a matrix (m, n) with m <= n, of numbers of so many bytes."""
    total, apart = 0, m == n or itemsize == 2
    for coefficients in ([c] for c in method.coefficients) if apart else _together(method.coefficients):
        together = len(coefficients)
        squares = 1 if together == 1 else together + 2 * (together - 1) + (together - 1)  # products of m x m matrices
        total += 2 * m * m * (2 * n + squares * m)
    return total


def _together(coefficients: Sequence[Coefficients]) -> Iterator[Sequence[Coefficients]]:
    """Divide iterations into those that are applied by one product."""
    begin, growth = 0, 1.0
    for i, (a, _, _) in enumerate(coefficients):
        growth *= a
        if growth > MOST_GROWTH and i > begin:
            yield coefficients[begin:i]
            begin, growth = i, a
    yield coefficients[begin:]


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
            product = partial + a * torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
        else:
            product = torch.baddbmm(product, partial, product, beta=a)
    assert product is not None, "no iterations"
    return product
