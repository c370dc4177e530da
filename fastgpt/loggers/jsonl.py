"""`metrics.jsonl`: what a run measured, a line each.

A line of `metrics.jsonl` is a JSON object with `step` (optimizer steps done) and `tokens` (seen so far), and one of
- `loss`, `lr`, `grad_norm`, `ms` (a step), `tokens_per_second`, `mfu` (share of the chip's peak) and `memory` (peak
  bytes);
- `val_loss`;
- `val_set` (the evaluation set of the val losses from here on, which is another one than before);
- `skipped` (why the step changed nothing) and `batch` (its place in the order of the data);
- `rolled_back_from` (the step), `skipped` (why) and `batches` (the first and the last that are left out from here on).
Null is what is not known: the speed of the first step, the peak of a CPU; or not finite.
"""

import json
import math
import os
import sys
from pathlib import Path

from fastgpt.checkpoint.progress import Progress
from fastgpt.loggers.logger import Record


class MetricsFile:
    """A `Logger` that appends whole lines to `metrics.jsonl`, by steps in order.

    Only the end is ever cut off: half a line, and the records of steps that are done again.

    Args:
        progress: of the run, which is to have no record of what comes later.

    Raises:
        OSError: the file cannot be read, written or made.
    """

    def __init__(self, path: Path, progress: Progress):
        self.path, self.file = path, path.open("ab", buffering=0)
        self.start(progress)

    def __enter__(self) -> "MetricsFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.finish()

    def __str__(self) -> str:
        return str(self.path)

    def finish(self) -> None:
        self.file.close()

    def start(self, progress: Progress) -> None:
        """Cut off all from the first record of a later time than `progress`, and a line that a crash cut short."""
        self.end, line = 0, b"\n"
        with self.path.open("rb") as file:
            for line in file:
                record = _record(line)
                whole = record is not None or line.endswith(b"\n")
                if not whole or (record and _is_later(record, progress)):
                    line = b"\n"
                    break
                self.end += len(line)
        self.file.truncate(self.end)
        if not line.endswith(b"\n"):  # cut just before its end
            self.end += self.file.write(b"\n")

    def log(self, record: Record) -> None:
        """Append a record, with null for a number that JSON has not (the loss of a step that was skipped).

        Raises:
            OSError: the disk does not take it; nothing of it stays.
        """
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        line = rest = json.dumps(finite).encode() + b"\n"
        try:
            sys.audit("fastgpt.write", str(self.path), len(line))
            while rest:
                rest = rest[self.file.write(rest) :]
        except OSError:
            self.file.truncate(self.end)
            raise
        self.end += len(line)

    def sync(self) -> None:
        """Force the records to the disk."""
        os.fsync(self.file.fileno())


def read_metrics(path: Path) -> list[Record]:
    """The records of a `metrics.jsonl`; lines that are damaged, or cut short by a crash, are left out."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        return [record for line in file if (record := _record(line))]


def _is_later(record: Record, progress: Progress) -> bool:
    """Whether it is of a later step, or of what has yet to come at that step: an evaluation, its set, a return."""
    left_out = record.get("batches")
    if isinstance(left_out, list) and left_out and isinstance(left_out[-1], int):
        return record["step"] > progress.step or left_out[-1] + 1 - record["step"] > progress.skipped_batches
    if "val_set" in record and record["val_set"] != progress.val_set:
        return record["step"] >= progress.step
    return record["step"] > (progress.evaluated_step if "val_loss" in record else progress.step)


def _record(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None
