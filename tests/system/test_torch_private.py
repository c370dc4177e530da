"""PyTorch's private names are used in one file of each package, where each says why there is no public one."""

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastgpt.system import torch_private
from fastgpt_kernels import torch_private as kernels_private
from tests.helpers.places import ROOT

PACKAGES = (ROOT / "fastgpt", ROOT / "kernels" / "fastgpt_kernels")
HOMES = {Path(inspect.getfile(module)) for module in (torch_private, kernels_private)}
FILES = sorted(path for package in PACKAGES for path in package.rglob("*.py") if path not in HOMES)
KEYS = (torch_private.GROWTH_TRACKER,)  # private names that are strings


def is_private(dotted: str) -> bool:
    parts = dotted.split(".")
    return parts[0] == "torch" and any(part.startswith("_") and not part.startswith("__") for part in parts)


def private_names(source: str) -> Iterator[str]:
    """The private names of PyTorch that a source imports, or reads from a module of PyTorch."""
    tree = ast.parse(source)
    modules = {"torch": "torch"}  # what a name of this source stands for
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.asname: alias.name for alias in node.names if alias.asname}
            yield from filter(is_private, (alias.name for alias in node.names))
        elif isinstance(node, ast.ImportFrom):
            modules |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            yield from filter(is_private, (f"{node.module}.{alias.name}" for alias in node.names))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_"):
            name, _, rest = ast.unparse(node).partition(".")
            yield from filter(is_private, [f"{modules.get(name, name)}.{rest}"])
        elif isinstance(node, ast.Constant) and node.value in KEYS:
            yield str(node.value)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_private_names_of_pytorch_are_used_in_their_own_file_only(path: Path):
    assert list(private_names(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize("module", [torch_private, kernels_private])
def test_each_says_why_there_is_no_public_name(module):
    functions = [function for _, function in inspect.getmembers(module, inspect.isfunction)]
    assert [f.__name__ for f in functions if "No public name: " not in (f.__doc__ or "")] == []
    assert list(private_names(inspect.getsource(module)))


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import torch._dynamo.config as dynamo", ["torch._dynamo.config"]),
        ("def f():\n    from torch._inductor import exc", ["torch._inductor.exc"]),
        ("from torch.fx.experimental import _config", ["torch.fx.experimental._config"]),
        ("import torch\ntorch._C._cuda_releasePool(0, pool)", ["torch._C._cuda_releasePool", "torch._C"]),
        ("import torch\ntorch.ops.aten._softmax(x, 0, False)", ["torch.ops.aten._softmax"]),
        ("from torch import cuda\ncuda._sleep(1)", ["torch.cuda._sleep"]),
        ("import torch.nn.functional as F\nF._in_projection(q)", ["torch.nn.functional._in_projection"]),
        ("state['_growth_tracker']", ["_growth_tracker"]),
        ("import torch\ntorch.__version__, torch.nn.Module.__init__, torch.Tensor.add_, self._loss(x)", []),
    ],
)
def test_the_rule_finds_what_breaks_it(source: str, found: list[str]):
    assert list(private_names(source)) == found
