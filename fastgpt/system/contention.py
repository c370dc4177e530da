"""Reacts to other programs that take the CPUs from this one: its threads wait differently, and its user is told.

`Watcher` looks at the time for which the threads of this process had work and no CPU. Little of it: threads spin at
barriers, which is fastest. Much: they sleep there (`fastgpt.system.barriers`), which costs some of the speed of an idle
machine and keeps most of what a busy one has to give, for as long as other programs use CPUs that this one's threads
need. `Slowness` gives advice where steps have become far slower.
"""

import math
import threading
import time
from contextlib import AbstractContextManager, nullcontext

from fastgpt.system import cpus
from fastgpt.system.barriers import Barriers, can_sleep
from fastgpt.system.units import counted

LOOK = 0.1  # seconds over which the waiting is measured
CONTENDED = 0.3  # seconds of waiting in a second; measured: up to 0.2 on an idle machine, 0.4 and more on a busy one
SHORTEST, LONGEST = 1.0, 8.0  # seconds for which threads sleep at barriers at least, before spinning is tried again
HELD = 0.5  # CPUs that threads need and other programs use: spinning is not tried

SLOW = 3.0  # times the best step
ROW, ROW_SECONDS = 5, 10.0  # what is slow for fewer steps or less time is not worth advice


def watching(threads: int) -> "AbstractContextManager[Watcher | None]":
    """A `Watcher` for so many computing threads, where the machine has what it needs and they have barriers at all."""
    if threads > 1 and can_sleep() and cpus.waited() is not None:
        return Watcher(Barriers(threads))
    return nullcontext()


class Watcher:
    """Between `with` and its end, chooses anew ten times a second how threads wait at barriers."""

    def __init__(self, barriers: Barriers):
        self.barriers, self.over = barriers, threading.Event()
        self.asleep, self.since = 0.0, math.inf  # seconds until the last time that threads spun, and since when not
        self.thread = threading.Thread(target=self._watch, name="contention", daemon=True)

    def __enter__(self) -> "Watcher":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()

    @property
    def slept(self) -> float:
        """Seconds so far in which threads slept at barriers."""
        return self.asleep + max(0.0, time.monotonic() - self.since)

    def _watch(self) -> None:
        """Spin until threads wait for CPUs, then sleep for a while and try again, each time later if that is no use.

        While threads sleep, their waiting says little: it grows by each time that one is woken. What other programs
        use says enough to put the next try off.
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
        """Seconds that threads wait for a CPU in a second, measured over LOOK seconds."""
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
    """Notices that the steps of a run take far longer than its best ones because other programs hold the CPUs.

    Args:
        threads: how many compute.
    """

    def __init__(self, threads: int):
        self.threads, self.best = threads, math.inf
        self.row, self.told = 0, False

    def advice(self, seconds: float) -> str | None:
        """What to do, once in a run, after a step of so many seconds; None where there is nothing to say."""
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
    """Seconds of waiting in a second since `began`, when it was `before`; 0 where that is not known."""
    now = cpus.waited()
    if now is None or before is None:
        return 0.0
    return max(0.0, now - before) / max(time.monotonic() - began, 1e-9)
