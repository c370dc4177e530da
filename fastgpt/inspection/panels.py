"""Draws the panels of runs' curves, each on matplotlib's axes; a panel for which no run has a number is left out.

The values are faint, their running mean is a whole line, and val losses are dots on a dashed line, which breaks where
the evaluation set changes. Statistics by layer of one run have a line for each layer, and those of several runs a line
for the median layer, in a band from the lowest to the highest.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fastgpt.inspection.history import History
from fastgpt.loggers import drawing
from fastgpt.loggers.base import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# By Okabe & Ito (2008) and Tol (2021): told apart by the colour blind. The second of each is for a dark page.
COLORS = (
    ("#0072b2", "#56a8e8"), ("#d55e00", "#ff8a4c"), ("#009e73", "#2fd0a0"), ("#c45a9d", "#f0a3cf"),
    ("#e69f00", "#ffc04d"), ("#332288", "#a396ff"), ("#46a5d6", "#9ad7ff"), ("#882255", "#e0709b"),
    ("#86861c", "#d6d65c"), ("#5f5f5f", "#bdbdbd"),
)  # fmt: skip
MARKERS = "os^Dv*PX<>"  # of val losses, one for each color
NAMED_LAYERS = 8  # about so many of a deep model's are in the legend
LAYERS = ("#3b7dd8", "#2aa198", "#c9a227", "#dc5a3c")  # from the first layer to the last, on light and dark pages
LINE: dict[str, Any] = {"linewidth": 1.4}
POINTS: dict[str, Any] = {"linewidth": 1.1, "markersize": 4, "linestyle": (0, (4, 2))}  # of val losses
WIDE = 40.0  # times as large as the median: a curve with such a value has a logarithmic axis
NAMES = {"step": "steps", "tokens": "tokens", "seconds": "wall time"}
VALUES = {"lr": "learning rate", "grad_norm": "gradient norm", "tokens_per_second": "tokens/s"}
STATS = {  # in two rows
    "grad_norm": (2, "gradient norm by layer"),
    "weight_norm": (2, "weight norm by layer"),
    "update_ratio": (2, "update ratio by layer"),
    "activation_rms": (3, "activation rms by layer"),
    "dead_units": (3, "dead units by layer"),
}
FORMATS = {"tokens_per_second": "k", "dead_units": "%"}  # of axes that begin at 0


@dataclass(frozen=True)
class Run:
    """A run on the page.

    Attributes:
        number: counts the runs from 0, and decides its color.
    """

    number: int
    label: str
    history: History

    @property
    def style(self) -> dict[str, Any]:
        return {"color": COLORS[self.number % len(COLORS)][0], "label": drawing.literal(self.label)}

    @property
    def marker(self) -> str:
        return MARKERS[self.number % len(MARKERS)]


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        row: panels of a row stand side by side where there is room.
        x, y: keys of the records; of statistics, `y` is the key in `stats`.
        draw: draws a run on the axes.
    """

    row: int
    title: str
    x: str
    y: str
    draw: "Callable[[Axes, Panel, Run, Sequence[Record], float | None], None]"


def present(runs: Sequence[Run]) -> list[Panel]:
    """The panels for which a run has numbers."""
    keys = {key for run in runs for record in run.history.records for key in record if drawing.is_drawn(record[key])}
    losses = keys & {"loss", "val_loss"}
    found = [Panel(0, f"loss against {name}", x, "loss", _loss) for x, name in NAMES.items() if losses and x in keys]
    found += [Panel(1, title, "step", key, _value) for key, title in VALUES.items() if key in keys]
    draw = _layers if len(runs) == 1 else _range
    for key, (row, title) in STATS.items():
        if any(np.isfinite(by_layer(run.history.records, key)[1]).any() for run in runs):
            found.append(Panel(row, title, "step", key, draw))
    return found


def paint(axes: "Axes", panel: Panel, runs: Sequence[Run], smooth: float | None) -> None:
    """Draw a panel of the runs; `smooth` is that of `drawing.draw`."""
    name, unit = panel.x, 1.0
    if panel.x == "seconds":
        unit, name = _unit(max(run.history.seconds or 0.0 for run in runs))
    for run in runs:
        records = run.history.records
        if panel.x == "seconds":
            timed = drawing.drawable(records, "seconds")
            records = [{**record, "seconds": record["seconds"] / unit} for record in timed]
        panel.draw(axes, panel, run, records, smooth)
    _scale(axes, panel)
    axes.set_title(panel.title, fontsize=10)
    axes.set_xlabel(name, fontsize=9)
    axes.set_ylabel("nats per token" if panel.y == "loss" else "", fontsize=9)
    axes.tick_params(labelsize=8.5)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _scale(axes: "Axes", panel: Panel) -> None:
    """Choose where the axes begin, whether they are logarithmic, and how their numbers are written."""
    from matplotlib.ticker import EngFormatter, PercentFormatter

    if panel.x == "tokens":
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if panel.y in FORMATS:
        axes.set_ylim(0, 1.05 * max(axes.dataLim.y1, 0.02))
        axes.yaxis.set_major_formatter(PercentFormatter(1) if FORMATS[panel.y] == "%" else EngFormatter(sep=""))
    elif _is_wide(axes):
        axes.set_yscale("log")


