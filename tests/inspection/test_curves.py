"""The curves of runs: labels, wall time, running means, and a panel for all that was logged."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from fastgpt.inspection.history import label
from fastgpt.inspection.panels import Run, by_layer, layer_name, paint, present
from fastgpt.loggers import drawing
from tests.helpers.histories import healthy, history


def named(folder: str, **settings):
    made = history(healthy()[:3], **settings)
    return type(made)(Path(folder), made.records, made.settings)


def panels(*records: list[dict]) -> list[str]:
    return [panel.title for panel in present([Run(at, "r", history(one)) for at, one in enumerate(records)])]


@pytest.mark.parametrize(
    ("runs", "labels"),
    [
        ([named("a/x")], ["x"]),
        ([named("a/x"), named("b/y")], ["x", "y"]),
        ([named("a/x"), named("b/x")], [str(Path("a/x")), str(Path("b/x"))]),
        ([named("x"), named("y", learning_rate=3e-3)], ["learning_rate 0.001", "learning_rate 0.003"]),
        ([named("x", min_lr=1e-5), named("y")], ["min_lr 1e-05", "min_lr default"]),
        (
            [named("x"), named("y", n_layer=2, bias=False)],
            ["n_layer 6, bias True", "n_layer 2, bias False"],
        ),
        (
            [named("x", seed=1), named("y", seed=1), named("z", seed=2)],
            ["seed 1 (x)", "seed 1 (y)", "seed 2"],
        ),
        ([named("x", data_dir="here"), named("y", data_dir="there")], ["x", "y"]),
        (
            [named("x", dataset=f"a/{'b' * 50}"), named("y", dataset=f"c/{'b' * 50}")],
            [f"dataset ...{'b' * 40} (x)", f"dataset ...{'b' * 40} (y)"],
        ),
    ],
)
def test_runs_are_named_by_what_differs(runs: list, labels: list[str]):
    assert label(runs) == labels


def test_wall_time_is_drawn_of_the_records_that_have_it():
    """The first record is of an older version, which did not log it."""
    records = [{"step": step, "tokens": 8 * step, "loss": 3.0 - step, "seconds": 60.0 * step} for step in (1, 2, 3)]
    del records[0]["seconds"]
    shown = [Run(number, str(number), history(found)) for number, found in enumerate([records, records[:1]])]
    assert [run.history.seconds for run in shown] == [180.0, None]
    (panel,) = (panel for panel in present(shown) if panel.x == "seconds")
    axes = Figure().subplots()
    paint(axes, panel, shown, 0.0)
    assert [np.array(line.get_data()).tolist() for line in axes.lines] == [[[2.0, 3.0], [1.0, 0.0]]]
    assert axes.get_xlabel() == "wall time (minutes)"


@pytest.mark.parametrize("weight", [0.0, 0.3, 0.9])
def test_running_means_weigh_both_sides_alike(weight: float):
    values = np.random.default_rng(0).normal(size=30)
    distance = np.abs(np.arange(30)[:, None] - np.arange(30))
    weights = np.power(weight, distance)
    expected = weights @ values / weights.sum(axis=1)
    np.testing.assert_allclose(drawing.smoothed(values.tolist(), weight), expected, rtol=1e-9)
    np.testing.assert_allclose(drawing.smoothed([2.0] * 9, weight), 2.0)


def test_a_running_mean_is_drawn_over_its_values_and_breaks_with_the_evaluation_set():
    axes = Figure().subplots()
    records = [{"step": step, "tokens": step, "val_loss": float(step)} for step in (1, 2, 3, 4)]
    records.insert(2, {"step": 2, "tokens": 2, "val_set": "other"})
    drawing.draw(axes, drawing.pieces(records), "step", "val_loss", smooth=0.5, label="val")
    lines = [(*np.array(line.get_data()).tolist(), line.get_label()) for line in axes.lines]
    means = ([1, 2], pytest.approx([4 / 3, 5 / 3]), "val"), ([3, 4], pytest.approx([10 / 3, 11 / 3]), "_")
    assert lines == [([1, 2], [1, 2], "_"), means[0], ([3, 4], [3, 4], "_"), means[1]]
    assert len({line.get_color() for line in axes.lines}) == 1


@pytest.mark.parametrize("runs", [1, 2])
def test_a_single_record_is_drawn_as_a_point(runs: int):
    record = {"step": 1, "tokens": 8, "loss": 2.0, "grad_norm": 1.0, "stats": {"weight_norm": [1.0, 3.0, 2.0]}}
    shown = [Run(number, str(number), history([record])) for number in range(runs)]
    for panel in present(shown):
        axes = Figure().subplots()
        paint(axes, panel, shown, None)
        assert "o" in [line.get_marker() for line in axes.lines]


def test_there_is_a_panel_for_what_was_logged_and_no_other():
    loss, rest = [f"loss against {x}" for x in ("steps", "tokens", "wall time")], ["learning rate", "gradient norm"]
    assert panels(healthy()) == [*loss, *rest, "tokens/s"]
    bare = [{"step": 1, "tokens": 8, "loss": 2.0}, {"step": 2, "tokens": 16, "loss": None, "lr": 0.1}]
    assert panels(bare) == [*loss[:2], "learning rate"]
    assert panels(bare, healthy()) == [*loss, *rest, "tokens/s"]
    assert panels([{"step": 1, "tokens": 8, "skipped": "its loss is nan", "batch": 0}]) == []
    stats = {"grad_norm": [1.0, None, 2.0], "dead_units": [None, None, None]}
    assert panels([*bare, {"step": 3, "tokens": 24, "stats": stats}])[-1] == "gradient norm by layer"


@pytest.mark.parametrize("runs", [1, 2])
def test_statistics_are_drawn_by_layer_for_one_run_and_as_a_range_for_several(runs: int):
    rows = [[1.0, None, 3.0, 8.0], [2.0, None, 4.0, None]]
    records = [{"step": step, "tokens": step, "stats": {"update_ratio": row}} for step, row in enumerate(rows, 1)]
    shown = [Run(number, str(number), history(records)) for number in range(runs)]
    (panel,) = present(shown)
    axes = Figure().subplots()
    paint(axes, panel, shown, None)
    drawn = [np.asarray(line.get_ydata()) for line in axes.lines]
    if runs == 1:
        for line, expected in zip(drawn, ([1, 2], [3, 4], [8, np.nan]), strict=True):
            np.testing.assert_array_equal(line, expected)
        assert axes.get_legend_handles_labels()[1] == ["embeddings", "layer 1", "final norm"]
    else:
        np.testing.assert_array_equal(drawn, [[3, 3], [3, 3]])
        assert len(axes.collections) == 2


def test_layers_are_named_and_rows_of_another_length_are_left_out():
    assert [layer_name(place, 4) for place in range(4)] == ["embeddings", "layer 0", "layer 1", "final norm"]
    rows = [[1, 2], [1, 2, 3], "x", [], [None, 10**400]]
    records = [{"step": step, "stats": {"a": row}} for step, row in enumerate(rows)] + [{"step": 9, "stats": 3}]
    steps, values = by_layer(records, "a")
    np.testing.assert_array_equal(steps, [0, 4])
    np.testing.assert_array_equal(values, [[1, 2], [np.nan, np.nan]])


@pytest.mark.parametrize(("values", "scale"), [([1.0, 2.0, 30.0], "linear"), ([1.0, 1.0, 1.0, 1e4], "log")])
def test_an_axis_is_logarithmic_where_one_value_would_hide_the_others(values: list[float], scale: str):
    shown = [Run(0, "r", history([{"step": at, "tokens": at, "grad_norm": v} for at, v in enumerate(values)]))]
    axes = Figure().subplots()
    paint(axes, present(shown)[0], shown, None)
    assert axes.get_yscale() == scale
