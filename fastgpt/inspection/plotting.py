"""Draws the curves of runs: a picture with all panels, or a page that holds each as a picture of its own."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastgpt.config.curves import PlotConfig
from fastgpt.errors import UsageError
from fastgpt.inspection import curves_page, history, outputs
from fastgpt.inspection.panels import LINE, POINTS, Panel, Run, paint, present
from fastgpt.loggers import drawing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZE, DOTS = (4.7, 3.1), 110  # inches of a panel, and dots an inch
COLUMNS = 6  # divided by the number of panels in a row


def plot(config: PlotConfig) -> None:
    """Draw what the settings ask for into `output`.

    Raises:
        UsageError: a folder holds no run, or `output` cannot be written.
    """
    path = outputs.check("output", config.output)
    histories = [history.read(run, "runs") for run in config.runs]
    labels = history.label(histories)
    runs = [Run(number, *pair) for number, pair in enumerate(zip(labels, histories, strict=True))]
    panels = present(runs)
    if not panels:
        raise UsageError(f"`runs` {config.runs[0]}: no loss is logged there yet; wait for its first records")
    if path.suffix.lower() == ".html":
        content = curves_page.page(runs, panels, config.smooth).encode()
    else:
        content = _picture(runs, panels, config.smooth, path.suffix.lower()[1:])
    outputs.save("output", path, [content])


def _picture(runs: Sequence[Run], panels: Sequence[Panel], smooth: float | None, kind: str) -> bytes:
    """All panels in one picture, a row for each `Panel.row`, above a legend of the runs and the kinds of lines."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    rows = [[panel for panel in panels if panel.row == row] for row in sorted({panel.row for panel in panels})]
    size = 3 * SIZE[0], len(rows) * SIZE[1] + 0.5
    figure = Figure(size, dpi=DOTS, layout=ConstrainedLayoutEngine(h_pad=0.08, w_pad=0.08))
    grid = figure.add_gridspec(len(rows), COLUMNS)
    for at, row in enumerate(rows):
        width = COLUMNS // len(row)
        for number, panel in enumerate(row):
            paint(figure.add_subplot(grid[at, number * width : (number + 1) * width]), panel, runs, smooth)
    _legend(figure, runs, smooth)
    with matplotlib.rc_context({"svg.hashsalt": "fastgpt"}):
        return drawing.render(figure, kind, {"Date": None} if kind == "svg" else {"Software": None})


def _legend(figure: "Figure", runs: Sequence[Run], smooth: float | None) -> None:
    """The runs by their colors, and the kinds of lines."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=run.style["color"], linewidth=3, label=run.style["label"]) for run in runs]
    gray: dict[str, Any] = {"color": "#555555"}
    handles.append(Line2D([], [], **gray, **LINE, label="train" if smooth == 0 else "train, running mean"))
    if smooth != 0:
        handles.append(Line2D([], [], **gray | drawing.RAW, label="the values themselves"))
    handles.append(Line2D([], [], **gray, **POINTS, marker="o", label="val"))
    font = {"family": drawing.fonts(), "size": 9}
    columns = 3 if max(len(run.label) for run in runs) > 40 else 4
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, prop=font)
