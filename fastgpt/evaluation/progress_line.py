"""Shows on stderr how far a measurement is: a bar on a terminal, a plain line every few seconds elsewhere."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from fastgpt.evaluation.sliding_window import Advance

PLAIN_INTERVAL = 5.0  # seconds


@contextmanager
def progress_line(title: str, total: int, noun: str) -> Iterator[Advance]:
    """A function that takes the number of things that were done since its last call, of `total` in all."""
    console = Console(stderr=True, markup=False, emoji=False)
    amount = TextColumn("{task.completed:,.0f} of {task.total:,.0f} " + noun, markup=False)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(20), amount, TimeRemainingColumn())
    progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    task, done, shown = progress.add_task(title, total=total), 0, time.monotonic()

    def advance(count: int) -> None:
        nonlocal done, shown
        done += count
        progress.update(task, completed=done)
        if not console.is_terminal and time.monotonic() - shown >= PLAIN_INTERVAL:
            shown = time.monotonic()
            console.print(f"{title}: {done:,} of {total:,} {noun}", highlight=False, soft_wrap=True)

    with progress:
        yield advance
