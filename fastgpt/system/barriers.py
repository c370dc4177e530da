"""Switches the OpenMP threads of this process between sleeping and spinning at barriers, while it computes.

    barriers = Barriers(threads=2)
    barriers.sleep()  # ... a busy machine
    barriers.spin()  # ... an idle one

Every parallel operation ends in a barrier. libgomp, the OpenMP of PyTorch's Linux builds, spins there for some
milliseconds before it sleeps. That is fast if each thread has a CPU of its own. If another program uses one of the
CPUs, the spinning threads keep the thread that they wait for from running. libgomp reads its spinning time from
GOMP_SPINCOUNT when it is loaded, and it cannot be set later. But while a process has more OpenMP threads than CPUs,
libgomp spins for only a hundred rounds (`do_spin` in its config/linux/wait.h, `gomp_throttled_spin_count_var` in its
env.c). A second team of idle threads has that effect. The number of computing threads stays the same, and so does every
bit of their results.
"""

import ctypes
import importlib
import os
import threading
from collections.abc import Sequence
from pathlib import Path

from fastgpt.system import cpus

SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")  # a user's settings, which are respected
BLOCKTIME = "KMP_BLOCKTIME"  # milliseconds that LLVM's and Intel's OpenMP spin
BUSY = 0.5  # CPUs that other programs use on a busy machine
BRIEFEST = 0.03  # seconds of measuring; Linux counts CPU time in hundredths


def choose(argv: Sequence[str]) -> None:
    """Let threads sleep at barriers from the start if the machine is busy, with an OpenMP that cannot switch later.

    That is LLVM's or Intel's, as on macOS, on Windows and from conda; libgomp ignores the variable. A command calls
    this before PyTorch is imported. The load is measured while NumPy is imported, which is needed anyway.
    """
    if {"--help", "-h"} & set(argv) or any(name in os.environ for name in (*SETTINGS, BLOCKTIME)):
        return
    before = cpus.Moment.now()
    importlib.import_module("numpy")
    now = cpus.Moment.now()
    if before and now:
        busy = now.clock - before.clock > BRIEFEST and now.taken_since(before) > BUSY
    else:
        busy = hasattr(os, "getloadavg") and os.getloadavg()[0] > cpus.usable() / 2
    if busy:
        os.environ[BLOCKTIME] = "0"


class Barriers:
    """The barriers of this process's OpenMP threads, which spin until `sleep` is called.

    Args:
        threads: the number of computing threads.
    """

    def __init__(self, threads: int):
        self.threads = threads
        self.team: threading.Thread | None = None
        self.over = threading.Event()

    def sleep(self) -> bool:
        """Let waiting threads sleep; False if the system has no room for the second team."""
        assert self.team is None
        libraries = [(library, max(2, library.omp_get_num_procs() - self.threads + 2)) for library in _libraries()]
        self.over = threading.Event()
        self.team = threading.Thread(target=_keep_team, args=(libraries, self.over), daemon=True)
        try:
            _try_threads(sum(threads for _, threads in libraries))  # else libgomp would end the process
            self.team.start()
        except RuntimeError:
            self.team = None
        return self.team is not None

    def spin(self) -> None:
        """Let waiting threads spin for a while before they sleep."""
        if self.team is not None:
            self.over.set()
            self.team.join()
            self.team = None


def can_sleep() -> bool:
    """Whether `Barriers` has any effect: it needs libgomp, and no variable of the user that sets the way of waiting."""
    return not any(name in os.environ for name in SETTINGS) and bool(_libraries())


def _libraries() -> list[ctypes.CDLL]:
    """The copies of libgomp that this process has loaded, without those whose file was replaced since."""
    try:
        lines = Path("/proc/self/maps").read_text(errors="replace").splitlines()
    except OSError:
        return []
    paths = {line.split(maxsplit=5)[5] for line in lines if "/libgomp" in line and not line.endswith(" (deleted)")}
    return [ctypes.CDLL(path) for path in sorted(paths)]


def _keep_team(libraries: Sequence[tuple[ctypes.CDLL, int]], over: threading.Event) -> None:
    """Keep teams of that many idle threads until `over`. libgomp ends them with the thread that runs this."""
    nothing = ctypes.CDLL(None).free  # each thread calls it with NULL, which does nothing
    for library, threads in libraries:
        library.GOMP_parallel(nothing, None, threads, 0)
    over.wait()


def _try_threads(count: int) -> None:
    """Raise RuntimeError if the system cannot start that many more threads."""
    over, started = threading.Event(), []
    try:
        for _ in range(count):
            thread = threading.Thread(target=over.wait, daemon=True)
            thread.start()
            started.append(thread)
    finally:
        over.set()
        for thread in started:
            thread.join()