def by_layer(records: Sequence[Record], key: str) -> tuple[np.ndarray, np.ndarray]:
    """The steps (N,) at which a statistic was logged, and its values (N, L + 2); what is no number there is NaN.

    The first is that of the embeddings, the last that of the final norm; see `layer_name`.
    """
    steps, rows = [], []
    for record in records:
        stats = record.get("stats")
        row = stats.get(key) if isinstance(stats, Mapping) else None
        if isinstance(row, list) and row and len(row) == len(rows[0] if rows else row):
            steps.append(record["step"])
            rows.append([float(value) if drawing.is_drawn(value) else np.nan for value in row])
    return np.array(steps, dtype=int), np.array(rows, dtype=float)


def layer_name(place: int, count: int) -> str:
    """The name of a place among the `count` values of a statistic."""
    return {0: "embeddings", count - 1: "final norm"}.get(place, f"layer {place - 1}")


def _loss(axes: "Axes", panel: Panel, run: Run, records: Sequence[Record], smooth: float | None) -> None:
    drawing.draw(axes, [records], panel.x, "loss", smooth=smooth, **run.style, **LINE)
    points = {**run.style, **POINTS, "marker": run.marker, "label": "_"}
    drawing.draw(axes, drawing.pieces(records), panel.x, "val_loss", **points)
    drawing.mark_changes(axes, records, panel.x)


def _value(axes: "Axes", panel: Panel, run: Run, records: Sequence[Record], smooth: float | None) -> None:
    smooth = 0.0 if panel.y == "lr" else smooth  # which has no noise
    drawing.draw(axes, [records], panel.x, panel.y, smooth=smooth, **run.style, **LINE)


def _layers(axes: "Axes", panel: Panel, run: Run, records: Sequence[Record], smooth: float | None) -> None:
    """A line for each layer of one run; the legend names some of them."""
    from matplotlib.colors import LinearSegmentedColormap

    steps, values = by_layer(records, panel.y)
    count = values.shape[1] if values.size else 0
    known = [place for place in range(count) if np.isfinite(values[:, place]).any()]
    colors, last = LinearSegmentedColormap.from_list("layers", LAYERS), max(1, count - 1)
    named = {*known[:: -(-len(known) // NAMED_LAYERS)], known[-1]} if known else set()
    for place in known:
        name = layer_name(place, count) if place in named else "_"
        curve = values[:, place]
        axes.plot(steps, curve, color=colors(place / last), label=name, **LINE, **drawing.lone(curve.tolist()))
    if known:
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8, frameon=False, labelcolor="linecolor")


def _range(axes: "Axes", panel: Panel, run: Run, records: Sequence[Record], smooth: float | None) -> None:
    """A line for the median layer of one of several runs, in a band from the lowest to the highest."""
    steps, values = by_layer(records, panel.y)
    known = np.isfinite(values).any(axis=1) if values.size else np.zeros(0, dtype=bool)
    if known.any():
        steps, values = steps[known], values[known]
        median = np.nanmedian(values, axis=1)
        axes.plot(steps, median, **run.style, **LINE, **drawing.lone(median.tolist()))
        color = run.style["color"]
        axes.fill_between(steps, np.nanmin(values, axis=1), np.nanmax(values, axis=1), color=color, alpha=0.15, lw=0)


def _unit(seconds: float) -> tuple[float, str]:
    """The unit for a time axis, in seconds, and its name."""
    for unit, name in ((86_400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * unit:
            return unit, f"wall time ({name})"
    return 1, "wall time (seconds)"


def _is_wide(axes: "Axes") -> bool:
    """True if a value is so far above the others that these could not be told apart."""
    values = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in axes.lines] or [np.zeros(0)])
    values = values[np.isfinite(values)]
    return bool(values.size) and values.min() > 0 and values.max() > WIDE * np.median(values)
