"""The progress of a run, as `state.json` keeps it."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from fastgpt.config.fields import option, validate_fields
from fastgpt.errors import CorruptCheckpoint, UsageError


@dataclass
class Progress:
    """Counts and losses so far; losses are None before the first evaluation."""

    step: int = option(0, "optimizer steps done", low=0)
    tokens: int = option(0, "tokens seen", low=0)
    val_loss: float | None = option(None, "val loss of the last evaluation, if it was a number")
    evaluated_step: int = option(0, "the step of the last evaluation", low=0)
    val_set: str | None = option(None, "identity of the evaluation set of these losses")
    best_val_loss: float | None = option(None, "the lowest val loss")
    best_step: int = option(0, "the step of the lowest val loss", low=0)
    rollbacks: int = option(0, "rollbacks to the checkpoint of this step", low=0)
    skipped_batches: int = option(0, "batches that were skipped: step s takes batch s + this", low=0)

    def forget_best(self) -> None:
        """Let the next evaluation be the best so far."""
        self.best_val_loss, self.best_step = None, 0


def read(state: Mapping[str, Any], path: Path) -> Progress:
    """The progress in the content of the state.json at `path`. Raises `CorruptCheckpoint`."""
    saved = state.get("progress")
    values: dict[str, Any] = {"val_set": None}  # older versions did not save it
    try:
        if isinstance(saved, dict):
            values |= saved
        if values.keys() != {field.name for field in fields(Progress)}:
            raise UsageError("its progress has other fields")
        validate_fields(Progress, values)
        if values["step"] != state.get("step"):
            raise UsageError(f"its progress is at step {values['step']!r:.20}")
        if max(values["best_step"], values["evaluated_step"]) > values["step"]:
            raise UsageError("its progress knows of later steps")
    except UsageError as error:
        raise CorruptCheckpoint(f"{path} is not what a run saves: {error}") from None
    return Progress(**values)
