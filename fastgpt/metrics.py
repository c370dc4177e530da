"""What a run measures: `metrics.jsonl`, and the time of its steps.

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
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fastgpt.config import ModelConfig
from fastgpt.device import synchronize
from fastgpt.progress import Progress

Record = dict[str, Any]


class MetricsFile:
    """`metrics.jsonl`, to which whole lines are appended, by steps in order.

    The only thing that is ever taken back is the end: half a line, and the records of what is done again.

    Args:
        progress: of the run, which is to have no record of what comes later.

    Raises:
        OSError: the file cannot be read, written or made.
    """

    def __init__(self, path: Path, progress: Progress):
        self.path, self.file = path, path.open("ab", buffering=0)
        self.take_back(progress)

    def __enter__(self) -> "MetricsFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def take_back(self, progress: Progress) -> None:
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

    def write(self, record: Record) -> None:
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


class Stopwatch:
    """Seconds spent in steps: `with watch: step()`. The first, which compiles and allocates, is not counted."""

    def __init__(self, device: torch.device):
        self.device, self.first, self.dropped = device, True, False
        self.last: float | None = None  # seconds of the last step, if it was counted
        self.seconds, self.steps = 0.0, 0
        self.lap_seconds, self.lap_steps = 0.0, 0
        self.began = 0.0

    def __enter__(self) -> None:
        self.began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        if self.dropped:
            self.dropped = False
            return
        if self.first:
            synchronize(self.device)  # or the second step would wait for it
            self.first = False
            return
        self.last = time.perf_counter() - self.began
        self.lap_seconds += self.last
        self.lap_steps += 1

    def drop(self) -> None:
        """Do not count the step that is under way."""
        self.dropped = True

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count the time of the block."""
        began = time.perf_counter()
        yield
        self.began += time.perf_counter() - began

    def lap(self) -> float | None:
        """Seconds a step since the last lap, or None where none was counted; call it when the device is idle."""
        average = self.lap_seconds / self.lap_steps if self.lap_steps else None
        self.seconds, self.steps = self.seconds + self.lap_seconds, self.steps + self.lap_steps
        self.lap_seconds, self.lap_steps = 0.0, 0
        return average


def flops_per_token(config: ModelConfig, parameters: int) -> float:
    """Operations that training needs for a token: 6 N + 6 L C T, causal attention counted at half.

    N leaves the position embedding out, which is only looked up (Chowdhery et al., 2022, appendix B).
    """
    used = parameters - (config.block_size * config.n_embd if config.position == "learned" else 0)
    return 6 * used + 6 * config.n_layer * config.n_embd * config.block_size
