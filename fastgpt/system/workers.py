"""Processes that share work with this one, and end with it.

They are spawned, not forked: a fork copies the locks of threads that it does not copy.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

from fastgpt.errors import RunFailed

Given = TypeVar("Given")
Made = TypeVar("Made")


class Workers:
    """Calls functions of modules in `jobs` processes; in this one, if `jobs` is 1."""

    def __init__(self, pool: ProcessPoolExecutor | None):
        self._pool = pool

    def map(self, function: Callable[[Given], Made], items: Iterable[Given]) -> Iterator[Made]:
        """The results in the order of the items. The first error in this order is raised, when all processes are idle.

        Raises:
            RunFailed: a process was killed.
        """
        if self._pool is None:
            yield from map(function, items)
            return
        try:
            yield from self._pool.map(function, items)
        except BrokenProcessPool:
            raise RunFailed("a worker process was killed, perhaps for its memory; try fewer `jobs`") from None
        except BaseException:
            self._pool.shutdown(cancel_futures=True)
            raise


@contextmanager
def workers(jobs: int) -> Iterator[Workers]:
    """Processes for a block of code. When it ends, early too, what has begun is finished and nothing else begins."""
    if jobs == 1:
        yield Workers(None)
        return
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _begin)
    try:
        yield Workers(pool)
    finally:
        pool.shutdown(cancel_futures=True)


def _begin() -> None:
    """Prepare a worker: the first process alone hears Ctrl-C, and libraries start no threads, as each core has work."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process when the one that started it has ended, even if that was killed."""
    parent: Any = multiprocessing.parent_process()
    parent.join()
    os._exit(1)
