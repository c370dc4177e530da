"""Verify every checkpoint of a run, byte by byte.

    python -m fastgpt.verify out

Exit code 0: all are whole; 1: one is damaged, or `latest` or `best` names none, or config.json is damaged; 2: there is
no run, or no vocabulary to read it by.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from rich.console import Console
from rich.table import Table

from fastgpt import cli
from fastgpt.checkpoint.verification import Verification, verify_run
from fastgpt.config.fields import Settings, option
from fastgpt.system.streams import Lasting
from fastgpt.system.units import format_bytes


@dataclass(frozen=True)
class VerifyConfig(Settings):
    """The run to verify."""

    out_dir: str = option("out", "folder of the run; the flag's name may be left out", path=True)


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if words and not words[0].startswith("-"):
        words.insert(0, "--out_dir")
    config = cli.parse(
        VerifyConfig, words, prog="python -m fastgpt.verify", description="Check every checkpoint of a run."
    )
    found = verify_run(Path(config.out_dir))
    Console(file=cast(IO[str], Lasting(sys.stdout))).print(_table(found), highlight=False)
    for fault in found.faults:
        print(f"damaged: {fault}", file=sys.stderr)
    return 1 if found.faults else 0


def _table(found: Verification) -> Table:
    """The checkpoints, a line each, with marks at the latest and the best."""
    table = Table(box=None, pad_edge=False)
    for column in ("step", "size", "intact", "val loss"):
        table.add_column(column, justify="right")
    table.add_column()
    val_sets = {report.folder.name: report.val_set for report in found.reports}
    now = val_sets.get(found.pointers.get("latest", ""))
    for report in found.reports:
        notes = [name for name, step in found.pointers.items() if step == report.folder.name]
        if report.val_loss is not None and now is not None and report.val_set != now:
            notes.append("evaluated on another set")
        loss = "-" if report.val_loss is None else f"{report.val_loss:.4f}"
        step = f"{int(report.folder.name.removeprefix('step-')):,}"
        table.add_row(step, format_bytes(report.size), "no" if report.damage else "yes", loss, ", ".join(notes))
    return table


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
