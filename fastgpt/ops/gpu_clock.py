"""Times calls on a GPU by the GPU's own events, without the time that Python takes to launch them.

A kernel of microseconds takes Python tens of microseconds to launch. Training runs ahead of the GPU, and a CUDA graph
launches by itself, so there the GPU never waits for Python; a clock around eager calls would count little but Python.
"""

from collections.abc import Callable
from typing import Any

import torch

from fastgpt.system.torch_private import spin_gpu

# Clock cycles that the GPU spins before it begins: half a millisecond at first, at most some 70.
FEWEST_CYCLES, MOST_CYCLES = 1 << 20, 1 << 27


class GpuClock:
    """Times calls on the current GPU and stream.

    Before the first call the GPU is given a wait, in which Python launches all that is timed. If the wait was over too
    soon, everything is timed again behind one four times as long. A call that itself waits for the GPU can never be
    launched ahead, and is timed with its waiting.
    """

    def __init__(self) -> None:
        self.cycles = FEWEST_CYCLES

    def seconds(self, call: Callable[[], Any], repeats: int = 1) -> float:
        """The seconds of `repeats` calls, one after the other."""

        def calls() -> None:
            for _ in range(repeats):
                call()

        return self.laps(calls, 1)[0]

    def laps(self, call: Callable[[], Any], count: int, before: Callable[[], Any] = lambda: None) -> list[float]:
        """The seconds of each of `count` calls; `before` runs before each, and is not timed."""
        while True:
            laps = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
            torch.cuda.synchronize()
            spin_gpu(self.cycles)
            for began, ended in laps:
                before()
                began.record()
                call()
                ended.record()
            launched_ahead = not laps[0][0].query()
            laps[-1][1].synchronize()
            if launched_ahead or self.cycles >= MOST_CYCLES:
                return [began.elapsed_time(ended) * 1e-3 for began, ended in laps]
            self.cycles *= 4
