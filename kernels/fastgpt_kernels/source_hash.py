"""A hash of the code that a function depends on, in this package: what it calls, what that calls, and so on.

    source_hash("aot", "_norm_launches")

It is made from syntax trees, so comments, docstrings and formatting do not count. A definition depends on the global
names in it that its module defines or imports from this package, and on each `module.name`. Other packages are known by
their versions.
"""

import ast
import functools
import hashlib
import symtable
from collections.abc import Collection, Iterator
from pathlib import Path

PACKAGE = "fastgpt_kernels"
HERE = Path(__file__).parent
Name = tuple[str, str]  # a module of this package, and a name that it defines


class Module:
    """A file's top-level definitions, by name, and what it imports from this package."""

    def __init__(self, file: Path) -> None:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        self.definitions: dict[str, list[ast.stmt]] = {}
        for statement in tree.body:
            for name in _defined(statement):
                self.definitions.setdefault(name, []).append(statement)
        self.modules: dict[str, str] = {}  # the name here -> the module
        self.names: dict[str, Name] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module == PACKAGE:
                self.modules |= {alias.asname or alias.name: alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{PACKAGE}."):
                module = str(node.module).removeprefix(f"{PACKAGE}.")
                self.names |= {alias.asname or alias.name: (module, alias.name) for alias in node.names}


def _defined(statement: ast.stmt) -> Iterator[str]:
    """The names that a top-level statement defines or changes."""
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        yield statement.name
        return
    targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
    for target in filter(None, targets):
        yield from (node.id for node in ast.walk(target) if isinstance(node, ast.Name))
    for part in ast.iter_child_nodes(statement):
        if isinstance(part, ast.stmt):  # of an if, a with, a loop
            yield from _defined(part)


def _globals(scope: symtable.SymbolTable) -> Iterator[str]:
    """The global names that a piece of code reads, also in functions within it."""
    at_top = scope.get_type() == "module"
    yield from (one.get_name() for one in scope.get_symbols() if one.is_global() or (at_top and one.is_referenced()))
    for inner in scope.get_children():
        yield from _globals(inner)


@functools.cache
def _module(file: Path) -> Module:
    return Module(file)


@functools.cache
def _uses(file: Path, name: str) -> set[Name]:
    """The names that a definition of a file depends on directly."""
    module = _module(file)
    found = {module.names[name]} if name in module.names else set()
    for statement in module.definitions.get(name, []):
        read = set(_globals(symtable.symtable(ast.unparse(statement), file.name, "exec")))
        found |= {(file.stem, one) for one in read & (module.definitions.keys() | module.names.keys())}
        for node in ast.walk(statement):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                found |= {(module.modules[one], node.attr) for one in {node.value.id} & read & module.modules.keys()}
    return found


@functools.cache
def _code(file: Path, name: str) -> str:
    """A definition of a file, without what does not count."""
    return repr([_structure(statement) for statement in _module(file).definitions.get(name, [])])


def dependencies(module: str, name: str, leaves: Collection[Name] = (), folder: Path = HERE) -> set[Name]:
    """A definition and all that it depends on, but for `leaves`. Raises `LookupError` for one that does not exist."""
    if name not in _module(folder / f"{module}.py").definitions:
        raise LookupError(f"{module}.py defines no {name}")
    found, left = set(), [(module, name)]
    while left:
        if (one := left.pop()) not in found and one not in leaves:
            found.add(one)
            left += _uses(folder / f"{one[0]}.py", one[1])
    return found


def source_hash(module: str, name: str, leaves: Collection[Name] = (), folder: Path = HERE) -> str:
    """12 hexadecimal digits that change with the code of any of `dependencies`."""
    digest = hashlib.sha256()
    for one in sorted(dependencies(module, name, leaves, folder)):
        digest.update(f"{one} {_code(folder / f'{one[0]}.py', one[1])}".encode())
    return digest.hexdigest()[:12]


def _structure(node: object) -> object:
    """A syntax tree in plain tuples, without docstrings, and without what is empty, which Python's versions add to."""
    if isinstance(node, list):
        return tuple(map(_structure, node))
    if not isinstance(node, ast.AST):
        return node
    fields = dict(ast.iter_fields(node))
    if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node, clean=False) is not None:
        fields["body"] = node.body[1:]
    kept = {name: value for name, value in fields.items() if value not in (None, [])}
    return type(node).__name__, *((name, _structure(value)) for name, value in kept.items())
