"""The protocol of what records a run: files, curves, the console, a callback.

A logger that every run has is added to `fastgpt.loggers.registry`; the training loop knows a list of loggers only.
"""

from typing import Any, Protocol

from fastgpt.checkpoint.progress import Progress

# What a run measured, as a line of metrics.jsonl; `fastgpt.loggers.jsonl` lists its keys.
Record = dict[str, Any]


class Logger(Protocol):
    """Records a run.

    An OSError of the first `start` refuses the run. Later ones are warnings: they make the run's exit code 1, and never
    end it.

    Attributes:
        name: how warnings and the run's conclusion call it.
        seconds: the wall time of the last record that the first `start` found, where a run goes on.
    """

    name: str
    seconds: float = 0.0

    def start(self, progress: Progress) -> None:
        """Record from here on: before the first step, and again after a return to an earlier one.

        Records of a later time than `progress`, which a resumed or returned run measures again, are to be dropped.
        """
        ...

    def log(self, record: Record) -> None:
        """Take one record; the same object goes to the other loggers and must not be changed."""
        ...

    def sync(self) -> None:
        """Force what was logged to the disk, before a checkpoint that counts on it; may be called by another thread."""
        return

    def finish(self, error: BaseException | None) -> str | None:
        """Let go of files and connections: no record comes any more.

        Args:
            error: what ended the run, or None if it ended well.

        Returns:
            What the run's conclusion says under the logger's name, such as the path of a picture.
        """
        ...


def is_later(record: Record, progress: Progress) -> bool:
    """Whether a record is of a later time than `progress`: a later step, or what has yet to come at the same step.

    The latter is an evaluation, its set, or a rollback.
    """
    left_out = record.get("batches")
    if isinstance(left_out, list) and left_out and isinstance(left_out[-1], int):
        return record["step"] > progress.step or left_out[-1] + 1 - record["step"] > progress.skipped_batches
    if "val_set" in record and record["val_set"] != progress.val_set:
        return record["step"] >= progress.step
    return record["step"] > (progress.evaluated_step if "val_loss" in record else progress.step)
