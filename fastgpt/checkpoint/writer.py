"""Who writes a run's checkpoints: the training loop itself, or a thread beside it.

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
    """What became of a save; `error` is why nothing was saved, or checkpoints stayed that should have gone."""

    step: int
    folder: Path
    saved: bool
    error: Exception | None = None


class Saver:
    """Writes the checkpoints of one run, one at a time.

    Args:
        keep_last: checkpoints that stay beside the best one.
        beside: write in a thread, from a copy in the host's memory; afterwards, whether it still does.
    """

    def __init__(self, out_dir: Path, keep_last: int, *, beside: bool):
        self.out_dir, self.keep_last, self.beside = out_dir, keep_last, beside
        self.memory: dict[str, torch.Tensor] = {}
        self.pending: Future[Outcome] | None = None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or issubclass(kind, Exception):  # a second signal does not wait
            self.outcome(wait=True)

    def save(self, snapshot: Snapshot, best_step: int, describe: Callable[[], None]) -> None:
        """Write a checkpoint, or begin to. `outcome` tells what became of it, and is to be asked before the next one.

        Where there is no memory for the copy, or no thread can be had, all are written at once from then on.

        Args:
            describe: writes what else the checkpoint needs in the run's folder.
        """
        assert self.pending is None
        if self.beside:
            with out_of_memory.caught() as shortage:
                snapshot = snapshot.copied(self.memory)
            if shortage.reason is not None:
                self.beside = False
                self.memory.clear()  # what of the copy there was room for
        pending: Future[Outcome] = Future()

        def write() -> None:
            try:
                pending.set_result(self._write(snapshot, best_step, describe))
            except BaseException as error:
                pending.set_exception(error)

        if self.beside:
            try:
                Thread(target=write, name="checkpoint", daemon=True).start()
            except RuntimeError:  # the system has no thread left
                self.beside = False
        if not self.beside:
            write()
            self.memory.clear()
        self.pending = pending

    def outcome(self, wait: bool) -> Outcome | None:
        """What became of the last save, once; None where that was told, or is not known yet."""
        if self.pending is None or not (wait or self.pending.done()):
            return None
        pending, self.pending = self.pending, None
        return pending.result()

    def _write(self, snapshot: Snapshot, best_step: int, describe: Callable[[], None]) -> Outcome:
        folder, saved = store.folder_of(self.out_dir, snapshot.step), False
        with out_of_memory.caught() as shortage:
            try:
                describe()
                store.save(self.out_dir, snapshot, best_step)
                saved = True
                store.prune(self.out_dir, self.keep_last)
            except OSError as error:
                return Outcome(snapshot.step, folder, saved, error)
            return Outcome(snapshot.step, folder, saved)
        return Outcome(snapshot.step, folder, saved, MemoryError(shortage.reason))
