"""Shows the progress of a run on stderr: as one live line on a terminal or in a notebook, as plain lines elsewhere.

The live line appears with the first micro-batch. If it is too long it drops whole fields, the least important first.
"""

import builtins
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import IO, cast

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fastgpt.checkpoint.progress import Progress
from fastgpt.loggers.base import Logger, Record
from fastgpt.system.streams import Lasting
from fastgpt.system.units import format_bytes, format_seconds

BAR_WIDTH, BAR_RANK = 10, 6
GAP = 2  # columns between two fields
LOSS_RANK = 1
LONG = 10.0  # seconds of a step from which its micro-batches are reported
SLOW = 1.0  # seconds of a step or an evaluation after which the live line counts its batches
KERNEL = "ZMQInteractiveShell"  # the class of IPython's shell in notebooks, from which others derive theirs
NOTEBOOK_WIDTH = 100  # columns
REFRESH = 0.2  # seconds between two drawings of a notebook's line
SILENCE = 60.0  # seconds after which a plain line reports micro-batches as well


def stderr() -> Console:
    """A console on stderr that stops nothing when stderr is closed."""
    return Console(file=cast(IO[str], Lasting(sys.stderr)), force_jupyter=False)  # or rich would write HTML


def in_notebook() -> bool:
    """Whether the output of this process is shown in a notebook. IPython's kernel makes its shell a built-in there."""
    get_ipython = getattr(builtins, "get_ipython", None)
    return get_ipython is not None and any(kind.__name__ == KERNEL for kind in type(get_ipython()).__mro__)


class NotebookLine:
    """A line at the end of a cell's output that is rewritten in its place, with the methods of rich's `Live`.

    Carriage returns, which notebooks follow, are the only control characters that it uses.

    Args:
        text: makes the present line.
    """

    def __init__(self, file: IO[str], text: Callable[[], str]):
        self.file, self.text = file, text
        self.is_started, self.drawn = False, ""
        self.refreshed = 0.0  # time of the last drawing

    def start(self) -> None:
        self.is_started = True
        self.refresh()

    def stop(self) -> None:
        """End the line, which stays."""
        if self.is_started:
            self.refresh()
            self._write("\n")
            self.is_started, self.drawn = False, ""

    def refresh(self) -> None:
        """Draw the line."""
        if self.is_started:
            text = self.text()
            self._write("\r" + text.ljust(len(self.drawn)))
            self.drawn, self.refreshed = text, time.monotonic()

    def refresh_soon(self) -> None:
        """Draw the line, unless that was done a moment ago."""
        if time.monotonic() - self.refreshed >= REFRESH:
            self.refresh()

    def clear(self) -> None:
        """Make room for another line; `refresh` draws this one below it."""
        if self.drawn:
            self._write("\r" + " " * len(self.drawn) + "\r")
            self.drawn = ""

    def _write(self, text: str) -> None:
        self.file.write(text)
        self.file.flush()


@dataclass(frozen=True)
class Field:
    """A part of the progress line. The highest rank is dropped first; rank 0 is never dropped."""

    text: str
    rank: int


def fitting(fields: Sequence[Field], width: int) -> list[Field]:
    """The fields that fit into a line of `width` columns."""
    kept = list(fields)
    while sum(len(field.text) + GAP for field in kept) - GAP > width and (last := max(f.rank for f in kept)):
        kept = [field for field in kept if field.rank != last]
    return kept


