"""Whole training runs, each in a process of its own, and what may be said of their losses.

A process of its own, because what a run compiles, allocates and caches would serve the next one.
"""

import contextlib
import multiprocessing
import os
import statistics
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

Result = TypeVar("Result")
Settings = Mapping[str, Any]
NOWHERE = Path(os.devnull)


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        entrant: who ran.
        seconds: in steps, the first counted as long as the others on average.
        first: seconds until the end of the first step, which compiles, beyond the time of another step.
        val_loss: mean over what the recipe evaluates, the whole val split on the small boards, in nats a token.
        bits_per_byte: the same by bytes of text; None for the peer.
    """

    entrant: str
    seed: int
    steps: int
    tokens: int
    seconds: float
    first: float
    val_loss: float
    bits_per_byte: float | None = None


def apart(function: Callable[..., Result], *arguments: Any) -> Result:
    """The function's result from a new process; an exception passes."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def train_engine(entrant: str, settings: Settings, seed: int) -> Run:
    """Train as `fastgpt.train` does, with one evaluation at the end.

    Args:
        settings: all that differ from the defaults of `TrainConfig`.
    """
    from fastgpt.config.training import TrainConfig
    from fastgpt.generation.sample import sample
    from fastgpt.loggers import jsonl
    from fastgpt.training.run import train

    with contextlib.ExitStack() as stack:
        folder, nowhere = stack.enter_context(tempfile.TemporaryDirectory()), stack.enter_context(NOWHERE.open("w"))
        stack.enter_context(contextlib.redirect_stdout(nowhere))
        stack.enter_context(contextlib.redirect_stderr(nowhere))
        out_dir = Path(folder) / "out"
        ends = {"out_dir": str(out_dir), "seed": seed, "sample_interval": 0, "preview": False}
        ends |= {"eval_interval": settings["max_iters"], "log_interval": 1}  # the first record times the first step
        summary = train(TrainConfig(**{**settings, **ends}), sample)
        history = jsonl.read_metrics(out_dir / jsonl.NAME)
    each = summary.train_seconds / (summary.steps - 1)
    assert summary.val_loss is not None
    return Run(
        entrant,
        seed,
        summary.steps,
        history[-1]["tokens"],
        each * summary.steps,
        max(0.0, history[0]["seconds"] - each),
        summary.val_loss,
        summary.bits_per_byte,
    )


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """The mean and the standard deviation, 0 of a single value."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def p_below(values: Sequence[float], mark: float) -> float | None:
    """The p-value of the mean being below the mark: Student's one-sided t-test; None for fewer than two values."""
    if len(values) < 2:
        return None
    from scipy import stats  # of the extra `test`

    return float(stats.ttest_1samp(values, mark, alternative="less").pvalue)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of text, its columns aligned, all but the first to the right."""
    lines = [list(head), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines]
    return "\n".join("  ".join(cells).rstrip() for cells in aligned)
