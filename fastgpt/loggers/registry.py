"""The loggers that every run has beside the console. A new one implements `base.Logger` and is listed here."""

from collections.abc import Callable
from pathlib import Path

from fastgpt.loggers.base import Logger
from fastgpt.loggers.curves import Curves
from fastgpt.loggers.jsonl import MetricsFile

# Each is made from the run's folder. They are started, asked and finished in this order: the curves read the metrics.
LOGGERS: tuple[Callable[[Path], Logger], ...] = (MetricsFile, Curves)
