"""Chooses the part of a grid of parameters that the default run takes; `slow` takes the rest.

A test marked `covering_array(strength)` is run at so few points of its grid that every value of each axis
(strength 1), or every pair of values of two axes (strength 2), occurs in at least one: a covering array (Cohen et al.,
1997, "The AETG system"). Most faults show with one value or with two together.
"""

import itertools
from collections.abc import Sequence

import pytest

MARK = "covering_array"
Point = dict[str, int]  # an axis -> the position of its value


def chosen(points: Sequence[Point], strength: int) -> list[int]:
    """The positions of points that together have all that is to be covered: greedily the most first.

    Raises `ValueError` for a strength below 1.
    """
    if strength < 1:
        raise ValueError(f"covering_array: strength is {strength}; it must be at least 1")
    covers = [set(itertools.combinations(sorted(point.items()), min(strength, len(point)))) for point in points]
    left = set[tuple[tuple[str, int], ...]]().union(*covers)
    found = []
    while left:
        best = max(range(len(points)), key=lambda i: len(covers[i] & left))
        left -= covers[best]
        found.append(best)
    return sorted(found)


def mark_the_rest_slow(items: Sequence[pytest.Item]) -> None:
    """Mark `slow` each test of a grid that its covering array leaves out."""
    grids: dict[str, list[pytest.Function]] = {}
    for item in items:
        if isinstance(item, pytest.Function) and item.get_closest_marker(MARK):
            grids.setdefault(item.nodeid.split("[")[0], []).append(item)
    for grid in grids.values():
        mark = grid[0].get_closest_marker(MARK)
        assert mark is not None
        kept = chosen([dict(item.callspec.indices) for item in grid], *mark.args)
        for i, item in enumerate(grid):
            if i not in kept:
                item.add_marker(pytest.mark.slow)
