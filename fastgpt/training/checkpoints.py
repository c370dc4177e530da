"""Begins the checkpoints of a run, and reports what became of each."""

import math

from fastgpt.checkpoint.writer import BackgroundWriter, NoBackground, Outcome, Writer
from fastgpt.system.signals import Signals
from fastgpt.training import report
from fastgpt.training.log import RunLog
from fastgpt.training.setup import Setup


class Checkpoints:
    """The checkpoints of a run, one at a time; the end of `with` waits for the last one.

    A checkpoint that was not written is a warning: the next one makes up for it.

    Attributes:
        begun, finished: steps of the last checkpoint that was begun, and of the last one that is on the disk.
        unfit_step: a step that is not saved, as its weights are not finite.
    """

    def __init__(self, setup: Setup, log: RunLog, signals: Signals):
        self.setup, self.state, self.log, self.signals = setup, setup.state, log, signals
        kind = BackgroundWriter if setup.config.async_save else Writer
        self.writer: Writer = kind(setup.out_dir, setup.config.keep_last, setup.config.keep_every)
        self.begun = self.finished = 0
        self.unfit_step: int | None = None
        self.best: tuple[float | None, int] = (None, 0)  # the best val loss and its step in the last finished one
        self.pending_best = self.best  # those of the one that is under way
        self.judgement = ""  # of the one that is under way
        self.restart()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self.writer.__exit__(kind, *rest)

    def restart(self) -> None:
        """Count from the state as it is now, which was loaded from a checkpoint or is that of a new run."""
        progress = self.state.progress
        self.begun = self.finished = progress.step
        self.best = progress.best_val_loss, progress.best_step
        self.unfit_step = None

    def save(self) -> None:
        """Write a checkpoint, or begin to; a step whose weights are not finite is left out."""
        self.state.progress.rollbacks = 0
        self.save_after_rollback()

    def save_after_rollback(self) -> None:
        """Write a checkpoint of the step that the run went back to: it remembers how often that was."""
        self.wait()  # for the one before, which may still be under way
        if self.state.progress.step != self.unfit_step:
            self._begin()
            self.poll()
        self.signals.save_asked = False

    def poll(self) -> None:
        """Report what became of the last save, if it is known and was not reported yet."""
        self._report(self.writer.poll())

    def wait(self) -> None:
        """Wait for the last save, and report what became of it if that was not done yet."""
        self._report(self.writer.wait())

    def _begin(self) -> None:
        progress = self.state.progress
        snapshot = self.state.snapshot()
        val_loss = progress.val_loss if progress.val_loss is not None else math.nan
        evaluated = progress.evaluated_step == progress.step
        self.judgement = report.judged(progress.best_val_loss, val_loss if evaluated else None)
        self.begun, self.pending_best = progress.step, (progress.best_val_loss, progress.best_step)
        try:
            self.writer.save(snapshot, progress.best_step, self._describe)
        except NoBackground:
            self.log.say("no memory for `async_save`: training waits for its checkpoints from here on")
            self.writer = Writer(self.writer.out_dir, self.writer.keep_last, self.writer.keep_every)
            self.writer.save(snapshot, progress.best_step, self._describe)

    def _describe(self) -> None:
        """Write what the run is made from, and force what was logged to the disk."""
        self.log.sync()
        self.setup.save()

    def _report(self, outcome: Outcome | None) -> None:
        if outcome is None:
            return
        progress = self.state.progress
        if outcome.saved:
            self.best, self.finished = self.pending_best, outcome.step
            self.log.say(f"step {outcome.step}: {self.judgement}; saved {outcome.folder}")
        elif progress.best_step == outcome.step:  # no checkpoint holds the best model
            progress.best_val_loss, progress.best_step = self.best
        if outcome.error:
            what = "old checkpoints were not deleted" if outcome.saved else "not saved, the checkpoint before it stays"
            why = (str(outcome.error) or type(outcome.error).__name__).splitlines()[0]
            self.log.warn(f"step {outcome.step}: {what}: {why}")
