"""Draws the memory of a training step and of a generation at their peaks: a stacked bar for each."""

from collections.abc import Iterator

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from fastgpt.inspection.memory_report import BY_LAYER, KINDS, Found
from fastgpt.loggers import drawing
from fastgpt.model.facts import describe_shape
from fastgpt.model.footprint import Holding, Layers
from fastgpt.ops.ceilings import dtype_name
from fastgpt.system.units import counted, format_exactly

COLOURS = {
    "weights": "#1f5fa8",
    "gradients": "#d9822b",
    "moments": "#8e63b5",
    "cache": "#2a8f85",
    "activations": "#58a05c",
    "logits": "#c9a227",
    "tokens": "#7a7a7a",
    "temporary": "#c2c7cf",
}
MOST_EDGES = 64  # blocks whose borders are drawn


def draw(found: Found, budget: int | None) -> bytes:
    """A PNG; a line in a bar is what was measured, and a dashed one across both is the memory that should hold them."""
    training, generation = found.training, found.generation
    bars = [
        (f"training step\nin {training.phase}", training.peaks[training.phase], found.measured and found.measured.peak),
        (f"generation\nin {generation.phase}", generation.peaks[generation.phase], found.measured_generation),
    ]
    unit, scale = _unit(max(training.peak, generation.peak))
    figure = Figure(figsize=(9, 3.9), dpi=120, layout="constrained")
    config, arithmetic = found.work.config, dtype_name(found.work.machine.dtype)
    batch = f"{counted(config.batch_size, 'sequence')} x {config.block_size:,} tokens"
    figure.suptitle(f"{describe_shape(config)}; {arithmetic}, {batch} in a micro-batch", fontsize=10)
    axes = figure.subplots()
    drawn: dict[str, None] = {}
    for place, (_, held, measured) in enumerate(bars):
        left = 0.0
        for kind, size in _pieces(held):
            axes.barh(place, size / scale, left=left, height=0.6, color=COLOURS[kind], edgecolor="white", linewidth=0.4)
            left += size / scale
            drawn[kind] = None
        label = format_exactly(round(left * scale))
        if measured is not None:
            axes.plot([measured / scale] * 2, [place - 0.38, place + 0.38], color="black", linewidth=1.6)
            label += f"\nmeasured {format_exactly(measured)}"
        end = max(left, (measured or 0) / scale), place
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # over the dashed line
        axes.annotate(label, end, (7, 0), textcoords="offset points", va="center", fontsize=9, bbox=box)
    handles = [Patch(color=COLOURS[kind], label=name) for kind, name in KINDS.items() if kind in drawn]
    right = max(training.peak, generation.peak) / scale
    if budget is not None and budget / scale < 1.6 * right:
        axes.axvline(budget / scale, color="black", linestyle="dashed", linewidth=1)
        axes.text(budget / scale, -0.62, f" {format_exactly(budget)} to fit in", fontsize=9)
        right = max(right, budget / scale)
    axes.set_xlim(0, right * 1.24)
    axes.set_ylim(1.6, -0.75)
    axes.set_yticks(range(len(bars)), [name for name, *_ in bars])
    axes.set_xlabel(f"memory at the peak ({unit})")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
    figure.legend(handles=handles, loc="outside lower center", ncols=7, frameon=False, fontsize=9)
    return drawing.render(figure)


def _unit(size: int) -> tuple[str, int]:
    return ("GiB", 1 << 30) if size >= 1 << 31 else ("MiB", 1 << 20)


def _pieces(held: Holding) -> Iterator[tuple[str, int]]:
    """The parts of a bar, from left to right; of activations each layer is one, unless they are too many."""
    for kind in KINDS:
        layers = held.get(kind, Layers())
        if kind == BY_LAYER and sum(count for count, _ in layers.blocks) <= MOST_EDGES:
            blocks = (size for count, size in layers.blocks for _ in range(count))
            yield from ((kind, size) for size in (layers.embedding, *blocks, layers.head) if size)
        elif layers.total:
            yield kind, layers.total
