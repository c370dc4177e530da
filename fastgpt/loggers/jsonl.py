"""`metrics.jsonl`: what a run measured, one JSON object a line.

Each has `step` (optimizer steps done), `tokens` (seen so far), `seconds` (wall time since training began: compiling,
evaluations and saves are included, the time from a stop to its resume is not), and one of
- `loss`, `lr`, `grad_norm`, `ms` (a step), `tokens_per_second`, `mfu` (share of the chip's peak) and `memory` (peak
  bytes); with `log_stats`, every `log_interval` steps, also `stats`;
- `val_loss`;
- `val_set` (the evaluation set of the val losses from here on, which differs from the one before);
- `skipped` (why the step changed nothing) and `batch` (its place in the order of the data);
- `rolled_back_from` (the step), `skipped` (why) and `batches` (the first and the last that are left out from here on).
A number is null where it is not known (the speed of the first step, the peak of a CPU) or not finite.

`stats` has lists of L + 2 numbers each: of the embeddings (the output layer, which is tied to them, included), of the L
blocks, and of the final LayerNorm.
- `grad_norm`: the gradients' norm before clipping, without float16's loss scale.
- `weight_norm`: the weights' norm before the update.
- `update_ratio`: the norm of the step's update over `weight_norm`, weight decay included; 0 for a skipped step.
- `activation_rms`: of the residual stream after the embeddings (with their dropout) and after each block; null for the
  final LayerNorm.
- `dead_units`: the share of the MLP's hidden units whose size after the activation is below 1e-3 on every token of the
  step; null for layers that are no block.
With `compile`, the last two are of a part of the step: its first micro-batch, and at most a quarter of its sequences.
"""

import json
import math
import os
import sys
from pathlib import Path
from typing import BinaryIO

from fastgpt.checkpoint.progress import Progress
from fastgpt.loggers.base import Logger, Record, is_later
from fastgpt.system.files import regular

NAME = "metrics.jsonl"


class MetricsFile(Logger):
    """`metrics.jsonl` in a run's folder, to which whole lines are appended, by steps in order.

    Only its end is ever cut off: an incomplete line, and the records of steps that are done again.

    Raises:
        OSError: the path is no regular file; to open a pipe would block.
    """

    def __init__(self, out_dir: Path):
        self.path = regular(out_dir / NAME)
        self.name = str(self.path)
        self.file: BinaryIO | None = None
        self.end = 0  # bytes of whole lines

    def start(self, progress: Progress) -> None:
        if self.file is None:
            self.file = self.path.open("ab", buffering=0)
        self.end, line = 0, b"\n"
        with self.path.open("rb") as file:
            for line in file:
                record = _record(line)
                whole = record is not None or line.endswith(b"\n")
                if not whole or (record and is_later(record, progress)):
                    line = b"\n"
                    break
                self.end += len(line)
                if record and isinstance(known := record.get("seconds"), int | float):
                    self.seconds = known
        self.file.truncate(self.end)
        if not line.endswith(b"\n"):  # a crash cut it just before its end
            self.end += self.file.write(b"\n")

    def log(self, record: Record) -> None:
        """Append a record, with null for a number that JSON lacks; if the disk refuses it, no part of it is kept."""
        assert self.file is not None, "start opens it"
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
        if self.file is not None:
            os.fsync(self.file.fileno())

    def finish(self, error: BaseException | None) -> str | None:
        if self.file is not None:
            self.file.close()
        return None


def read_metrics(path: Path) -> list[Record]:
    """The records of a `metrics.jsonl`, without lines that are damaged or cut short by a crash."""
    return scan(path)[0] if path.exists() else []


def scan(path: Path) -> tuple[list[Record], int]:
    """The records of a `metrics.jsonl`, and the number of its lines that are damaged.

    A line without an end, which is being written or was cut short by a crash, is not counted. Raises OSError.
    """
    records, damaged = [], 0
    with regular(path).open("rb") as file:
        for line in file:
            if record := _record(line):
                records.append(record)
            else:
                damaged += line.endswith(b"\n")
    return records, damaged


def _record(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None
