"""Draws the curves of a run into its folder, from what metrics.jsonl says."""

from pathlib import Path
from typing import Any

import numpy as np

from fastgpt.checkpoint.progress import Progress
from fastgpt.loggers import drawing
from fastgpt.loggers.base import Logger, Record
from fastgpt.loggers.jsonl import NAME, read_metrics

LINE: dict[str, Any] = {"linewidth": 1.2, "markersize": 3.5}


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

    records = drawing.drawable(read_metrics(out_dir / NAME), "step", "tokens")
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    drawing.draw(axes, [records], "step", "loss", label="train", **LINE)
    drawing.draw(axes, drawing.pieces(records), "step", "val_loss", label="val", marker="o", **LINE)
    drawing.mark_changes(axes, records, "step")
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
