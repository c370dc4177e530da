"""The CPU threads that PyTorch computes with: how many, and what a run remembers of that."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fastgpt.system import cpus

SETTINGS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # a user's own, which count


def use(asked: int | None, recorded: int | None = None) -> int:
    """Compute with as many threads as `threads` says from now on, in this whole process; returns the number.

    Auto, None, is the number that a resumed run had before, if there are as many CPUs, else PyTorch's own (a thread
    for each core), or as many as there are CPUs in this process's affinity and its cgroup's quota, if these are fewer.
    OMP_NUM_THREADS and MKL_NUM_THREADS come before both.

    Args:
        recorded: of the run that is resumed.
    """
    count = asked or _automatic(recorded)
    if count != torch.get_num_threads():
        torch.set_num_threads(count)
    return count


def _automatic(recorded: int | None) -> int:
    own = torch.get_num_threads()
    if any(name in os.environ for name in SETTINGS):
        return own
    most = cpus.usable()
    return recorded if recorded and recorded <= most else min(own, most)


@contextmanager
def restored() -> Iterator[None]:
    """Set the number of threads back at the end of the block, for a program that trains between other work."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)
