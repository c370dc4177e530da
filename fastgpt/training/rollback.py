"""Follows the guard's verdicts: reports skipped steps and, after too many in a row, goes back to a good checkpoint."""

from collections import Counter
from collections.abc import Sequence

from fastgpt.checkpoint import store
from fastgpt.errors import RunFailed
from fastgpt.system.units import counted
from fastgpt.training.checkpoints import Checkpoints
from fastgpt.training.guard import Verdict
from fastgpt.training.log import RunLog
from fastgpt.training.setup import Setup
from fastgpt.training.validation import Validation


class Rollback:
    """Goes back where that is needed, and leaves out the data that led there."""

    def __init__(self, setup: Setup, log: RunLog, checkpoints: Checkpoints, validation: Validation):
        self.out_dir, self.config, self.state, self.log = setup.out_dir, setup.config, setup.state, log
        self.checkpoints, self.validation = checkpoints, validation
        self.returns: Counter[int] = Counter()  # rollbacks to each step, which the disk may not have recorded

    def follow(self, verdicts: Sequence[Verdict]) -> bool:
        """Report which of the last steps were skipped.

        Args:
            verdicts: of the last steps up to now, in their order.

        Returns:
            True if training goes on from the present step, False if the run went back to an earlier one.

        Raises:
            RunFailed: it would have to go back, and `max_rollbacks` says not again.
        """
        progress = self.state.progress
        for step, verdict in enumerate(verdicts, progress.step - len(verdicts) + 1):
            if verdict.skipped is None or verdict.scaling:
                continue
            batch = step - 1 + progress.skipped_batches
            self.log.say(f"step {step}: skipped, because {verdict.skipped} (batch {batch} of the data)")
            tokens = progress.tokens - (progress.step - step) * self.config.tokens_per_step
            self.log.log({"step": step, "tokens": tokens, "skipped": verdict.skipped, "batch": batch})
            if verdict.in_row >= self.config.rollback_after:
                self._go_back(step, verdict.skipped)
                return False
        return True

    def _go_back(self, step: int, why: str) -> None:
        """Go back to the last checkpoint before a row of skipped steps, and leave out the data since.

        Args:
            step, why: the last step of the row, and why it was skipped.
        """
        self.checkpoints.wait()
        skipped = self.state.progress.skipped_batches
        folder = store.newest_good(self.out_dir, step)
        if folder:
            self.state.load(folder)
            self.state.step.guard.open()
        else:
            self.state.reset()
        self.checkpoints.restart()
        progress = self.state.progress
        back_to, count = progress.step, self.config.rollback_after
        row = "a step was skipped" if count == 1 else f"{count} steps in a row were skipped"
        returns = max(self.returns[back_to], progress.rollbacks) + 1
        self.returns[back_to] = progress.rollbacks = returns
        if returns > self.config.max_rollbacks:
            raise RunFailed(
                f"step {step}: {row}, the last because {why}; {counted(returns - 1, 'return')} to step {back_to} did "
                f"not help: {self._advice()}, or look at batch {step - 1 + skipped} of the data"
            )
        left_out = [back_to + skipped, step - 1 + skipped]
        progress.skipped_batches = left_out[1] + 1 - back_to
        self.log.say(
            f"step {step}: {row}, the last because {why}; back to step {back_to}, and batches {left_out[0]} to "
            f"{left_out[1]} are left out"
        )
        self.log.go_back(progress)
        facts = {"rolled_back_from": step, "skipped": why, "batches": left_out}
        self.log.log({"step": back_to, "tokens": progress.tokens, **facts})
        self.validation.announce_set()
        if folder:
            self.checkpoints.save_after_rollback()  # so that a resume need not find out again

    def _advice(self) -> str:
        """Settings for a run whose losses or gradients are not finite."""
        clip = self.config.grad_clip
        return f"lower `learning_rate` {self.config.learning_rate:g}, or " + (
            f"lower `grad_clip` {clip:g}" if clip else "clip gradients, which `grad_clip` 0 does not: set it to 1"
        )
