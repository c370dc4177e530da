"""Saves a run's state, and says what became of each save."""

import math
from collections.abc import Callable
from typing import Self

from fastgpt.checkpoint.writer import BackgroundWriter, NoBackground, Outcome, Writer
from fastgpt.training import report
from fastgpt.training.setup import Setup


class Checkpoints:
    """The checkpoints of one run.

    Attributes:
        begun, finished: the steps of the last checkpoint that was begun, and of the last that was written.

    Args:
        describe: writes what else a checkpoint needs in the run's folder.
        say, warn: take a line for the user; `warn` counts it as a failure.
    """

    def __init__(
        self,
        setup: Setup,
        describe: Callable[[], None],
        say: Callable[[str], None],
        warn: Callable[[str], None],
    ):
        self.setup, self.describe, self.say, self.warn = setup, describe, say, warn
        kind = BackgroundWriter if setup.config.async_save else Writer
        self.writer: Writer = kind(setup.out_dir, setup.config.keep_last)
        self.restart()
        self._judged = ""  # how good the checkpoint that is being written is
        self._best = self._written_best

    def restart(self) -> None:
        """Go on from the state as it is now, which was just loaded or reset."""
        progress = self.setup.progress
        self.begun = self.finished = progress.step
        self._written_best = progress.best_val_loss, progress.best_step  # as the last written checkpoint says

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self.writer.__exit__(kind, error, trace)

    def save(self) -> None:
        """Write a checkpoint of the state as it is now, or begin to; the one before is waited for."""
        self.wait()
        progress = self.setup.progress
        snapshot = self.setup.state.snapshot()
        val_loss = progress.val_loss if progress.val_loss is not None else math.nan
        evaluated = progress.evaluated_step == progress.step
        self._judged = report.judged(progress.best_val_loss, val_loss if evaluated else None)
        self._best = progress.best_val_loss, progress.best_step
        self.begun = progress.step
        try:
            self.writer.save(snapshot, progress.best_step, self.describe)
        except NoBackground:
            self.say("no memory for `async_save`: training waits for its checkpoints from here on")
            self.writer = Writer(self.setup.out_dir, self.setup.config.keep_last)
            self.writer.save(snapshot, progress.best_step, self.describe)
        self.poll()

    def poll(self) -> None:
        """Say what became of the last save, if it is known by now."""
        self._tell(self.writer.finished())

    def wait(self) -> None:
        """Wait for the last save, and say what became of it."""
        self._tell(self.writer.wait())

    def _tell(self, outcome: Outcome | None) -> None:
        if outcome is None:
            return
        progress = self.setup.progress
        if outcome.saved:
            self._written_best = self._best
            self.say(f"step {outcome.step}: {self._judged}; saved {outcome.folder}")
            self.finished = outcome.step
        elif progress.best_step == outcome.step:  # no checkpoint holds the best model
            progress.best_val_loss, progress.best_step = self._written_best
        if outcome.error:
            what = "old checkpoints were not deleted" if outcome.saved else "not saved, the checkpoint before it stays"
            why = (str(outcome.error) or type(outcome.error).__name__).splitlines()[0]
            self.warn(f"step {outcome.step}: {what}: {why}")
