"""Measures what training takes without a run: the time of micro-batches and of an update, and the memory they need.

Tokens are drawn at random, since neither time nor memory depends on them.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from fastgpt.config.training import TrainConfig
from fastgpt.data.loader import Batch
from fastgpt.system import contention
from fastgpt.system.device import autocast, peak_memory, synchronize
from fastgpt.training.footprint import StepFootprint, estimate
from fastgpt.training.step import TrainStep

Result = TypeVar("Result")

LONG = 5.0  # seconds: a micro-batch that would take longer is measured with fewer sequences
TO_FORWARD = 3.0  # times the forward pass: that and the backward pass, which multiplies twice as many matrices


@dataclass(frozen=True)
class Measurement:
    """Seconds of whole micro-batches, and bytes.

    Attributes:
        sequences: of a measured micro-batch; with fewer than `batch_size`, `micro` was multiplied.
        first: seconds of the first one as it was measured, in which kernels are loaded or compiled.
        micro: seconds of a micro-batch after the first.
        update: seconds of clipping and the optimizer.
        memory: estimated, without `compile`; the vocabulary's padding and the table of positions are weights.
        peak: the most bytes that were allocated on a GPU; None elsewhere.
    """

    sequences: int
    first: float
    micro: float
    update: float
    memory: StepFootprint
    peak: int | None

    def step_seconds(self, micro_batches: int) -> float:
        return micro_batches * self.micro + self.update


class Stand:
    """A model and its training step, and batches for them.

    Args:
        say: shows a line before a measurement that takes a while.
        threads: CPU threads that compute.
    """

    def __init__(self, step: TrainStep, say: Callable[[str], None], threads: int):
        self.step, self.config, self.say, self.threads = step, step.config, say, threads
        self.device = step.device

    def measure(self) -> Measurement:
        """Run three micro-batches and one optimizer step; the first micro-batch is the warm-up."""
        with contention.watching(self.threads if self.device.type == "cpu" else 1):
            memory = estimate(self.config, self.step.model.ops, self.device, self.step.dtype)
            _, forward = [self._timed(self._forward) for _ in range(2)][1]  # the first is the warm-up
            sequences = self._affordable(forward)
            self.say(
                f"measuring three micro-batches of {sequences} x {self.config.block_size:,} tokens and one optimizer "
                f"step, about {max(1, round(3 * TO_FORWARD * forward * sequences))} s"
            )
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.device)
            batches = [random_batch(self.config, sequences, self.device) for _ in range(3)]
            _, first = self._timed(lambda: self.step.accumulate(0, batches[:1]))
            loss, rest = self._timed(lambda: self.step.accumulate(0, batches[1:]))
            assert loss is not None  # nothing stops it
            _, update = self._timed(lambda: self.step.update(0, loss))
        return Measurement(
            sequences=sequences,
            first=first,
            micro=rest / 2 * self.config.batch_size / sequences,
            update=update,
            memory=memory,
            peak=peak_memory(self.device) if self.device.type == "cuda" else None,
        )

    def _forward(self) -> None:
        """The forward pass of one sequence."""
        x, y = random_batch(self.config, 1, self.device)
        with autocast(self.device, self.step.dtype):
            self.step.model(x, y)

    def _affordable(self, forward: float) -> int:
        """Sequences of a micro-batch that takes about `LONG` seconds, at least one and at most `batch_size`."""
        return max(1, min(self.config.batch_size, int(LONG / (TO_FORWARD * forward))))

    def _timed(self, work: Callable[[], Result]) -> tuple[Result, float]:
        synchronize(self.device)
        began = time.perf_counter()
        result = work()
        synchronize(self.device)
        return result, time.perf_counter() - began


def random_batch(config: TrainConfig, sequences: int, device: torch.device) -> Batch:
    """Inputs and targets, each int64 (sequences, block_size)."""
    shape = 2, sequences, config.block_size
    x, y = torch.randint(config.known_vocab, shape, generator=torch.Generator().manual_seed(config.seed)).to(device)
    return x, y
