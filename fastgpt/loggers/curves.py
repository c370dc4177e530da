"""Draws the curves of a run into its folder, from what metrics.jsonl says."""

from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastgpt.checkpoint.progress import Progress
from fastgpt.loggers.base import Logger, Record
from fastgpt.loggers.jsonl import NAME, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LARGEST = 1e15  # steps, tokens, nats


class Curves(Logger):
    """Draws `plots/loss.png` when a run has ended, unless an error ended it."""

    name = "curves"

    def __init__(self, out_dir: Path):
        self.out_dir = out_dir

    def start(self, progress: Progress) -> None:
        """Nothing: the picture is drawn from a file."""

    def log(self, record: Record) -> None:
        """Nothing: the picture is drawn from a file."""

    def finish(self, error: BaseException | None) -> str | None:
        return str(plot_loss(self.out_dir)) if error is None else None


def plot_loss(out_dir: Path) -> Path:
    """Draw `plots/loss.png`: training and validation loss against steps (below) and tokens (above).

    A dotted line marks a change of the evaluation set, at which the curve of the val loss is interrupted.
    """
    from matplotlib.figure import Figure

    found = read_metrics(out_dir / NAME)
    records = [record for record in found if all(_is_drawn(record.get(key)) for key in ("step", "tokens"))]
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    changes = [at for at, record in enumerate(records) if "val_set" in record]
    pieces = [records[start:end] for start, end in pairwise([0, *changes, len(records)])]
    _draw(axes, [records], "loss", "-", label="train")
    _draw(axes, pieces, "val_loss", "o-", label="val")
    for number, at in enumerate(changes):
        label = None if number else "another evaluation set"
        axes.axvline(records[at]["step"], color="gray", linestyle=":", linewidth=1, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    if records:
        last = records[-1]
        steps, tokens = ([-last[key], 0, *(r[key] for r in records), 2 * last[key]] for key in ("step", "tokens"))

        def to_tokens(step: Any) -> Any:
            return np.interp(step, steps, tokens)

        def to_steps(token: Any) -> Any:
            return np.interp(token, tokens, steps)

        axes.secondary_xaxis("top", functions=(to_tokens, to_steps)).set_xlabel("tokens")
    path = out_dir / "plots" / "loss.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path)
    return path


def _draw(axes: "Axes", pieces: list[list[Record]], key: str, style: str, label: str) -> None:
    """Draw a curve in several pieces, with one colour and one entry in the legend."""
    color = None
    for piece in pieces:
        points = [(record["step"], record[key]) for record in piece if _is_drawn(record.get(key))]
        if points:
            (line,) = axes.plot(
                *zip(*points, strict=True), style, label=label, color=color, linewidth=1.2, markersize=3.5
            )
            color, label = line.get_color(), "_"  # the legend ignores labels that begin with _


def _is_drawn(value: Any) -> bool:
    """Whether it is a number of a size that can be drawn."""
    return isinstance(value, int | float) and abs(value) <= LARGEST
