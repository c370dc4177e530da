"""Passes what a run has to say to its loggers and its display, and counts what the disk did not take."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from fastgpt.checkpoint.progress import Progress
from fastgpt.loggers.base import Logger, Record
from fastgpt.loggers.console import Display


class RunLog:
    """The loggers of a run, from `with` to its end, which finishes them.

    Args:
        display: shows the progress and the messages; it is a logger as well.
        loggers: the others, which are asked in this order, and before the display.

    Attributes:
        failures: checkpoints, records and pictures that were not written.
        conclusion: what the loggers say at the end, by their names.
    """

    def __init__(self, display: Display, loggers: Sequence[Logger]):
        self.display, self.loggers = display, (*loggers, display)
        self.failures = 0
        self.began = time.monotonic()  # when training would have, had it never stopped
        self.conclusion: dict[str, str] = {}

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        for logger in reversed(self.loggers):
            with self._warning(f"{logger.name} was not written"):
                if said := logger.finish(error):
                    self.conclusion[logger.name] = said

    def start(self, progress: Progress) -> None:
        """Record from here on; the display is started when training begins. Raises OSError if a file is refused."""
        for logger in self.loggers[:-1]:
            logger.start(progress)
        self.began = time.monotonic() - max(logger.seconds for logger in self.loggers)

    def go_back(self, progress: Progress) -> None:
        """Record from an earlier step on."""
        for logger in self.loggers:
            with self._warning(f"{logger.name} keeps the steps that are done again"):
                logger.start(progress)

    def log(self, record: Record) -> None:
        """Record something, with the wall time since training began."""
        record = {**record, "seconds": round(time.monotonic() - self.began, 3)}
        for logger in self.loggers:
            with self._warning(f"{logger.name} misses a line of step {record['step']}"):
                logger.log(record)

    def sync(self) -> None:
        """Force all records to the disk. Raises OSError."""
        for logger in self.loggers:
            logger.sync()

    def say(self, text: str) -> None:
        """Show a line."""
        self.display.say(text)

    def warn(self, text: str) -> None:
        """Show that something was not written, and count it; the run goes on."""
        self.failures += 1
        self.say(f"warning: {text}")

    @contextmanager
    def _warning(self, what: str) -> Iterator[None]:
        """Turn an OSError into a warning."""
        try:
            yield
        except OSError as error:
            self.warn(f"{what}: {error}")
