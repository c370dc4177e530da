"""Training from Python: what `python -m fastgpt.train` does, as a function.

summary = fastgpt.fit(preset="mini", dataset="book.txt", out_dir="out-book")
print(summary.best_val_loss, summary.history[-1])
"""

import dataclasses
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from fastgpt.checkpoint.progress import Progress
from fastgpt.config.fields import check_names, validate_fields
from fastgpt.config.training import TrainConfig
from fastgpt.generation.sample import sample
from fastgpt.loggers.logger import Record
from fastgpt.training.report import RunSummary
from fastgpt.training.run import train
from fastgpt.training.start import configure


def fit(
    preset: str | None = None, *, on_record: Callable[[Record], object] | None = None, **settings: Any
) -> RunSummary:
    """Train a run, or continue one.

    Args:
        preset: a name in `fastgpt.PRESETS`; default the one that fits the device, as on the command line.
        on_record: called with each record of metrics.jsonl as it is logged.
        settings: fields of `fastgpt.TrainConfig` that differ from the preset, such as `dataset`, `max_iters`,
            `out_dir`, `init_from="resume"` or `overwrite=True`.

    Returns:
        How the run went; its `history` holds the records of this call.

    Raises:
        UsageError: an unknown preset or setting, or anything that makes the run impossible; nothing was lost.
        RunFailed: the run cannot go on; what it had saved is there.
    """
    check_names(settings, [field.name for field in dataclasses.fields(TrainConfig)])
    validate_fields(TrainConfig, settings)
    collected = _History(on_record)
    summary = train(configure(preset, settings), sample, [collected])
    return dataclasses.replace(summary, history=tuple(collected.records))


class _History:
    """A `Logger` that keeps the records that count, and passes each on."""

    def __init__(self, on_record: Callable[[Record], object] | None):
        self.on_record = on_record
        self.records: list[Record] = []

    def start(self, progress: Progress) -> None:
        """Forget records of steps that a rollback undid."""
        self.records = [record for record in self.records if record["step"] <= progress.step]

    def log(self, record: Record) -> None:
        self.records.append(record)
        if self.on_record:
            self.on_record(record)

    def finish(self) -> None:
        """Nothing is open."""


class _Callable(ModuleType):
    """This module can be called: `import fastgpt.fit` puts it where `fastgpt.fit` was the function."""

    __call__ = staticmethod(fit)


sys.modules[__name__].__class__ = _Callable
