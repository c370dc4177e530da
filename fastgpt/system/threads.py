"""Sets the number of CPU threads that PyTorch computes with."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fastgpt.system import cpus

SETTINGS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # a user's settings, which are respected


def use(asked: int | None, recorded: int | None = None) -> int:
    """Set the number of threads for the whole process to `asked`, the value of `threads`; returns the number.

    None is auto. That is the number that a resumed run had, if there are as many CPUs. Else it is PyTorch's own (a
    thread for each core), or the number of CPUs that this process may use, if that is less. OMP_NUM_THREADS and
    MKL_NUM_THREADS take precedence over both.

    Args:
        recorded: the number of the run that is resumed.
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
    """Set the number of threads back at the end of the block, for a program that also does other work."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)
