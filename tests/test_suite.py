"""The part of a grid that the default run takes."""

import itertools

import pytest

from tests.helpers.covering import chosen

AXES = {"dtype": 2, "layout": 3, "length": 8, "names": 6}
GRID = [dict(zip(AXES, values, strict=True)) for values in itertools.product(*map(range, AXES.values()))]


def covered(points, strength):
    return {pairs for point in points for pairs in itertools.combinations(sorted(point.items()), strength)}


@pytest.mark.parametrize(("strength", "most"), [(1, 8), (2, 60), (4, 288)])
def test_every_combination_of_that_many_axes_is_run(strength, most):
    found = [GRID[i] for i in chosen(GRID, strength)]
    assert covered(found, strength) == covered(GRID, strength)
    assert len(found) <= most


def test_a_hole_in_the_grid_is_no_hole_in_the_default_run():
    grid = [point for point in GRID if point["dtype"] or point["layout"] != 2]
    assert covered([grid[i] for i in chosen(grid, 2)], 2) == covered(grid, 2)


def test_a_strength_above_the_axes_takes_all():
    grid = [{"dtype": 0}, {"dtype": 1}]
    assert chosen(grid, 2) == [0, 1]


def test_a_strength_of_zero_is_refused():
    with pytest.raises(ValueError, match="strength is 0"):
        chosen(GRID, 0)
