"""Keeps what `fastgpt_kernels.aot` reports of every row, and compiles only the rows that have changed since.

    python -m fastgpt_kernels.compile_report FOLDER

brings FOLDER/3.7.1.json, named after the installed Triton, up to date and says which rows got worse. Each group of rows
is saved as soon as it is compiled, so the command may be stopped and started again. The file holds a line for each row:

    {"columns": ["registers", ...], "TARGET KERNEL SOURCES": {"CONFIG": [32, ...], ...}, ...}

SOURCES is a hash of the code that the kernel is made from, CONFIG the row of the launch table and its variant. Together
with the file's name they say what the numbers depend on: where one of them changes, the row is no longer found. How the
numbers are read from machine code is no part of that.

Exit code 2, with one line on stderr, for a bad flag or in a process where TRITON_INTERPRET is set.
"""

import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import triton

from fastgpt_kernels import aot
from fastgpt_kernels.launch import INTERPRETED, TABLE, TARGETS
from fastgpt_kernels.source_hash import HERE, source_hash

COLUMNS = ("registers", "stack", "spills", "shared", "blocks_per_sm", "tensor_core", "waits", "wide_loads", "warnings")
SLACK = 8  # registers: the unit in which they are given out
Content = dict[str, dict[str, list[Any]]]  # "TARGET KERNEL SOURCES" -> CONFIG -> the numbers of COLUMNS
Line = dict[str, Any]
Compiler = Callable[[Sequence[aot.Task]], Iterable[list[Line]]]


def path(folder: Path) -> Path:
    """The report of the installed Triton."""
    return folder / f"{triton.__version__}.json"


def expected(sources: Path = HERE) -> dict[str, list[str]]:
    """Every row that a report of these sources holds: "TARGET KERNEL SOURCES" -> each CONFIG."""
    hashes = {}
    for kernel in TABLE:
        # Of the table only a row's own tile counts, which stands in CONFIG.
        hashes[kernel] = source_hash("aot", aot.EXAMPLES[kernel].__name__, {("launch", "TABLE")}, sources)
    return {
        f"{target} {kernel} {hashes[kernel]}": aot.configs(target, kernel) for target in TARGETS for kernel in TABLE
    }


def read(file: Path) -> Content:
    """The file's rows. Raises `ValueError` for a file with other columns."""
    content = json.loads(file.read_text(encoding="utf-8"))
    if (found := content.pop("columns", None)) != list(COLUMNS):
        raise ValueError(f"{file} has the columns {found}; expected {list(COLUMNS)}")
    return content


def write(file: Path, content: Content) -> None:
    """JSON with a line for each row."""
    groups = [f'"columns": {json.dumps(COLUMNS)}']
    for group, rows in content.items():
        lines = ",\n".join(f" {json.dumps(config)}: {json.dumps(numbers)}" for config, numbers in rows.items())
        groups.append(f"{json.dumps(group)}: {{\n{lines}\n}}")
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    temporary.write_text("{\n" + ",\n".join(groups) + "\n}\n", encoding="utf-8")
    temporary.replace(file)


def changes(content: Content, sources: Path = HERE) -> list[str]:
    """The rows that a report of these sources lacks, or should no longer hold, in words."""
    wanted = {f"{group} {config}" for group, configs in expected(sources).items() for config in configs}
    held = {f"{group} {config}" for group, rows in content.items() for config in rows}
    return sorted([f"not compiled: {row}" for row in wanted - held] + [f"outdated: {row}" for row in held - wanted])


def lines(content: Content) -> list[Line]:
    """The rows as `fastgpt_kernels.aot` reports them, without the seconds."""
    found = []
    for group, rows in content.items():
        target, kernel, _ = group.split()
        for config, numbers in rows.items():
            place = {"target": target, "kernel": kernel, "config": config}
            found.append(place | dict(zip(COLUMNS, numbers, strict=True)))
    return found


def refresh(file: Path, compiler: Compiler = aot.compile_tasks) -> tuple[int, list[str]]:
    """Compile what the file lacks, and drop what it should not hold; how many were compiled, and which got worse."""
    before: Content = read(file) if file.exists() else {}
    content: Content = {}
    wanted = expected()
    for group, configs in wanted.items():
        known = before.get(group, {})
        content[group] = {config: known[config] for config in configs if config in known}
    missing = {group: [c for c in configs if c not in content[group]] for group, configs in wanted.items()}
    missing = {group: configs for group, configs in missing.items() if configs}
    tasks = [(group.split()[0], group.split()[1], configs) for group, configs in missing.items()]
    for group, found in zip(missing, compiler(tasks), strict=True):
        rows = content[group] | {line["config"]: [line[column] for column in COLUMNS] for line in found}
        content[group] = {config: rows[config] for config in wanted[group]}
        write(file, content)
    if not tasks and content != before:
        write(file, content)
    return sum(map(len, missing.values())), worse(before, content)


def worse(before: Content, after: Content) -> list[str]:
    """The rows that take more registers or stack than before, or spill more, whatever sources they are made from."""
    old = {(line["target"], line["kernel"], line["config"]): line for line in lines(before)}
    found = []
    for line in lines(after):
        row = line["target"], line["kernel"], line["config"]
        for column, slack in (("registers", SLACK), ("stack", 0), ("spills", 0)):
            if row in old and line[column] > old[row][column] + slack:
                found.append(f"{' '.join(row)}: {column} {old[row][column]} -> {line[column]}")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = aot.Parser(prog="python -m fastgpt_kernels.compile_report", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="of the reports, such as tests/golden/compile")
    flags = parser.parse_args(argv)
    if INTERPRETED:
        parser.error("TRITON_INTERPRET is set, and an interpreter compiles nothing; unset it for this command")
    start = time.perf_counter()
    compiled, got_worse = refresh(path(flags.folder))
    for row in got_worse:
        print(f"worse: {row}")
    print(f"{path(flags.folder)}: {compiled} rows compiled in {time.perf_counter() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
