"""The interface of a logger."""

from typing import Any, Protocol

from fastgpt.checkpoint.progress import Progress

Record = dict[str, Any]


class Logger(Protocol):
    """Takes the records of a run; see `fastgpt.loggers.jsonl` for what they hold."""

    def start(self, progress: Progress) -> None:
        """The run goes on from this progress; what was logged of later steps no longer counts.

        Called before the first record, and again after each rollback. `progress` is live: the run updates it.
        """

    def log(self, record: Record) -> None:
        """Take a record. An OSError does not stop the run, which warns of it."""

    def finish(self) -> None:
        """The run has ended, however it did."""
