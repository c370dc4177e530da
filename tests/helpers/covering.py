"""Chooses the part of a grid of parameters that the default run takes; `slow` takes the rest.

A test marked `covering_array(strength)` is run at so few points of its grid that every value of each axis
(strength 1), or every pair of values of two axes (strength 2), occurs in at least one: a covering array (Cohen et al.,
1997, "The AETG system"). Most faults show with one value or with two together.
A single axis is shortened by `some`.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import pytest

MARK = "covering_array"
Point = dict[str, int]  # an axis -> what tells its values apart


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
        known_slow = item.get_closest_marker("slow")
        if isinstance(item, pytest.Function) and item.get_closest_marker(MARK) and not known_slow:
            grids.setdefault(item.nodeid.split("[")[0], []).append(item)
    for grid in grids.values():
        mark = grid[0].get_closest_marker(MARK)
        assert mark is not None
        # A grid's points share the objects that `parametrize` was given.
        points = [{name: id(value) for name, value in item.callspec.params.items()} for item in grid]
        kept = chosen(points, *mark.args)
        for i, item in enumerate(grid):
            if i not in kept:
                item.add_marker(pytest.mark.slow)


def some(count: int, values: Sequence[Any]) -> list[Any]:
    """Values for `parametrize`, of which `count`, spread evenly from the first to the last, are not `slow`."""
    kept = {round(i * (len(values) - 1) / max(1, count - 1)) for i in range(count)}
    found = []
    for i, value in enumerate(values):
        one = value if isinstance(value, type(pytest.param())) else pytest.param(*as_tuple(value))
        marks = [*one.marks, *([] if i in kept else [pytest.mark.slow])]
        found.append(pytest.param(*one.values, marks=marks, id=one.id))
    return found


def as_tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)
