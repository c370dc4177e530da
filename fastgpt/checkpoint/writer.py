"""Writes the checkpoints of a run, at once or in a background thread.

The thread only writes and hashes bytes. It computes nothing with PyTorch: on a CPU, where training already has a
thread on each core, a second one that starts PyTorch's own threads makes every operation of both several times slower.
"""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Self

import torch

from fastgpt.checkpoint import store
from fastgpt.checkpoint.store import Snapshot
from fastgpt.system import out_of_memory

Describe = Callable[[], None]  # writes what else a checkpoint needs in the run's folder


class NoBackground(Exception):
    """There is no memory for the copy of a checkpoint."""


@dataclass(frozen=True)
class Outcome:
    """The result of a save; `error`: why nothing was saved, or why old checkpoints were not deleted."""

    step: int
    folder: Path
    saved: bool
    error: Exception | None = None


class Writer:
    """Writes one checkpoint at a time, and returns when it is written.

    Args:
        keep_last: checkpoints that stay beside the best one.
    """

    def __init__(self, out_dir: Path, keep_last: int):
        self.out_dir, self.keep_last = out_dir, keep_last
        self._pending: Future[Outcome] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or issubclass(kind, Exception):  # a second signal does not wait
            self.wait()

    def save(self, snapshot: Snapshot, best_step: int, describe: Describe) -> None:
        """Write a checkpoint. Its outcome must be asked for before the next one.

        Raises:
            NoBackground: only by a `BackgroundWriter`; nothing was begun.
        """
        self._begin()(snapshot, best_step, describe)

    def finished(self) -> Outcome | None:
        """The outcome of the last save, once; None if it was given before, or is not known yet."""
        return self.wait() if self._pending is not None and self._pending.done() else None

    def wait(self) -> Outcome | None:
        """The outcome of the last save, once, as soon as it is known; None if it was given before."""
        if self._pending is None:
            return None
        pending, self._pending = self._pending, None
        return pending.result()

    def _begin(self) -> Callable[[Snapshot, int, Describe], None]:
        """A function that writes a checkpoint and keeps the outcome for `wait`, an unexpected error too."""
        assert self._pending is None
        pending: Future[Outcome] = Future()
        self._pending = pending

        def write(snapshot: Snapshot, best_step: int, describe: Describe) -> None:
            try:
                pending.set_result(self._write(snapshot, best_step, describe))
            except BaseException as error:
                pending.set_exception(error)

        return write

    def _write(self, snapshot: Snapshot, best_step: int, describe: Describe) -> Outcome:
        folder, saved = store.folder_of(self.out_dir, snapshot.step), False
        try:
            describe()
            store.save(self.out_dir, snapshot, best_step)
            saved = True
            store.prune(self.out_dir, self.keep_last)
        except (OSError, RuntimeError, MemoryError) as error:
            if not (isinstance(error, OSError) or out_of_memory.is_out_of_memory(error)):
                raise
            return Outcome(snapshot.step, folder, saved, error)
        return Outcome(snapshot.step, folder, saved)


class BackgroundWriter(Writer):
    """Copies each checkpoint to the host's memory, and writes it in a thread."""

    def __init__(self, out_dir: Path, keep_last: int):
        super().__init__(out_dir, keep_last)
        self._memory: dict[str, torch.Tensor] = {}  # kept from one checkpoint to the next

    def save(self, snapshot: Snapshot, best_step: int, describe: Describe) -> None:
        with out_of_memory.caught() as lack:
            snapshot = snapshot.copied(self._memory)
        if lack:
            self._memory.clear()
            raise NoBackground
        write = self._begin()
        Thread(target=write, args=(snapshot, best_step, describe), name="checkpoint", daemon=True).start()
