"""The picture of the memory over one training step, from the series of `fastgpt.system.live_bytes`."""

import itertools
from collections.abc import Sequence
from pathlib import Path

from fastgpt.system.live_bytes import Point

MIB = 1 << 20


def thinned(series: Sequence[Point], most: int = 400) -> list[Point]:
    """At most so many points, each the highest of its stretch, so that no peak is lost."""
    if len(series) <= most:
        return list(series)
    bounds = [len(series) * i // most for i in range(most + 1)]
    return [max(series[begin:end], key=lambda point: point[1]) for begin, end in itertools.pairwise(bounds)]


def draw_allocation(allocation: dict[str, list[Point]], phases: dict[str, list[tuple[str, int]]], path: Path) -> None:
    """Write a PNG: for each backend, live bytes along one training step, its phases shaded."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 2.6 * len(allocation)), dpi=120, layout="constrained")
    rows = figure.subplots(len(allocation), squeeze=False, sharey=True)[:, 0]
    for axes, (backend, points) in zip(rows, allocation.items(), strict=True):
        events, sizes = zip(*points, strict=True)
        axes.fill_between(events, [size / MIB for size in sizes], step="post", color="#1f5fa8", alpha=0.8)
        starts = [*phases[backend], ("", events[-1])]
        for shade, ((name, begin), (_, end)) in enumerate(itertools.pairwise(starts)):
            axes.axvspan(begin, end, color="black", alpha=0.06 * (shade % 2), linewidth=0, zorder=0)
            axes.text((begin + end) / 2, 1.0, name, ha="center", va="bottom", transform=axes.get_xaxis_transform())
        axes.set_xlim(0, events[-1])
        axes.set_ylim(bottom=0)
        axes.set_ylabel(f"{backend} (MiB)")
        axes.grid(alpha=0.25)
    rows[0].set_title("Memory over one training step", pad=18)
    rows[-1].set_xlabel("operation")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
