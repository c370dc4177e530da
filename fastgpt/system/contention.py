"""Reacts when other programs use the CPUs that this one needs: its threads wait differently, and its user gets advice.

`Watcher` measures the time in which the threads of this process had work and no CPU. While that is little, threads spin
at barriers, which is fastest. When it is much, they sleep there (`fastgpt.system.barriers`) as long as other programs
use CPUs that these threads need. On an idle machine sleeping costs some speed; on a busy one it keeps most of the
speed that is left. `Slowness` gives advice when steps have become far slower.
"""

import math
import threading
import time
from contextlib import AbstractContextManager, nullcontext

from fastgpt.system import cpus
from fastgpt.system.barriers import Barriers, can_sleep
from fastgpt.system.units import counted

LOOK = 0.1  # seconds of one measurement
CONTENDED = 0.3  # seconds of waiting in a second; measured: up to 0.2 on an idle machine, 0.4 and more on a busy one
SHORTEST, LONGEST = 1.0, 8.0  # seconds of sleeping at barriers before spinning is tried again
HELD = 0.5  # CPUs: while other programs use more of those that threads need, spinning is not tried

SLOW = 3.0  # times the best step
ROW, ROW_SECONDS = 5, 10.0  # slow steps in a row, and their seconds, that are worth advice


def watching(threads: int) -> "AbstractContextManager[Watcher | None]":
    """A `Watcher` for that many computing threads; None if it cannot measure, or threads have no barriers."""
    if threads > 1 and can_sleep() and cpus.waited() is not None:
        return Watcher(Barriers(threads))
    return nullcontext()


class Watcher:
    """Within its `with` block, chooses ten times a second whether threads sleep or spin at barriers."""

    def __init__(self, barriers: Barriers):
        self.barriers, self.over = barriers, threading.Event()
        self.asleep, self.since = 0.0, math.inf  # seconds of sleeping so far, and when the present sleep began
        self.thread = threading.Thread(target=self._watch, name="contention", daemon=True)

    def __enter__(self) -> "Watcher":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()

    @property
    def slept(self) -> float:
        """Seconds so far in which threads slept at barriers, instead of spinning."""
        return self.asleep + max(0.0, time.monotonic() - self.since)

    def _watch(self) -> None:
        """Spin until threads wait for CPUs, sleep for a while, and try again; later each time that spinning fails.

        While threads sleep, their waiting time says little, because it grows whenever one is woken. So the next try is
        put off as long as other programs use CPUs.
        """
        rest = 0.0
        while not self.over.is_set():
            looks = 0
            while not self.over.is_set() and self._share() < CONTENDED:
                looks += 1
            if self.over.is_set():
                return
            rest = SHORTEST if looks * LOOK >= rest else min(2 * rest, LONGEST)
            if not self.barriers.sleep():
                return
            self.since = time.monotonic()
            self.over.wait(rest - LOOK)
            while self._lacks_cpus():
                pass
            self.asleep, self.since = self.slept, math.inf
            self.barriers.spin()

    def _share(self) -> float:
        """Seconds in a second that threads wait for a CPU, measured over LOOK seconds."""
        before, began = cpus.waited(), time.monotonic()
        self.over.wait(LOOK)
        return _rate(before, began)

    def _lacks_cpus(self) -> bool:
        """Whether other programs use CPUs that the computing threads need, measured over LOOK seconds."""
        before = cpus.Moment.now()
        if self.over.wait(LOOK) or before is None or (now := cpus.Moment.now()) is None:
            return False
        return now.taken_since(before) > cpus.allowed() - self.barriers.threads + HELD


class Slowness:
    """Notices that the steps of a run have become far slower because other programs use the CPUs.

    Args:
        threads: the number of computing threads.
    """

    def __init__(self, threads: int):
        self.threads, self.best = threads, math.inf
        self.row, self.told = 0, False

    def advice(self, seconds: float) -> str | None:
        """Advice after a step of that many seconds, at most once in a run; else None."""
        if self.told:
            return None
        if seconds <= SLOW * self.best:
            self.best, self.row = min(self.best, seconds), 0
            return None
        if self.row == 0:
            self.before, self.moment, self.waited = time.monotonic(), cpus.Moment.now(), cpus.waited()
        self.row += 1
        if self.row <= ROW or time.monotonic() - self.before < ROW_SECONDS:
            return None
        self.row, now = 0, cpus.Moment.now()
        if now is None or self.moment is None or _rate(self.waited, self.before) < CONTENDED:
            return None  # it is slow for another reason
        self.told, usable, taken = True, cpus.usable(), now.taken_since(self.moment)
        fewer = max(1, round(usable - taken))
        fewer_threads = f", or this run, and resume it with `threads` {fewer}" if fewer < self.threads else ""
        return (
            f"steps take {seconds / self.best:.1f} times as long as the best: other programs hold {taken:.1f} of "
            f"{counted(usable, 'CPU')}; stop them{fewer_threads}"
        )


def _rate(before: float | None, began: float) -> float:
    """Seconds of waiting in a second since `began`, when their sum was `before`; 0 if a sum is unknown."""
    now = cpus.waited()
    if now is None or before is None:
        return 0.0
    return max(0.0, now - before) / max(time.monotonic() - began, 1e-9)
