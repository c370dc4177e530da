"""Checks every checkpoint of a run, byte by byte, and prints what it found."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from rich.console import Console
from rich.table import Table

from fastgpt.checkpoint import progress, run_folder, store
from fastgpt.errors import UsageError
from fastgpt.system import safetensors_file
from fastgpt.system.streams import Lasting
from fastgpt.system.units import format_bytes
from fastgpt.tokenizer.base import Tokenizer


@dataclass(frozen=True)
class Report:
    """The result of checking a checkpoint.

    Attributes:
        size: bytes of its files.
        damage: what is wrong with them, or None.
        val_loss: in nats, if it was evaluated.
        val_set: identity of the evaluation set of that.
    """

    folder: Path
    size: int
    damage: str | None
    val_loss: float | None = None
    val_set: str | None = None


def check(folder: Path, vocabulary: Tokenizer) -> Report | None:
    """Read a checkpoint's files, all of them, and compare them with its manifest; None if it is deleted meanwhile."""
    size = store.size(folder)
    try:
        store.verify(folder)
        store.check_vocabulary(folder, vocabulary)
        for name in (store.MODEL, store.OPTIMIZER):
            safetensors_file.read(folder / name)  # which looks at the header alone
        done = progress.read(store.load_state(folder), folder / store.STATE)
    except (OSError, UsageError) as error:
        return Report(folder, size, str(error)) if folder.is_dir() else None
    return Report(folder, size, None, done.val_loss if done.evaluated_step == done.step else None, done.val_set)


def table(reports: Sequence[Report], pointers: dict[str, str]) -> Table:
    """The reports, a line each; `pointers` says which step is the latest and which the best."""
    result = Table(box=None, pad_edge=False)
    for column in ("step", "size", "intact", "val loss"):
        result.add_column(column, justify="right")
    result.add_column()
    val_sets = {report.folder.name: report.val_set for report in reports}
    now = val_sets.get(pointers.get("latest", ""))
    for report in reports:
        notes = [name for name, step in pointers.items() if step == report.folder.name]
        if report.val_loss is not None and now is not None and report.val_set != now:
            notes.append("evaluated on another set")
        loss = "-" if report.val_loss is None else f"{report.val_loss:.4f}"
        step = f"{int(report.folder.name.removeprefix('step-')):,}"
        result.add_row(step, format_bytes(report.size), "no" if report.damage else "yes", loss, ", ".join(notes))
    return result


def verify(out_dir: Path) -> bool:
    """Print a table of a run's checkpoints to stdout and each fault to stderr; whether all is whole.

    Raises:
        UsageError: there is no run, or no vocabulary to read it by.
    """
    store.require(out_dir)
    faults, pointers = [], {}
    for name in ("latest", "best"):
        try:
            pointers[name] = store.find(out_dir, name).name
        except UsageError as error:
            faults.append(str(error))
    try:
        run_folder.load(out_dir)
    except UsageError as error:
        faults.append(str(error))
    vocabulary = run_folder.vocabulary(out_dir)
    reports = [report for folder in store.folders(out_dir) if (report := check(folder, vocabulary))]
    Console(file=cast(IO[str], Lasting(sys.stdout))).print(table(reports, pointers), highlight=False)
    faults += [report.damage for report in reports if report.damage]
    for fault in faults:
        print(f"damaged: {fault}", file=sys.stderr)
    return not faults
