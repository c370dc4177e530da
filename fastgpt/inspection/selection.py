"""Selects layers and checkpoints by the texts of the settings `layers` and `checkpoints`."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from fastgpt.checkpoint import store
from fastgpt.errors import UsageError, shown
from fastgpt.system.units import counted

MOST_CHECKPOINTS = 12
RANGE = re.compile(r"\s*(\d{1,9})\s*(?:-\s*(\d{1,9})\s*)?", re.ASCII)
Item = TypeVar("Item")


def evenly(items: Sequence[Item], count: int) -> list[Item]:
    """At most so many of the items, evenly spaced, the first and the last among them; of one the last."""
    if count >= len(items):
        return list(items)
    if count == 1:
        return [items[-1]]
    return [items[round(at * (len(items) - 1) / (count - 1))] for at in range(count)]


def layers(text: str | None, n_layer: int) -> list[int]:
    """The layers of a text such as "0,5" or "2-4", in their order; None is all of them.

    Raises:
        UsageError: another text, or a layer that the model does not have.
    """
    if text is None:
        return list(range(n_layer))
    found: set[int] = set()
    for part in text.split(","):
        match = RANGE.fullmatch(part)
        if match is None:
            raise UsageError(
                f"`layers` {shown(text)} is no list of layers; give numbers and ranges, such as 0,5 or 2-4"
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise UsageError(f"`layers` {shown(text)}: {first}-{last} is no range; give the lower number first")
        check_layer(last, n_layer, "layers")
        found |= set(range(first, last + 1))
    return sorted(found)


def check_layer(layer: int, n_layer: int, setting: str) -> None:
    """Raise `UsageError` if the model has no such layer."""
    if layer >= n_layer:
        raise UsageError(f"`{setting}`: there is no layer {layer}; the model's {counted(n_layer, 'layer')} are "
                         f"0 to {n_layer - 1}")  # fmt: skip


def check_head(head: int, n_head: int) -> None:
    """Raise `UsageError` if a layer has no such head."""
    if head >= n_head:
        raise UsageError(f"`head`: there is no head {head}; a layer's {counted(n_head, 'head')} are 0 to {n_head - 1}")


def check_count(text: str) -> int:
    """The most checkpoints that a text asks for: all, which are at most `MOST_CHECKPOINTS`, or a number.

    Raises:
        UsageError: another text, or another number.
    """
    if text == "all":
        return MOST_CHECKPOINTS
    if not re.fullmatch(r"\d{1,9}", text, re.ASCII) or not 1 <= int(text) <= MOST_CHECKPOINTS:
        raise UsageError(f"`checkpoints` {shown(text)} is neither all nor a number from 1 to {MOST_CHECKPOINTS}")
    return int(text)


def checkpoints(text: str, out_dir: Path) -> tuple[list[Path], int]:
    """The checkpoints of a run that a text asks for, the earliest first, and the number of those that there are.

    Checkpoints beyond `latest` do not count: the run was resumed from an earlier step, or rolled back.

    Raises:
        UsageError: another text, or no run.
    """
    most, last = check_count(text), store.step_of(store.find(out_dir, "latest"))
    found = [folder for folder in store.folders(out_dir) if store.step_of(folder) <= last]
    return evenly(found, most), len(found)
