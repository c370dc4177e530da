"""The launch table's source, with one row changed and everything else as it was, to the letter.

    replace(source, kernel, target, kind, width, row) -> source

A row written by `_by_head` or `_by_rows` is replaced where it stands. One that `_everywhere` gives to all targets and
dtypes gets an entry of its own behind them, as `("sm_90", "16-bit", {1024: Config(2, 1024, 4)})`, which goes again when
the row becomes what it is everywhere. So a row set back gives the source as it was.
"""

import ast
import sys
from collections.abc import Iterator
from types import ModuleType

from fastgpt_kernels.launch import HEAD_SIZES, ROW_COUNTS, Config

WIDTHS = {"_by_head": HEAD_SIZES, "_by_rows": ROW_COUNTS}  # of the last of which a call of these gives rows
Table = dict[str, dict[tuple[str, str], dict[int, Config]]]


def replace(source: str, kernel: str, target: str, kind: str, width: int, row: Config) -> str:
    """The source with this row of the table changed; `width` is a key of the table.

    Raises:
        LookupError: the source holds no such row, or not in a form that is known here.
        RuntimeError: more than this row would change.
    """
    wanted = evaluate(source)
    if wanted[kernel][target, kind][width] == row:
        return source
    wanted[kernel][target, kind][width] = row
    for changed in _changes(source, _entry(source, kernel), (target, kind), width, row):
        if evaluate(changed) == wanted:
            return changed
    raise RuntimeError(f"{kernel} {target} {kind} {width} cannot be changed to {row} without changing other rows")


def evaluate(source: str) -> Table:
    """The TABLE that a launch.py with this source holds."""
    module = ModuleType("launch_table")
    sys.modules[module.__name__] = module  # where NamedTuple looks up its annotations
    try:
        exec(compile(source, "launch.py", "exec"), module.__dict__)
    finally:
        del sys.modules[module.__name__]
    return {
        kernel: {key: {width: Config(*row) for width, row in rows.items()} for key, rows in table.items()}
        for kernel, table in module.TABLE.items()
    }


def _entry(source: str, kernel: str) -> ast.expr:
    """The expression of TABLE[kernel]."""
    for statement in ast.parse(source).body:
        if isinstance(statement, ast.AnnAssign) and getattr(statement.target, "id", "") == "TABLE":
            assert isinstance(statement.value, ast.Dict)
            for key, value in zip(statement.value.keys, statement.value.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == kernel:
                    return value
    raise LookupError(f"the launch table's source holds no kernel {kernel}")


def _changes(source: str, entry: ast.expr, key: tuple[str, str], width: int, row: Config) -> Iterator[str]:
    """Sources in which the row may be as wanted, the one with the least text first."""
    if isinstance(entry, ast.Dict):
        for node, rows in zip(entry.keys, entry.values, strict=True):
            if node is not None and ast.unparse(node) == repr(key):
                yield from _in_tiles(source, rows, width, row)
                return
    elif isinstance(entry, ast.Call) and ast.unparse(entry.func) == "_everywhere":
        yield from _in_everywhere(source, entry, key, width, row)
        return
    raise LookupError(f"the launch table's source holds no row {' '.join(key)} {width} in a form that is known here")


def _in_tiles(source: str, rows: ast.expr, width: int, row: Config) -> Iterator[str]:
    """_by_head("128x64 w8 s3", ...): a string for each of the last widths."""
    if not isinstance(rows, ast.Call) or (name := ast.unparse(rows.func)) not in WIDTHS:
        raise LookupError(f"{ast.unparse(rows)} is written by none of {', '.join(WIDTHS)}")
    place = len(rows.args) - len(WIDTHS[name]) + WIDTHS[name].index(width)
    start, end = _span(source, rows.args[place])
    yield f'{source[:start]}"{row}"{source[end:]}'


def _in_everywhere(source: str, call: ast.Call, key: tuple[str, str], width: int, row: Config) -> Iterator[str]:
    """_everywhere({...}, ("sm_90", "16-bit", {64: Config(...)}), ...): without such an entry, or with a new one."""
    text = f'("{key[0]}", "{key[1]}", {{{width}: {_spell(row)}}})'
    for before, node in zip(call.args, call.args[1:], strict=False):
        if ast.unparse(node).startswith(f"({key[0]!r}, {key[1]!r}, {{{width}: "):
            (_, last), (start, end) = _span(source, before), _span(source, node)
            yield source[:last] + source[end:]
            yield source[:start] + text + source[end:]
            return
    _, last = _span(source, call.args[0])
    yield f"{source[:last]}, {text}{source[last:]}"


def _spell(row: Config) -> str:
    """As the table does, without a number of stages that is the default."""
    numbers = row[:3] if row.stages == 1 else row
    return f"Config({', '.join(map(str, numbers))})"


def _span(source: str, node: ast.expr) -> tuple[int, int]:
    """Where a node starts and ends in the source."""
    lines = source.splitlines(keepends=True)

    def place(line: int, byte: int) -> int:  # ast counts columns in bytes of UTF-8
        return sum(map(len, lines[: line - 1])) + len(lines[line - 1].encode()[:byte].decode())

    assert node.end_lineno is not None
    assert node.end_col_offset is not None
    return place(node.lineno, node.col_offset), place(node.end_lineno, node.end_col_offset)
