"""Every import of the project leads to a module and a name, also the imports inside functions that few runs reach."""

import ast
import functools
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.places import ROOT

# Where the modules of a package lie; data/prepare.py is a command, which nothing imports.
PACKAGES = {"fastgpt": ROOT, "fastgpt_kernels": ROOT / "kernels", "bench": ROOT, "tests": ROOT}
FILES = sorted(
    path for folder in ("fastgpt", "kernels", "bench", "tests", "data") for path in (ROOT / folder).rglob("*.py")
)
# Not in pyproject: one that comes with pytest-benchmark, and a peer that runs where it is installed.
OTHERS = {"cpuinfo", "liger_kernel"}


@functools.cache
def declared() -> set[str]:
    """The import names of the packages in pyproject."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *(line for of in project["optional-dependencies"].values() for line in of)]
    return {re.split(r"[\[<>=;]", line)[0].strip().replace("-", "_") for line in wanted}


@functools.cache
def file_of(module: str) -> Path | None:
    """The file of one of our own modules, or the folder of a package without one."""
    path = PACKAGES[module.split(".")[0]].joinpath(*module.split("."))
    for file in (path.with_suffix(".py"), path / "__init__.py", path):
        if file.exists():
            return file
    return None


@functools.cache
def defined(file: Path) -> set[str]:
    """The names at the top of a module or in a branch there, and those in `__all__`, which may be loaded late."""
    names: set[str] = set()
    for node in statements(ast.parse(file.read_text(encoding="utf-8")).body):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                names.add(name)
            case ast.Import(names=of) | ast.ImportFrom(names=of):
                names |= {alias.asname or alias.name for alias in of}
            case ast.Assign() | ast.AnnAssign() | ast.For() | ast.With():
                names |= {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
                if "__all__" in names:
                    names |= {part.value for part in ast.walk(node) if isinstance(part, ast.Constant)}
    return names


def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a module, with those in its branches."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try | ast.With | ast.For):
            yield from statements([part for part in ast.iter_child_nodes(node) if isinstance(part, ast.stmt)])
            for handler in getattr(node, "handlers", []):
                yield from statements(handler.body)


def missing(source: str) -> list[str]:
    """The imports of a source that lead nowhere, by their whole names."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if not exists(alias.name)]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            found += [f"{module}.{alias.name}" for alias in node.names if not exists(module, alias.name)]
    return found


def exists(module: str, name: str | None = None) -> bool:
    """True if the module is there and, where it is one of our own, has the name."""
    top = module.split(".")[0]
    if top not in PACKAGES:
        return top in sys.stdlib_module_names or top in declared() | OTHERS
    file = file_of(module)
    if file is None or name is None:
        return file is not None
    return file_of(f"{module}.{name}") is not None or (file.is_file() and name in defined(file))


def test_what_the_files_import_is_there():
    found = {str(path.relative_to(ROOT)): missing(path.read_text(encoding="utf-8")) for path in FILES}
    assert {path: names for path, names in found.items() if names} == {}


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("def f():\n    from conftest import cpu_instructions", ["conftest.cpu_instructions"]),
        ("from fastgpt.model.gpt import GPT, Gone", ["fastgpt.model.gpt.Gone"]),
        ("import fastgpt.model.gone", ["fastgpt.model.gone"]),
        ("from fastgpt.gone import x", ["fastgpt.gone.x"]),
        ("from fastgpt.model import gpt, gone", ["fastgpt.model.gone"]),
        ("from fastgpt import GPT, __version__, fit\nimport torch.nn, json, rich.console, cpuinfo", []),
        ("import leftpad", ["leftpad"]),
    ],
)
def test_the_rule_finds_what_is_not_there(source: str, found: list[str]):
    assert missing(source) == found
