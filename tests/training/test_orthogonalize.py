"""The products against singular values, and the Polar Express's coefficients against the best polynomials."""

import itertools

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastgpt.training.orthogonalize import MARGIN, METHODS, Method, orthogonalize, product_flops

LEAST = 0.003  # the singular value from which the Polar Express's polynomials are best


def matrices(rows: int, columns: int, decay: float = 0.0) -> torch.Tensor:
    """Random ones in float64 whose singular values fall like i^-decay: (2, rows, columns)."""
    random = torch.Generator().manual_seed(rows + columns)
    x = torch.randn(2, rows, columns, generator=random, dtype=torch.float64)
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    return u @ torch.diag(torch.arange(1, rows + 1).double() ** -decay) @ v if decay else x


def by_singular_values(x: torch.Tensor, method: Method) -> torch.Tensor:
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    s = s / (s**4).sum(1, keepdim=True) ** 0.25 / MARGIN if method.tight else s / (s**2).sum(1, keepdim=True) ** 0.5
    for a, b, c in method.coefficients:
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag_embed(s) @ v


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("rows", "columns"), [(24, 24), (24, 25), (16, 64), (1, 7), (1, 1)])
@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_products_are_the_polynomials_of_singular_values(method: str, rows: int, columns: int, decay: float):
    x = matrices(rows, columns, decay)
    torch.testing.assert_close(orthogonalize(x, METHODS[method]), by_singular_values(x, METHODS[method]))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (64, 256)])
@pytest.mark.parametrize("decay", [0.0, 1.0, 2.0])
def test_float32_is_near_float64_also_for_small_singular_values(method: str, rows: int, columns: int, decay: float):
    x = matrices(rows, columns, decay).float()
    wanted = orthogonalize(x.double(), METHODS[method])
    error = (orthogonalize(x, METHODS[method]) - wanted).norm() / wanted.norm()
    assert error < 1e-5


@pytest.mark.parametrize(("method", "near"), [("newton_schulz", (0.65, 1.25)), ("polar_express", (0.34, 1.66))])
def test_singular_values_come_near_1(method: str, near: tuple[float, float]):
    for x in (matrices(32, 128), matrices(32, 32, decay=1.0)):
        values = torch.linalg.svdvals(orthogonalize(x, METHODS[method]))
        assert near[0] < values.min() <= values.max() < near[1]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-12, 1e12, 1e18])
def test_any_size_is_orthogonalized_without_overflow(method: str, size: float):
    """Below the least norm the result is smaller, and 0 for a matrix of zeros."""
    found = orthogonalize(matrices(8, 16).float() * size, METHODS[method])
    assert found.isfinite().all()
    if size >= 1e-6:
        assert torch.linalg.svdvals(found).min() > 0.3
    assert found.any() == (size > 0)


def best(low: float, high: float) -> tuple[np.ndarray, float]:
    """The odd polynomial of degree 5 that is nearest to 1 on an interval, and its error: Remez's exchange."""
    points = np.linspace(low, high, 4)
    signs = np.array([1, -1, 1, -1])
    for _ in range(100):
        *coefficients, error = np.linalg.solve(np.stack([points, points**3, points**5, signs], 1), np.ones(4))
        a, b, c = coefficients
        root = np.sqrt(9 * b * b - 20 * a * c)
        points[1:3] = np.sqrt((-3 * b + np.array([-root, root])) / (10 * c))
    return np.array(coefficients), abs(error)


def test_the_polar_expresss_polynomials_are_the_best():
    low, high = LEAST, 1.0
    for found in METHODS["polar_express"].coefficients:
        wanted, error = best(low, high)
        np.testing.assert_allclose(found, wanted, rtol=1e-6)
        low, high = 1 - error, 1 + error
    assert (low, high) == pytest.approx((0.354, 1.646), abs=1e-3)
    x = np.linspace(LEAST, 1, 10_000)
    for a, b, c in METHODS["polar_express"].coefficients:
        x = a * x + b * x**3 + c * x**5
    assert low - 1e-6 < x.min() < x.max() < high + 1e-6


def test_an_iteration_of_any_number_is_computed():
    x = matrices(6, 20)
    coefficients = [(2.0 - 0.1 * i, -1.5, 0.5) for i in range(7)]
    for count in range(1, 8):
        method = Method(tuple(itertools.islice(coefficients, count)))
        torch.testing.assert_close(orthogonalize(x, method), by_singular_values(x, method))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("rows", "columns"), [(128, 128), (128, 512), (3, 1000)])
def test_operations_are_counted_as_they_are_computed(method: str, rows: int, columns: int):
    with FlopCounterMode(display=False) as counter:
        orthogonalize(torch.empty(1, rows, columns, device="meta"), METHODS[method])
    assert product_flops(rows, columns, METHODS[method]) == counter.get_total_flops()
