"""What a run says about itself: `metrics.jsonl`, the progress display, and the curves.

A line of `metrics.jsonl` is a JSON object with `step` (optimizer steps done) and `tokens` (seen so far), and either
`loss`, `lr`, `grad_norm`, `ms` (a step), `tokens_per_second`, `mfu` (share of the chip's peak) and `memory` (peak
bytes), or `val_loss`. Null is what is not known: the speed of the first step, the peak of a CPU.
"""

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fastgpt.config import ModelConfig
from fastgpt.device import synchronize
from fastgpt.files import write_atomic

BAR_WIDTH = 16
Record = dict[str, Any]


class MetricsFile:
    """`metrics.jsonl`, to which whole lines are appended. Opening it forgets what lies beyond `step`."""

    def __init__(self, path: Path, step: int):
        kept = [record for record in read_metrics(path) if record["step"] <= step]
        write_atomic(path, "".join(json.dumps(record) + "\n" for record in kept))
        self.file = path.open("a", encoding="utf-8")

    def __enter__(self) -> "MetricsFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, record: Record) -> None:
        """Append a record, with null for a number that JSON has not (the norm of a step that float16 skipped)."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self.file.write(json.dumps(finite) + "\n")
        self.file.flush()


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
    """Progress on stderr: one live line on a terminal, plain lines elsewhere. Samples go to stdout."""

    def __init__(self, console: Console, total: int):
        self.console, self.total = console, total
        self.live = Live(console=console, redirect_stdout=False, redirect_stderr=False) if console.is_terminal else None

    def __enter__(self) -> "Display":
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()

    def show(self, record: Record, val_loss: float | None) -> None:
        """A training record beside the latest val loss, what matters most first: a narrow terminal cuts the end."""
        step, speed = record["step"], record["tokens_per_second"]
        parts = [f"step {step}/{self.total}", f"loss {record['loss']:.4f}"]
        parts.append("val -" if val_loss is None else f"val {val_loss:.4f}")
        if speed is not None:  # the first step is not timed
            parts.append(f"{format_seconds((self.total - step) * record['ms'] / 1e3)} left")
            parts += [f"{speed:,.0f} tokens/s", f"{record['ms']:.1f} ms"]
        parts += [f"lr {record['lr']:.2e}", f"norm {record['grad_norm']:.2f}"]
        if record["mfu"] is not None:
            parts.append(f"MFU {record['mfu']:.1%}")
        parts.append(format_bytes(record["memory"]))
        if self.live:
            line = Table.grid(padding=(0, 1))
            line.add_column(width=BAR_WIDTH)
            line.add_column(no_wrap=True, overflow="ellipsis")
            line.add_row(ProgressBar(self.total, step, width=BAR_WIDTH), Text("  ".join(parts)))
            self.live.update(line)
        else:
            self.say("  ".join(parts))

    def say(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def product(self, text: str) -> None:
        """Text for stdout, with the live line out of the way."""
        if self.live:
            self.live.stop()
        print_product(text)
        if self.live:
            self.live.start()


def print_product(text: str) -> None:
    """Print to stdout, for as long as somebody reads it."""
    print(text, file=Lasting(sys.stdout), flush=True)


class Lasting:
    """A standard stream that leads nowhere once its pipe or terminal is closed: a run outlives whoever watches it."""

    def __init__(self, stream: Any):
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> None:
        try:
            self.stream.write(text)
        except OSError:
            self._lead_nowhere()

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError:
            self._lead_nowhere()

    def _lead_nowhere(self) -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


class Stopwatch:
    """Seconds spent in steps: `with watch: step()`. The first, which compiles and allocates, is not counted."""

    def __init__(self, device: torch.device):
        self.device, self.first = device, True
        self.seconds, self.steps = 0.0, 0
        self.lap_seconds, self.lap_steps = 0.0, 0

    def __enter__(self) -> None:
        self.began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        if self.first:
            synchronize(self.device)  # or the second step would wait for it
            self.first = False
            return
        self.lap_seconds += time.perf_counter() - self.began
        self.lap_steps += 1

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


def format_bytes(count: int | None) -> str:
    if count is None:
        return "memory unknown"
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def format_seconds(seconds: float) -> str:
    """h:mm:ss, or m:ss under an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
