"""Measures the val loss during a run, and keeps which step was the best."""

import itertools
import math
from collections.abc import Callable

from fastgpt.errors import shown
from fastgpt.evaluation import loss as evaluation_loss
from fastgpt.system import finite
from fastgpt.system.device import autocast
from fastgpt.training.checkpoints import Checkpoints
from fastgpt.training.log import RunLog
from fastgpt.training.setup import Setup


class Validation:
    """The evaluations of a run."""

    def __init__(self, setup: Setup, log: RunLog, checkpoints: Checkpoints):
        self.setup, self.state, self.log, self.checkpoints = setup, setup.state, log, checkpoints

    def announce_set(self) -> None:
        """Say and record it, if val losses are measured on another evaluation set from here on."""
        progress, now = self.state.progress, self.setup.evaluation.identity
        if progress.val_set == now:
            return
        self.log.say(
            f"step {progress.step}: evaluations read {now} from here on, and before {shown(progress.val_set)}; "
            "which checkpoint is best begins anew"
        )
        progress.val_set = now
        self.log.log({"step": progress.step, "tokens": progress.tokens, "val_set": now})

    def measure(self, stopping: Callable[[], bool]) -> float | None:
        """The val loss; None where `stopping`, which is asked before each batch, cut it short."""
        setup, display, done = self.setup, self.log.display, itertools.count()
        display.begin("evaluation", self.state.progress.step, setup.evaluation.count)

        def stopping_shown() -> bool:
            display.reach(next(done))
            return stopping()

        evaluation, arithmetic = setup.evaluation, autocast(setup.device, setup.dtype)
        batches = evaluation.batches(setup.val_loader)
        return evaluation_loss.mean_loss(
            self.state.model, batches, arithmetic, stopping_shown, end_token=evaluation.end_token
        )

    def take(self, loss: float) -> None:
        """Record a val loss; one that is not finite, or is of such weights, is never the best."""
        progress = self.state.progress
        if bad := finite.first_not_finite(self.state.model.weights()):
            self.log.say(f"warning: step {progress.step}: not saved, as its weights are not finite: {bad}")
            self.checkpoints.unfit_step = progress.step
        good = math.isfinite(loss) and not bad
        progress.val_loss, progress.evaluated_step = loss if good else None, progress.step
        if good and (progress.best_val_loss is None or loss < progress.best_val_loss):
            progress.best_val_loss, progress.best_step = loss, progress.step
        self.log.log({"step": progress.step, "tokens": progress.tokens, "val_loss": loss})
