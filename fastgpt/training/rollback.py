"""Rolls a run back to a good checkpoint after too many skipped steps in a row."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgpt.checkpoint import store
from fastgpt.config.training import TrainConfig
from fastgpt.errors import RunFailed
from fastgpt.system.units import counted
from fastgpt.training.setup import Setup


@dataclass(frozen=True)
class Return:
    """A rollback that was made.

    Attributes:
        folder: of the checkpoint; None for the state before the first step.
        message: a line for the user.
        record: for the loggers.
    """

    folder: Path | None
    message: str
    record: dict[str, Any]


class Rollbacks:
    """Loads the last good checkpoint, leaves out the data since, and gives up after too many returns to it."""

    def __init__(self, setup: Setup):
        self.setup = setup
        self.returns: Counter[int] = Counter()  # to each step; a full disk may have kept them out of the checkpoints

    def go_back(self, step: int, why: str) -> Return:
        """Load the last good checkpoint before the skipped steps that end with `step`, skipped for the reason `why`.

        Raises:
            RunFailed: going back there did not help before, as often as `max_rollbacks` says.
        """
        setup, config = self.setup, self.setup.config
        skipped = setup.progress.skipped_batches
        folder = store.newest_good(setup.out_dir, step)
        if folder:
            setup.state.load(folder)
            setup.state.step.guard.open()
        else:
            setup.state.reset()
        progress = setup.progress
        back_to, count = progress.step, config.rollback_after
        row = "a step was skipped" if count == 1 else f"{count} steps in a row were skipped"
        returns = max(self.returns[back_to], progress.rollbacks) + 1
        self.returns[back_to] = progress.rollbacks = returns
        if returns > config.max_rollbacks:
            raise RunFailed(
                f"step {step}: {row}, the last because {why}; {counted(returns - 1, 'return')} to step {back_to} did "
                f"not help: {_calmer(config)}, or look at batch {step - 1 + skipped} of the data"
            )
        left_out = [back_to + skipped, step - 1 + skipped]
        progress.skipped_batches = left_out[1] + 1 - back_to
        message = (
            f"step {step}: {row}, the last because {why}; back to step {back_to}, and batches {left_out[0]} to "
            f"{left_out[1]} are left out"
        )
        record = {"step": back_to, "tokens": progress.tokens, "rolled_back_from": step, "skipped": why}
        return Return(folder, message, record | {"batches": left_out})


def _calmer(config: TrainConfig) -> str:
    """Advice for a run whose losses or gradients are not finite."""
    clip = config.grad_clip
    return f"lower `learning_rate` {config.learning_rate:g}, or " + (
        f"lower `grad_clip` {clip:g}" if clip else "clip gradients, which `grad_clip` 0 does not: set it to 1"
    )
