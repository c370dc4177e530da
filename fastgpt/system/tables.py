"""Prints a table of names and values on stdout."""

from collections.abc import Mapping


def print_rows(rows: Mapping[str, str]) -> None:
    """Print a row for each name. Where stdout is no terminal, a row is one line."""
    from rich import box
    from rich.cells import cell_len
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, value)
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = 1 + sum(max(map(cell_len, column)) + 3 for column in (rows, rows.values()))
    console.print(table)
