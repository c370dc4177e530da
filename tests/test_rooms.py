"""The rooms of fastgpt/: imports go down the table only, and never in a circle.

docs/architecture.md shows the same table, and a test here compares them.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.places import ROOT

PACKAGE = ROOT / "fastgpt"
# What a room may import, and with it all that lies below that. Every room may import fastgpt/errors.py.
MAY_IMPORT = {
    "config": (),
    "system": ("config",),
    "tokenizer": ("system",),
    "ops": ("system",),
    "model": ("ops",),
    "interchange": ("tokenizer",),
    "data": ("tokenizer", "interchange"),
    "checkpoint": ("model", "data"),
    "evaluation": ("model", "data"),
    "loggers": ("system", "checkpoint"),
    "training": ("loggers", "evaluation"),
    "generation": ("loggers", "evaluation"),
    "conversion": ("generation",),
    "inspection": ("training", "conversion"),
}
FOR_EVERYONE = {"fastgpt", "fastgpt.errors"}  # the version, and the errors
FILES = sorted(PACKAGE.rglob("*.py"))


def module_of(path: Path) -> str:
    """`fastgpt.model.gpt` of its file; a package goes by its own name."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def imported(source: str) -> Iterator[str]:
    """The modules of fastgpt that a source imports, wherever the import stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import; write the whole name"
            names = [
                name if (name := f"{node.module}.{alias.name}") in MODULES else node.module for alias in node.names
            ]
        else:
            continue
        yield from (name for name in names if name and name.split(".")[0] == "fastgpt")


def room_of(module: str) -> str:
    """The room of a module; "" for what lies at the top."""
    path = MODULES[module]
    return path.parent.name if path.parent != PACKAGE else ""


def below(room: str) -> set[str]:
    """The rooms that a room may import."""
    direct = MAY_IMPORT[room]
    return set(direct).union(*map(below, direct))


def wrong(module: str, other: str) -> bool:
    """Whether a module must not import another."""
    room, its = room_of(module), room_of(other)
    if not room:
        return not its and other not in {*FOR_EVERYONE, "fastgpt.cli"}  # nobody imports a command
    return other not in FOR_EVERYONE and its != room and its not in below(room)


def test_every_room_is_in_the_table():
    rooms = {path.parent.name for path in PACKAGE.glob("*/*.py")}
    assert rooms == set(MAY_IMPORT)
    assert not list(PACKAGE.glob("*/*/*.py")), "a room within a room"


def test_training_and_generation_are_siblings():
    assert "generation" not in below("training")
    assert "training" not in below("generation")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down_the_table(path: Path):
    module = module_of(path)
    if module == "fastgpt":
        return  # its names are lazy, and lead everywhere
    assert [other for other in imported(path.read_text(encoding="utf-8")) if wrong(module, other)] == []


def test_no_imports_go_in_a_circle():
    edges = {
        module: {name for name in imported(path.read_text(encoding="utf-8")) if name != "fastgpt"}
        for module, path in MODULES.items()
        if module != "fastgpt"
    }
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, f"a circle: {' -> '.join([*trail[trail.index(module) :], module])}"
        if module not in done:
            for other in sorted(edges.get(module, ())):
                visit(other, (*trail, module))
            done.add(module)

    for module in sorted(edges):
        visit(module, ())


def eager(source: str) -> bool:
    """Whether importing a module with this source imports more than what Python always has loaded."""
    statements = [
        statement
        for statement in ast.parse(source).body
        if not isinstance(statement, ast.FunctionDef)
        and not (isinstance(statement, ast.If) and ast.unparse(statement.test) == "TYPE_CHECKING")
    ]
    imports = [node for of in statements for node in ast.walk(of) if isinstance(node, ast.Import | ast.ImportFrom)]
    return any(ast.unparse(one) not in ("import importlib", "from typing import TYPE_CHECKING, Any") for one in imports)


def test_room_files_are_empty_or_lazy():
    """So that importing one module of a room loads no other."""
    files = PACKAGE.glob("*/__init__.py")
    assert [str(path) for path in files if eager(path.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("", False),
        ("import importlib\nif TYPE_CHECKING:\n    from fastgpt.inspection.attention import attention_maps", False),
        ("def __getattr__(name):\n    from fastgpt.inspection import attention", False),
        ("from fastgpt.inspection.attention import attention_maps", True),
        ("try:\n    import torch\nexcept ImportError:\n    torch = None", True),
        ("if not TYPE_CHECKING:\n    import torch", True),
    ],
)
def test_the_rule_finds_eager_imports(source: str, found: bool):
    assert eager(source) is found


@pytest.mark.parametrize(
    ("module", "source", "found"),
    [
        ("fastgpt.model.gpt", "from fastgpt.training import run", True),
        ("fastgpt.model.gpt", "def f():\n    import fastgpt.generation.engine", True),
        ("fastgpt.training.run", "from fastgpt.generation.load import load", True),
        ("fastgpt.training.run", "from fastgpt.system.units import counted", False),
        ("fastgpt.training.run", "from fastgpt import train", True),
        ("fastgpt.generate", "from fastgpt import train", True),
        ("fastgpt.generate", "from fastgpt import cli", False),
        ("fastgpt.system.files", "from fastgpt.cli import run", True),
        ("fastgpt.model.gpt", "from fastgpt.model.linear import Linear\nfrom fastgpt.errors import UsageError", False),
    ],
)
def test_the_rule_finds_what_breaks_it(module: str, source: str, found: bool):
    assert any(wrong(module, other) for other in imported(source)) is found
