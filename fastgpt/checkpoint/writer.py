"""Writes a run's checkpoints: in the training loop, or in a background thread.

    with BackgroundWriter(out_dir, keep_last=3) as writer:
        writer.save(snapshot, best_step, describe)
        ...                                          # train on
        outcome = writer.poll()                      # None until it is written

The thread only writes and hashes bytes. It computes nothing with PyTorch: on a CPU, where training already has a
thread on each core, a second one that starts PyTorch's own threads makes every operation of both several times slower.
"""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from threading import Thread

import torch

from fastgpt.checkpoint import store
from fastgpt.checkpoint.store import Snapshot
from fastgpt.system import out_of_memory


@dataclass(frozen=True)
class Outcome:
    """The outcome of a save.

    Attributes:
        error: why nothing was saved or, if it was saved, why older checkpoints were not deleted.
    """

    step: int
    folder: Path
    saved: bool
    error: Exception | None = None


class NoBackground(RuntimeError):
    """There is no memory for the copy of a checkpoint."""


class Writer:
    """Writes the checkpoints of one run, one at a time; training waits for each.

    Args:
        keep_last: checkpoints that are kept beside the best one.
        keep_every: those of steps that this divides are kept as well; 0: none.
    """

    def __init__(self, out_dir: Path, keep_last: int, keep_every: int = 0):
        self.out_dir, self.keep_last, self.keep_every = out_dir, keep_last, keep_every
        self.pending: Future[Outcome] | None = None

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or issubclass(kind, Exception):  # a second signal does not wait
            self.wait()

    def save(self, snapshot: Snapshot, best_step: int, describe: Callable[[], None]) -> None:
        """Write a checkpoint, or begin to; the outcome of the one before it must have been taken.

        Args:
            describe: writes what else the checkpoint needs in the run's folder.
        """
        self.pending = self._new_pending()
        self._write(self.pending, snapshot, best_step, describe)

    def poll(self) -> Outcome | None:
        """The outcome of the last save, once; None if it is under way, or was taken before."""
        return self.wait() if self.pending is not None and self.pending.done() else None

    def wait(self) -> Outcome | None:
        """The outcome of the last save, once, and when it is written; None if it was taken before.

        Raises:
            Exception: a defect; what the disk or the memory refuses is in the outcome.
        """
        pending, self.pending = self.pending, None
        return None if pending is None else pending.result()

    def _new_pending(self) -> Future[Outcome]:
        assert self.pending is None, "the outcome of the save before it was not taken"
        return Future()

    def _write(
        self, pending: Future[Outcome], snapshot: Snapshot, best_step: int, describe: Callable[[], None]
    ) -> None:
        try:
            pending.set_result(self._outcome(snapshot, best_step, describe))
        except BaseException as error:
            pending.set_exception(error)

    def _outcome(self, snapshot: Snapshot, best_step: int, describe: Callable[[], None]) -> Outcome:
        folder, saved = store.folder_of(self.out_dir, snapshot.step), False
        with out_of_memory.caught() as shortage:
            try:
                describe()
                store.save(self.out_dir, snapshot, best_step)
                saved = True
                store.prune(self.out_dir, self.keep_last, self.keep_every)
            except OSError as error:
                return Outcome(snapshot.step, folder, saved, error)
            return Outcome(snapshot.step, folder, saved)
        return Outcome(snapshot.step, folder, saved, MemoryError(shortage.reason))


class BackgroundWriter(Writer):
    """Writes in a thread, from a copy in the host's memory, while training goes on."""

    def __init__(self, out_dir: Path, keep_last: int, keep_every: int = 0):
        super().__init__(out_dir, keep_last, keep_every)
        self.memory: dict[str, torch.Tensor] = {}  # of the copy, kept for the next one

    def save(self, snapshot: Snapshot, best_step: int, describe: Callable[[], None]) -> None:
        """Begin to write a checkpoint.

        Raises:
            NoBackground: nothing was begun; a `Writer` can write it.
        """
        pending, copy = self._new_pending(), None
        with out_of_memory.caught():
            copy = snapshot.copied(self.memory)
        if copy is None:
            self.memory.clear()  # the part of the copy that there was room for
            raise NoBackground("no memory for a copy of the checkpoint")
        Thread(target=self._write, args=(pending, copy, best_step, describe), name="checkpoint", daemon=True).start()
        self.pending = pending