class Display(Logger):
    """Shows how far a run is. Samples go to stdout.

    Args:
        total: steps of the run.
        uniform: loss of a uniform guess, shown beside the first loss; None: not shown.
        settled: micro-batches after which the time of the next ones can be estimated; 2 if the first one compiles.
    """

    name = "console"

    def __init__(self, console: Console, total: int, uniform: float | None = None, settled: int = 1):
        self.console, self.total, self.uniform, self.settled = console, total, uniform, settled
        self.progress = Progress()
        self.record: Record | None = None  # the latest with a training loss
        self.val_loss: float | None = None  # when that was logged
        self.name, self.step, self.done, self.count = "", 0, 0, 1  # micro-batches of a step, batches of an evaluation
        self.began = self.spoke = time.monotonic()  # when that began, and when the last line was written
        self.first_step: int | None = None  # steps that were done before the first one of this process
        self.first = 0.0  # seconds of the first micro-batch
        self.estimate: float | None = None  # seconds of a step, told by the micro-batches of the first one
        self.notebook = NotebookLine(console.file, self._text) if in_notebook() else None
        self.live: Live | NotebookLine | None = self.notebook
        if self.live is None and console.is_terminal:
            self.live = Live(console=console, get_renderable=self._line, redirect_stdout=False, redirect_stderr=False)

    def start(self, progress: Progress) -> None:
        self.progress = progress
        if progress.step:  # the next loss is not that of a model which knows nothing
            self.uniform = None
        if self.live and not self.live.is_started:
            self.live.start()

    def log(self, record: Record) -> None:
        """Show a training record beside the latest val loss; evaluations and skipped steps have lines of their own."""
        if "loss" not in record:
            return
        self.record, self.val_loss, self.step, self.done = record, self.progress.val_loss, record["step"], 0
        if self.live is None:
            self.say("  ".join(field.text for field in self._fields()))
        elif self.uniform is not None:
            self.say("  ".join(field.text for field in self._fields() if field.rank <= LOSS_RANK))
        self.uniform = None
        if self.notebook:
            self.notebook.refresh()

    def finish(self, error: BaseException | None) -> str | None:
        if self.live:
            self.live.stop()
        return None

    def begin(self, name: str, step: int, count: int) -> None:
        """Begin `count` batches: the micro-batches ("micro") of the next step, or those of an evaluation.

        Args:
            step: steps that are done.
        """
        self.name, self.step, self.done, self.count = name, step, 0, count
        self.began = time.monotonic()
        if name == "micro" and self.first_step is None:
            self.first_step = step

    def reach(self, done: int) -> None:
        """Show that `done` of the batches are done."""
        self.done, now = done, time.monotonic()
        if self.name == "micro" and self.step == self.first_step:
            self._estimate(now - self.began)
        if self.notebook:  # rich's line has a thread for that
            self.notebook.refresh_soon()
        if self.live is None and now - self.spoke >= SILENCE and 0 < done < self.count:
            left = format_seconds((now - self.began) / done * (self.count - done))
            what = "step" if self.name == "micro" else self.name
            self.say(f"step {self.step}/{self.total}  {self.name} {done}/{self.count}  {left} left in this {what}")

    def say(self, text: str) -> None:
        """A line that stays."""
        self.spoke = time.monotonic()
        if self.notebook:
            self.notebook.clear()
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)
        if self.notebook:
            self.notebook.refresh()

    def product(self, text: str) -> None:
        """Text for stdout, above the live line."""
        if isinstance(self.live, Live):
            self.live.transient = True  # the line is taken away, and drawn again below
        if self.live:
            self.live.stop()
        print_product(text)
        if self.live:
            self.live.start()
        if isinstance(self.live, Live):
            self.live.transient = False  # the last one stays

    def _estimate(self, seconds: float) -> None:
        """Estimate the time of a step from its micro-batches so far; the first is slower, and is left out if it can."""
        if self.done == 1:
            self.first = seconds
        others = self.done - 1
        self.estimate = (seconds - self.first) / others * self.count if others else seconds * self.count
        if self.live is None and self.done == self.settled and self.estimate >= LONG:
            rest = format_seconds((self.total - self.step) * self.estimate)
            self.say(
                f"step {self.step + 1}: micro-batch {self.done} of {self.count} done after {format_seconds(seconds)}; "
                f"about {format_seconds(self.estimate)} a step, {rest} in all"
            )

    def _fields(self) -> list[Field]:
        """The parts of the progress line, in their order."""
        record = self.record
        fields = [Field(f"step {self.step}/{self.total}", 0)]
        if record:
            guess = "" if self.uniform is None else f" (ln V, a uniform guess, is {self.uniform:.2f})"
            fields.append(Field(f"loss {record['loss']:.4f}{guess}", LOSS_RANK))
        slow = (self.estimate or 0) >= LONG or time.monotonic() - self.began >= SLOW
        if self.live and self.done < self.count and slow:
            fields.append(Field(f"{self.name} {self.done}/{self.count}", 2))
        if record:
            fields.append(Field("val -" if self.val_loss is None else f"val {self.val_loss:.4f}", 4))
        speed = record["tokens_per_second"] if record else None
        seconds = record["ms"] / 1e3 if record and record["ms"] is not None else self.estimate
        if seconds is not None and (self.live or speed is not None):  # the first step is not timed
            fields.append(Field(f"{format_seconds((self.total - self.step) * seconds)} left", 3))
        if record and speed is not None:
            fields += [Field(f"{speed:,.0f} tokens/s", 5), Field(f"{record['ms']:.1f} ms", 7)]
        if record:
            fields += [Field(f"lr {record['lr']:.2e}", 9), Field(f"norm {record['grad_norm']:.2f}", 10)]
            if record["mfu"] is not None:
                fields.append(Field(f"MFU {record['mfu']:.1%}", 8))
            fields.append(Field(format_bytes(record["memory"]), 8))
        return fields

    def _text(self) -> str:
        """The live line of a notebook."""
        return "  ".join(field.text for field in fitting(self._fields(), NOTEBOOK_WIDTH))

    def _line(self) -> Table:
        """The live line, fitted to the terminal's present width."""
        width = self.console.width
        bar = Field(" " * BAR_WIDTH, BAR_RANK)
        fields = fitting([bar, *self._fields()], width)
        line = Table.grid(padding=(0, GAP))
        if bar in fields:
            line.add_column(width=BAR_WIDTH)
        line.add_column(no_wrap=True, overflow="ellipsis")
        text = Text("  ".join(field.text for field in fields if field is not bar))
        within = self.done / self.count if self.name == "micro" else 0.0
        progress = ProgressBar(self.total, min(self.total, self.step + within), width=BAR_WIDTH)
        line.add_row(*([progress, text] if bar in fields else [text]))
        return line


def print_product(text: str) -> None:
    """Print to stdout; once the output was closed, nothing is printed and nothing fails."""
    print(text, file=Lasting(sys.stdout), flush=True)
