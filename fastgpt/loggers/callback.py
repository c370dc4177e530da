"""Hands a run's records to a function, while it runs."""

from collections.abc import Callable

from fastgpt.checkpoint.progress import Progress
from fastgpt.loggers.base import Logger, Record


class Callback(Logger):
    """Calls a function with a copy of each record. An OSError of it is a warning; other errors end the run."""

    name = "on_log"

    def __init__(self, call: Callable[[Record], object]):
        self.call = call

    def start(self, progress: Progress) -> None:
        """Nothing: what was handed over is not taken back; a record with `rolled_back_from` tells of a return."""

    def log(self, record: Record) -> None:
        self.call(dict(record))

    def finish(self, error: BaseException | None) -> str | None:
        return None
