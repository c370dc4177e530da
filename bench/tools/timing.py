"""Times calls: on the CPU by the clock, on a GPU by its events or by the clock; over buffers that go round."""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastgpt.ops.ceilings import cache_bytes
from fastgpt.ops.gpu_clock import GpuClock
from fastgpt.system.device import synchronize

REST = 0.003  # seconds after which the threads of the call before no longer wait actively
CPU_CACHE = 64 << 20  # a CPU's last level may be shared and huge; the part of it that is fast is smaller
MOST_BUFFERS = 64


class Clock:
    """Times one call at a time on a device, and is pytest-benchmark's timer, so that both speak of the same seconds."""

    def __init__(self, device: torch.device):
        self.device = device
        self.elapsed = 0.0
        self.gpu = GpuClock()

    def read(self) -> float:
        """Seconds of the calls that were counted so far."""
        return self.elapsed

    def count(self, seconds: float) -> None:
        """Let pytest-benchmark see these seconds."""
        self.elapsed += seconds

    def wall(self, call: Callable[[], Any]) -> float:
        """Seconds from the call until the device has done it, with what Python needs to launch it."""
        synchronize(self.device)
        began = time.perf_counter()
        call()
        synchronize(self.device)
        return time.perf_counter() - began

    def kernels(self, call: Callable[[], Any]) -> float:
        """Seconds that the call occupies a GPU, without the launching; on a CPU `wall`, on threads that are awake."""
        if self.device.type != "cuda":
            time.sleep(REST)
            call()
            return self.wall(call)
        return self.gpu.seconds(call)


def call_memory(call: Callable[[], Any], device: torch.device) -> tuple[int, int]:
    """The most bytes allocated on a GPU during a call, and how many of them were not so before it."""
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    return peak, peak - before


def buffers_needed(bytes_each: int, device: torch.device) -> int:
    """How many buffers of this size go round so that the caches do not hold what a call reads."""
    cache = 2 * cache_bytes(device) if device.type == "cuda" else CPU_CACHE
    return min(MOST_BUFFERS, max(2, math.ceil(cache / max(1, bytes_each))))


def rotating(calls: Sequence[Callable[[], Any]], start: int = 0) -> Callable[[], Any]:
    """One call that makes each of the calls in turn, from `start` on: the same work, each on buffers of its own."""
    turn = itertools.cycle([*calls[start:], *calls[:start]])
    return lambda: next(turn)()


def spread(seconds: list[float]) -> float:
    """The interquartile range; 0 for a single value."""
    if len(seconds) < 2:
        return 0.0
    first, _, third = statistics.quantiles(seconds, n=4)
    return third - first
