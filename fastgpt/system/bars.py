"""Shows on stderr how far long work has come: bars on a terminal, else a line now and then."""

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress

SECONDS = 10.0  # between two lines
Made = TypeVar("Made")


class Bars:
    """A bar for each piece of work that is tracked."""

    def __init__(self, progress: "Progress", quiet: bool):
        self._progress, self._quiet = progress, quiet
        self._next_line = time.monotonic() + SECONDS

    def say(self, line: str) -> None:
        """Show a line, unless all is quiet."""
        if not self._quiet:
            print(line, file=sys.stderr)

    def track(self, name: str, results: Iterable[Made], sizes: Sequence[int]) -> Iterator[Made]:
        """The results as they come; `sizes` has the bytes that each stands for."""
        done, total = 0, sum(sizes)
        bar = self._progress.add_task(name, total=total)
        for result, size in zip(results, sizes, strict=True):
            done += size
            self._progress.advance(bar, size)
            if self._progress.disable and time.monotonic() >= self._next_line:
                self.say(f"{name}: {done / 1e6:,.0f} of {total / 1e6:,.0f} MB")
                self._next_line = time.monotonic() + SECONDS
            yield result


@contextmanager
def bars(quiet: bool) -> Iterator[Bars]:
    """Bars until the end of the block; `quiet` shows nothing."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    disable = quiet or not console.is_terminal
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=disable) as progress:
        yield Bars(progress, quiet)
