"""What a run says about itself: `metrics.jsonl`, the progress display, and the curves.

A line of `metrics.jsonl` is a JSON object with `step` (optimizer steps done) and `tokens` (seen so far), and either
`loss`, `lr`, `grad_norm`, `ms` (a step), `tokens_per_second`, `mfu` (share of the chip's peak) and `memory` (peak
bytes), or `val_loss`. Null is what is not known: the speed of the first step, the peak of a CPU.
"""

import json
import math
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from fastgpt.config import ModelConfig

Record = dict[str, Any]


class MetricsFile:
    """`metrics.jsonl`, to which whole lines are appended. Opening it forgets what lies beyond `step`."""

    def __init__(self, path: Path, step: int):
        kept = [line for line in read_metrics(path) if line["step"] <= step]
        temporary = path.with_name(f".tmp-{path.name}")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        temporary.replace(path)
        self.file = path.open("a", encoding="utf-8")

    def write(self, record: Record) -> None:
        """Append a record, with null for a number that JSON has not (the norm of a step that float16 skipped)."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self.file.write(json.dumps(finite) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def read_metrics(path: Path) -> list[Record]:
    """The records of a `metrics.jsonl`; a last line cut short by a crash is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


class Display:
    """Progress on stderr: one live line on a terminal, plain lines elsewhere."""

    def __init__(self, console: Console, step: int, total: int):
        self.console, self.total = console, total
        self.val_loss: float | None = None
        self.live = None
        if console.is_terminal:
            columns = BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[status]}")
            self.live = Progress(*columns, console=console, redirect_stdout=False, redirect_stderr=False)
            self.task = self.live.add_task("", total=total, completed=step, status="starting")

    def __enter__(self) -> "Display":
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()

    def show(self, record: Record) -> None:
        """A training record, with the time left at its speed."""
        parts = [
            f"loss {record['loss']:.4f}",
            f"val {self.val_loss:.4f}" if self.val_loss is not None else "val -",
            f"lr {record['lr']:.2e}",
            f"norm {record['grad_norm']:.2f}",
        ]
        if record["ms"] is not None:  # the first step is not timed
            parts += [f"{record['ms']:.1f} ms", f"{record['tokens_per_second']:,.0f} tokens/s"]
        if record["mfu"] is not None:
            parts.append(f"MFU {record['mfu']:.1%}")
        parts.append(format_bytes(record["memory"]))
        if record["ms"] is not None:
            parts.append(f"{format_seconds((self.total - record['step']) * record['ms'] / 1e3)} left")
        if self.live:
            self.live.update(self.task, completed=record["step"], status="  ".join(parts))
        else:
            self.say("  ".join([f"step {record['step']}/{self.total}", *parts]))

    def say(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def product(self, text: str) -> None:
        """Text for stdout, with the live line out of the way."""
        if self.live:
            self.live.stop()
        print(text, flush=True)
        if self.live:
            self.live.start()


class Stopwatch:
    """Seconds spent in steps: stopped while the run evaluates, saves, samples or compiles."""

    def __init__(self):
        self.total, self.steps = 0.0, 0
        self.lap_began: float | None = None
        self.lap_seconds, self.lap_steps = 0.0, 0

    def start(self) -> None:
        self.lap_began = time.perf_counter()

    def stop(self, steps: int) -> None:
        """Count the time since `start` for that many steps."""
        if self.lap_began is not None:
            seconds = time.perf_counter() - self.lap_began
            self.total, self.steps = self.total + seconds, self.steps + steps
            self.lap_seconds, self.lap_steps = self.lap_seconds + seconds, self.lap_steps + steps
        self.lap_began = None

    def lap(self) -> float | None:
        """Seconds a step since the last lap, or None where none was timed."""
        average = self.lap_seconds / self.lap_steps if self.lap_steps else None
        self.lap_seconds, self.lap_steps = 0.0, 0
        return average


def flops_per_token(config: ModelConfig, parameters: int) -> float:
    """Operations that training needs for a token: 6 N + 6 L C T, causal attention counted at half.

    N leaves the position embedding out, which is only looked up (Chowdhery et al., 2022, appendix B).
    """
    used = parameters - (config.block_size * config.n_embd if config.position == "learned" else 0)
    return 6 * used + 6 * config.n_layer * config.n_embd * config.block_size


def format_bytes(count: int | None) -> str:
    if count is None:
        return "memory unknown"
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def format_seconds(seconds: float) -> str:
    """h:mm:ss, or m:ss under an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
