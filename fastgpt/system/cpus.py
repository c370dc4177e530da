"""Counts the CPUs that this process may use, and the CPU time of it and of other programs; imports no PyTorch."""

import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
PROCESS = Path("/proc/self")
STATISTICS = Path("/proc/stat")


def usable() -> int:
    """The CPUs that this process may keep busy: those of its affinity, limited by its cgroup's quota."""
    return max(1, int(min(allowed(), quota())))


def allowed() -> int:
    """The number of CPUs in this process's affinity."""
    return len(_affinity())


def quota(process: Path = PROCESS, cgroups: Path = CGROUPS) -> float:
    """The CPU time per second that this process's cgroup and those above it allow; infinity without a limit."""
    return min(_limits(process, cgroups), default=float("inf"))


def waited(process: Path = PROCESS) -> float | None:
    """Seconds in which this process's threads had work and no CPU, summed over its living threads.

    From Linux's /proc/self/task/*/schedstat (Documentation/scheduler/sched-stats.rst); None elsewhere.
    """
    nanoseconds, threads = 0, 0
    for file in process.glob("task/*/schedstat"):
        try:
            nanoseconds += int(file.read_bytes().split()[1])
            threads += 1
        except (OSError, ValueError, IndexError):  # the thread has ended
            continue
    return nanoseconds / 1e9 if threads else None


@dataclass(frozen=True)
class Moment:
    """Seconds so far: by the clock, of this process's CPU time, and of all processes' on the CPUs that it may use."""

    clock: float
    own: float
    all: float

    @classmethod
    def now(cls, statistics: Path = STATISTICS) -> "Moment | None":
        """From Linux's /proc/stat, which counts in hundredths of a second; None elsewhere."""
        ours, ticks = _affinity(), 0
        try:
            for line in statistics.read_text().splitlines():
                name, *counts = line.split()
                if name.startswith("cpu") and name[3:].isdigit() and int(name[3:]) in ours:
                    user, nice, system, _idle, _waiting, *interrupts = map(int, counts[:8])
                    # Interrupts include the time that the host of a virtual machine took.
                    ticks += user + nice + system + sum(interrupts)
            used = os.times()
            return cls(time.monotonic(), used.user + used.system, ticks / os.sysconf("SC_CLK_TCK"))
        except (OSError, ValueError):
            return None

    def taken_since(self, before: "Moment") -> float:
        """The average number of CPUs that other programs kept busy in between."""
        return max(0.0, (self.all - before.all) - (self.own - before.own)) / max(self.clock - before.clock, 1e-9)


def _affinity() -> set[int]:
    if sys.platform == "linux":
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _limits(process: Path, cgroups: Path) -> Iterator[float]:
    """Quotas of version 2 (cpu.max) and 1 (cpu.cfs_quota_us), in CPUs, from the process's own cgroup up to the root."""
    try:
        entries = [line.split(":", 2) for line in (process / "cgroup").read_text().splitlines()]
    except OSError:
        return
    for entry in entries:
        if len(entry) != 3 or not (entry[0] == "0" or "cpu" in entry[1].split(",")):
            continue
        # In a container the path may be the host's; the container's own cgroup lies at the root then.
        root = cgroups if entry[0] == "0" else cgroups / "cpu"
        folder = Path(entry[2].lstrip("/"))
        for place in (folder, *folder.parents):
            try:
                if entry[0] == "0":
                    allowed, period = (root / place / "cpu.max").read_text().split()
                else:
                    names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
                    allowed, period = ((root / place / name).read_text() for name in names)
                if int(allowed) > 0:
                    yield int(allowed) / int(period)
            except (OSError, ValueError):  # no such file, or "max"
                continue
