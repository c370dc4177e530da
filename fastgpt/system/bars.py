"""Shows on stderr how far long work has come: a bar on a terminal, else a plain line every few seconds."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress

SECONDS = 5.0  # between two lines
MB = "MB"  # the unit of what is counted in bytes
Made = TypeVar("Made")
Advance = Callable[[int], None]  # is called with the number of things that were done since the last call


class Bars:
    """A bar for each piece of work."""

    def __init__(self, progress: "Progress", quiet: bool):
        self._progress, self._quiet = progress, quiet
        self._next_line = time.monotonic() + SECONDS

    def say(self, line: str) -> None:
        """Show a line, unless all is quiet."""
        if not self._quiet:
            print(line, file=sys.stderr)

    def start(self, title: str, total: int, unit: str) -> Advance:
        """A new bar. The unit is a plural such as "tokens", or `MB` where `total` is in bytes."""
        done, scale = 0, 1e6 if unit == MB else 1

        def amount() -> str:
            return f"{done / scale:,.0f} of {total / scale:,.0f} {unit}"

        bar = self._progress.add_task(title, total=total, amount=amount())

        def advance(count: int) -> None:
            nonlocal done
            done += count
            self._progress.update(bar, completed=done, amount=amount())
            if self._progress.disable and time.monotonic() >= self._next_line:
                self.say(f"{title}: {amount()}")
                self._next_line = time.monotonic() + SECONDS

        return advance

    def track(self, title: str, results: Iterable[Made], sizes: Sequence[int]) -> Iterator[Made]:
        """The results as they come; `sizes` has the bytes that each stands for."""
        advance = self.start(title, sum(sizes), MB)
        for result, size in zip(results, sizes, strict=True):
            advance(size)
            yield result


@contextmanager
def bars(quiet: bool = False, *, transient: bool = False) -> Iterator[Bars]:
    """Bars until the end of the block, which stay there unless `transient`; `quiet` shows nothing."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True, emoji=False)
    title, amount = (TextColumn(text, markup=False) for text in ("{task.description}", "{task.fields[amount]}"))
    columns = title, BarColumn(20), amount, TimeRemainingColumn()
    disable = quiet or not console.is_terminal
    with Progress(*columns, console=console, transient=transient, disable=disable) as progress:
        yield Bars(progress, quiet)


@contextmanager
def bar(title: str, total: int, unit: str, *, quiet: bool = False) -> Iterator[Advance]:
    """One bar, which is gone after the block; see `Bars.start`."""
    with bars(quiet, transient=True) as shown:
        yield shown.start(title, total, unit)
