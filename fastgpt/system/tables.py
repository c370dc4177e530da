"""Prints tables on stdout."""

import sys
from collections.abc import Mapping
from typing import IO, TYPE_CHECKING, cast

from fastgpt.system.streams import Lasting

if TYPE_CHECKING:
    from rich.console import Console

PIPED_WIDTH = 160  # columns where stdout is no terminal


def console() -> "Console":
    """A console on stdout that prints every text as it is."""
    from rich.console import Console

    found = Console(file=cast(IO[str], Lasting(sys.stdout)), markup=False, emoji=False, highlight=False)
    if not found.is_terminal:
        found.width = PIPED_WIDTH
    return found


def print_rows(rows: Mapping[str, str]) -> None:
    """Print a row for each name. Where stdout is no terminal, a row is one line."""
    from rich import box
    from rich.cells import cell_len
    from rich.table import Table

    table = Table(box=box.SIMPLE, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, value)
    shown = console()
    if not shown.is_terminal:
        shown.width = 1 + sum(max(map(cell_len, column)) + 3 for column in (rows, rows.values()))
    shown.print(table)
