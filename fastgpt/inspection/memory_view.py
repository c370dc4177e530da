"""Shows what a training step and a generation hold in memory: estimated, and measured beside it."""

import sys

from fastgpt.checkpoint.source import Source
from fastgpt.config.inspection import MemoryConfig
from fastgpt.errors import UsageError
from fastgpt.inspection import memory_fit, memory_picture, memory_report, memory_work, outputs
from fastgpt.inspection.memory_report import Found
from fastgpt.system import contention, out_of_memory, threads
from fastgpt.system.device import free_memory, parse_memory
from fastgpt.system.units import format_exactly


def show(config: MemoryConfig, source: Source | None, why: str) -> int:
    """Print a table or one JSON object, and write the picture that is asked for; the exit code.

    Args:
        why: a line on how the settings were chosen.

    Raises:
        UsageError: the settings are not those of the weights, the machine lacks what they ask for, a file cannot be
            written, `fit` is no amount of memory or less than the weights, or `measure` needs more than there is.
    """
    path = None if config.png is None else outputs.check("png", config.png)
    with threads.restored():
        work = memory_work.prepared(config, source)
        budget = None if config.fit is None else parse_memory(config.fit, work.device, "fit")
        found = Found(work, work.step(), work.generation(config.max_batch))
        if budget is not None:
            _check_budget(budget, found)
        if config.measure:
            _check_free(found)
        print(why, file=sys.stderr)
        if config.measure:
            found = _measured(found)
        fit = None if budget is None else memory_fit.find(work, budget, found.training)
    if config.json:
        memory_report.print_json(found, fit)
    else:
        memory_report.print_tables(found, fit)
    if path is not None:
        outputs.save("png", path, [memory_picture.draw(found, budget)], beside=True)
    return 0


def _check_budget(budget: int, found: Found) -> None:
    weights = found.generation.peaks["decode"]["weights"].total
    if budget < weights:
        raise UsageError(
            f"`fit` {found.work.config.fit}: the weights alone take {format_exactly(weights)}; give more, or take a "
            "smaller model"
        )


def _check_free(found: Found) -> None:
    work, config = found.work, found.work.config
    free = free_memory(work.device)
    for what, need, setting in (
        ("training step", found.training.peak, f"`batch_size` {config.batch_size}"),
        ("generation", found.generation.peak, f"`max_batch` {config.max_batch}"),
    ):
        if need > free:
            raise UsageError(
                f"`measure` runs a {what} that holds about {format_exactly(need)}, and {work.device} has "
                f"{format_exactly(free)} free; lower {setting}, or leave `measure` out"
            )


def _measured(found: Found) -> Found:
    """The same with what a real step and a real generation hold."""
    work = found.work
    print("measuring two training steps and a generation", file=sys.stderr)
    with out_of_memory.caught() as shortage, contention.watching(work.machine.threads):
        return Found(work, found.training, found.generation, work.measured_step(), work.measured_generation())
    raise UsageError(f"`measure` ran out of memory ({shortage.reason}); lower `batch_size` or `max_batch`")
