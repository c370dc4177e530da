"""Measures the time of a run's steps, and counts the floating-point operations of a token."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fastgpt.config.model import ModelConfig
from fastgpt.system.device import synchronize


class Stopwatch:
    """Measures seconds in steps: `with watch: step()`. The first step compiles and allocates, and is not counted."""

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
            synchronize(self.device)  # or its work on the device would be counted as the second step's
            self.first = False
            return
        self.last = time.perf_counter() - self.began
        self.lap_seconds += self.last
        self.lap_steps += 1

    def drop(self) -> None:
        """Do not count the present step."""
        self.dropped = True

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count the time of the block."""
        began = time.perf_counter()
        yield
        self.began += time.perf_counter() - began

    def lap(self) -> float | None:
        """Mean seconds of a step since the last lap, None if none was counted; call it when the device is idle."""
        average = self.lap_seconds / self.lap_steps if self.lap_steps else None
        self.seconds, self.steps = self.seconds + self.lap_seconds, self.steps + self.lap_steps
        self.lap_seconds, self.lap_steps = 0.0, 0
        return average


def flops_per_token(config: ModelConfig, parameters: int) -> float:
    """Floating-point operations that training needs for a token: 6 N + 6 L H D T, causal attention counted at half.

    N excludes embeddings that are only looked up (Chowdhery et al., 2022, appendix B).
    """
    rows = (config.block_size if config.position == "learned" else 0) + (0 if config.tie else config.known_vocab)
    used = parameters - rows * config.n_embd
    return 6 * used + 6 * config.n_layer * config.n_head * config.head_dim * config.block_size
