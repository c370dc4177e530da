"""The curves of a run, as pictures in its folder."""

from pathlib import Path
from typing import Any

import numpy as np

from fastgpt.metrics import read_metrics

LARGEST = 1e15  # steps, tokens, nats


def plot_loss(out_dir: Path) -> Path:
    """Draw `plots/loss.png`: training and validation loss against steps (below) and tokens (above)."""
    from matplotlib.figure import Figure

    found = read_metrics(out_dir / "metrics.jsonl")
    records = [record for record in found if all(_is_drawn(record.get(key)) for key in ("step", "tokens"))]
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    for key, label, style in (("loss", "train", "-"), ("val_loss", "val", "o-")):
        points = [(r["step"], r[key]) for r in records if _is_drawn(r.get(key))]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1.2, markersize=3.5)
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


def _is_drawn(value: Any) -> bool:
    """Whether it is a number that a picture has room for."""
    return isinstance(value, int | float) and abs(value) <= LARGEST
