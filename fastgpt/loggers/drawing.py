"""Draws what runs have logged on matplotlib's axes: curves in pieces, and the marks of another evaluation set.

`literal` and `fonts` are for names that people gave; `render` makes the picture.
"""

import functools
import io
import math
import warnings
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from fastgpt.loggers.base import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LARGEST = 1e15  # steps, tokens, nats
# Fonts with Korean, Chinese and Japanese letters, which matplotlib's own lacks; those are used that are there.
MORE_FONTS = ("Noto Sans CJK KR", "Noto Sans CJK JP", "NanumGothic", "Malgun Gothic", "Apple SD Gothic Neo")
RAW: dict[str, Any] = {"alpha": 0.4, "linewidth": 0.8}  # of the values behind a smoothed curve


def is_drawn(value: Any) -> bool:
    """Whether it is a number of a size that can be drawn."""
    return isinstance(value, int | float) and abs(value) <= LARGEST


def drawable(records: Sequence[Record], *keys: str) -> list[Record]:
    """The records that have a number that can be drawn under each of these keys."""
    return [record for record in records if all(is_drawn(record.get(key)) for key in keys)]


def pieces(records: Sequence[Record]) -> list[list[Record]]:
    """The records in pieces, each with one evaluation set: val losses of two sets do not compare."""
    changes = [at for at, record in enumerate(records) if "val_set" in record]
    return [list(records[start:end]) for start, end in pairwise([0, *changes, len(records)])]


def smoothed(values: Sequence[float], weight: float) -> list[float]:
    """Running means in which a value that is k records away, before or after, weighs `weight` ** k.

    They look both ways, since a mean of earlier values alone lags behind a falling loss.
    """

    def earlier(given: Sequence[float]) -> list[float]:
        total = 0.0
        return [total := weight * total + value for value in given]

    def both(given: Sequence[float]) -> list[float]:
        pairs = zip(earlier(given), reversed(earlier(given[::-1])), given, strict=True)
        return [before + after - value for before, after, value in pairs]

    return [total / mass for total, mass in zip(both(values), both([1.0] * len(values)), strict=True)]


def usual_weight(count: int) -> float:
    """The weight with which a mean covers about a fiftieth of so many values on each side."""
    return count / (count + 50)


def lone(values: Sequence[float]) -> dict[str, Any]:
    """The style of a curve that has a single point, of which a line alone would show nothing."""
    return {"marker": "o", "markersize": 4} if sum(map(math.isfinite, values)) == 1 else {}


def draw(
    axes: "Axes",
    parts: Sequence[Sequence[Record]],
    x: str,
    y: str,
    *,
    smooth: float | None = 0.0,
    label: str,
    **style: Any,
) -> None:
    """Draw a curve in several parts, with one colour and one entry in the legend.

    Args:
        x, y: keys of the records; those that lack one of them are left out.
        smooth: weight in `smoothed` means, behind which the values themselves are drawn; None: by their number.
        style: keywords of matplotlib's `plot`.
    """
    for part in parts:
        if not (found := drawable(part, x, y)):
            continue
        across, values = tuple(record[x] for record in found), [record[y] for record in found]
        weight = usual_weight(len(values)) if smooth is None else smooth
        if weight:
            (line,) = axes.plot(across, values, **style | RAW, label="_")
            style["color"] = line.get_color()
        (line,) = axes.plot(across, smoothed(values, weight) if weight else values, **lone(values) | style, label=label)
        style["color"], label = line.get_color(), "_"  # the legend ignores labels that begin with _


def literal(text: str) -> str:
    """A text that matplotlib draws as it is: between two dollar signs it would read a formula."""
    return text.replace("$", r"\$")


@functools.cache
def fonts() -> list[str]:
    """Matplotlib's font, and others for the letters that it lacks."""
    from matplotlib import font_manager, rcParams

    installed = set(font_manager.get_font_names())
    return [*rcParams["font.family"], *(name for name in MORE_FONTS if name in installed)]


def render(figure: "Figure", kind: str = "png", metadata: dict[str, None] | None = None) -> bytes:
    """The picture. A letter that no font has is a box, without a warning."""
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(content, format=kind, metadata=metadata)
    return content.getvalue()


def mark_changes(axes: "Axes", records: Sequence[Record], x: str, **style: Any) -> None:
    """A dotted line where the evaluation set changes."""
    changes = drawable([record for record in records if "val_set" in record], x)
    for number, record in enumerate(changes):
        label = "_" if number else "another evaluation set"
        axes.axvline(record[x], **{"color": "gray", "linestyle": ":", "linewidth": 1, "label": label} | style)
