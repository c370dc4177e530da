"""Trains from Python what `python -m fastgpt.train` trains from a command line.

import fastgpt

run = fastgpt.fit(preset="mini", dataset="book.txt", max_iters=500, on_log=print)
print(run.best_val_loss, run.out_dir)
print(fastgpt.load(run.out_dir).generate("The "))
"""

import dataclasses
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from fastgpt.config.fields import validate_fields
from fastgpt.config.training import PRESETS, TrainConfig
from fastgpt.errors import UsageError, nearest, shown
from fastgpt.generation.sample import sample
from fastgpt.loggers import jsonl
from fastgpt.loggers.base import Record
from fastgpt.loggers.callback import Callback
from fastgpt.training.report import RunSummary
from fastgpt.training.run import train
from fastgpt.training.start import complete


@dataclass(frozen=True, kw_only=True)
class FitSummary(RunSummary):
    """The end of a run, its history and its files.

    Attributes:
        out_dir: the run's folder, for `fastgpt.load`.
        history: the records of the whole run, as metrics.jsonl has them; numbers that are not finite are None.
    """

    out_dir: Path
    history: list[Record]


def fit(preset: str | None = None, *, on_log: Callable[[Record], object] | None = None, **settings: Any) -> FitSummary:
    """Train, or continue, a run; it is saved, logged and shown as by the command.

    Ctrl-C saves and returns, a second one stops at once. `init_from="resume"` goes on with the run in `out_dir`.

    Args:
        preset: the settings to begin with, one of `fastgpt.PRESETS`; None takes the one that fits the device.
        on_log: called with each record while the run goes on; the keys are those of metrics.jsonl.
        settings: fields of `fastgpt.TrainConfig` that change the preset, such as `dataset`, `out_dir` or `max_iters`.

    Raises:
        UsageError: an unknown or wrong setting, or data or a folder that make the run impossible.
        RunFailed: the run cannot go on; the checkpoints that it had saved are whole.
    """
    if preset is not None and preset not in PRESETS:
        raise UsageError(f"preset {shown(preset)} is not one of {', '.join(PRESETS)}{nearest(str(preset), PRESETS)}")
    known = [field.name for field in dataclasses.fields(TrainConfig)]
    for name in settings:
        if name not in known:
            raise UsageError(f"unknown setting {name!r}{nearest(name, known)}")
    paths = {name: os.fspath(value) for name, value in settings.items() if isinstance(value, os.PathLike)}
    plain = TrainConfig(**settings | paths)  # numbers of NumPy and PyTorch become Python's
    given = {name: getattr(plain, name) for name in settings}
    validate_fields(TrainConfig, given)
    config, source = complete(preset, given)
    summary = train(config, sample, [] if on_log is None else [Callback(on_log)], source)
    out_dir = Path(config.out_dir)
    return FitSummary(**vars(summary), out_dir=out_dir, history=jsonl.read_metrics(out_dir / jsonl.NAME))


class _CallableModule(ModuleType):
    """`fastgpt.fit` is the function and, as soon as anything imports this module, the module: both train."""

    def __call__(self, *arguments: Any, **settings: Any) -> FitSummary:
        return fit(*arguments, **settings)


# https://docs.python.org/3/reference/datamodel.html#customizing-module-attribute-access
sys.modules[__name__].__class__ = _CallableModule
