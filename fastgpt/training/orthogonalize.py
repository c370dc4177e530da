"""Orthogonalizes matrices, approximately, by products alone: X = U S V^T becomes U V^T.

Each iteration applies an odd polynomial to all singular values: X <- a X + b (X X^T) X + c (X X^T)^2 X. The
coefficients bring them all near 1. For a wide matrix (m, n) in float32, products with X are left out: the iterations
compute the polynomial in the m x m matrix X X^T, and one product at the end applies it. That is the same algebra, as
polynomials of one matrix commute. In 16 bits it is too inexact.

Sources: the Newton-Schulz iteration with its coefficients is Keller Jordan's
(https://kellerjordan.github.io/posts/muon/), as in `torch.optim.Muon`. "The Polar Express" (Amsel et al., 2025,
arXiv:2505.16932) finds the polynomials that are best for singular values above a bound.
"""

from collections.abc import Sequence

import torch

Coefficients = tuple[float, float, float]

EPS = 1e-7  # the least norm, as in `torch.optim.Muon`
NEWTON_SCHULZ: Sequence[Coefficients] = ((3.4445, -4.7750, 2.0315),) * 5
METHODS = {"newton_schulz": NEWTON_SCHULZ, "polar_express": NEWTON_SCHULZ}


def orthogonalize(x: torch.Tensor, coefficients: Sequence[Coefficients] = NEWTON_SCHULZ) -> torch.Tensor:
    """Bring the singular values of every matrix near 1: (N, m, n) with m <= n -> (N, m, n), in the dtype of x."""
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=EPS)
    if x.shape[2] > x.shape[1] and x.dtype.itemsize > 2:
        return torch.bmm(_polynomial(torch.bmm(x, x.mT), coefficients), x)
    for a, b, c in coefficients:
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _polynomial(gram: torch.Tensor, coefficients: Sequence[Coefficients]) -> torch.Tensor:
    """The product of all iterations' factors a + b G + c G^2, where G = X X^T is that of the iteration: (N, m, m)."""
    product = None
    for left, (a, b, c) in zip(reversed(range(len(coefficients))), coefficients, strict=True):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # without a, which is added by beta below
        if left:
            half = torch.baddbmm(gram, factor, gram, beta=a)
            gram = torch.baddbmm(half, factor, half, beta=a)
        if product is None:
            product = factor
            product.diagonal(dim1=1, dim2=2).add_(a)
        else:
            product = torch.baddbmm(product, factor, product, beta=a)
    assert product is not None, "no coefficients"
    return product
