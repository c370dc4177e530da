"""The hash of the code that a function depends on: what changes it, and what does not."""

from pathlib import Path

import pytest

from fastgpt_kernels.source_hash import HERE, dependencies, source_hash

KERNELS = '''"""What the module offers."""
import math
from fastgpt_kernels import helpers
from fastgpt_kernels.numbers import FACTOR, OTHER as another

BLOCK = 64
UNUSED = 1
if math.pi > 3:
    SIDE = 2


def decorate(function):
    return function


class Launch:
    """A launch."""

    def __call__(self):
        return BLOCK


@decorate
def kernel(x, unused: int = SIDE):
    """Computes."""
    tiles = [helpers.tile(x) for another in range(FACTOR)]  # a local name
    return Launch(), tiles, math.sqrt(x)


def alone(UNUSED):
    return UNUSED


def recursive():
    return (lambda: recursive())() + another
'''
FILES = {
    "kernels": KERNELS,
    "numbers": "FACTOR = 3\nOTHER = 4\nLATER = 5\n",
    "helpers": "from fastgpt_kernels.numbers import LATER\ndef tile(x): return x + LATER\ndef other(x): return x\n",
}


def folder(path: Path, **changed: str) -> Path:
    path.mkdir()
    for name, text in (FILES | changed).items():
        (path / f"{name}.py").write_text(text, encoding="utf-8")
    return path


def test_what_a_function_depends_on(tmp_path):
    files = folder(tmp_path / "a")
    assert dependencies("kernels", "kernel", folder=files) == {
        *(("kernels", name) for name in ("kernel", "decorate", "SIDE", "Launch", "BLOCK", "FACTOR")),
        *(("numbers", "FACTOR"), ("numbers", "LATER"), ("helpers", "tile"), ("helpers", "LATER")),
    }
    assert dependencies("kernels", "alone", folder=files) == {("kernels", "alone")}
    assert dependencies("kernels", "recursive", folder=files) == {
        *(("kernels", "recursive"), ("kernels", "another"), ("numbers", "OTHER")),
    }
    left_out = dependencies("kernels", "kernel", {("helpers", "tile"), ("kernels", "Launch")}, files)
    assert left_out == {
        *(("kernels", name) for name in ("kernel", "decorate", "SIDE", "FACTOR")),
        ("numbers", "FACTOR"),
    }
    with pytest.raises(LookupError, match=r"kernels\.py defines no gone"):
        dependencies("kernels", "gone", folder=files)


@pytest.mark.parametrize(
    ("name", "old", "new", "same"),
    [
        ("kernels", "  # a local name", "", True),
        ("kernels", '"""Computes."""', '"""Computes something."""', True),
        ("kernels", '    """Computes."""\n', "", True),
        ("kernels", "def kernel(x, unused: int = SIDE):", "def kernel(\n    x,\n    unused: int = SIDE,\n):", True),
        ("kernels", "UNUSED = 1", "UNUSED = 2", True),
        ("kernels", "return UNUSED", "return 2 * UNUSED", True),
        ("numbers", "OTHER = 4", "OTHER = 5", True),  # `another` is a local name in `kernel`
        ("helpers", "def other(x): return x", "", True),
        ("kernels", "BLOCK = 64", "BLOCK = 65", False),
        ("kernels", "BLOCK = 64", "BLOCK = 64.0", False),
        ("kernels", "    SIDE = 2", "    SIDE = 3", False),
        ("kernels", "math.pi > 3", "math.pi > 4", False),
        ("kernels", "@decorate\n", "", False),
        ("kernels", "unused: int", "unused: float", False),  # Triton reads tl.constexpr there
        ("kernels", "math.sqrt", "math.exp", False),
        ("kernels", "UNUSED = 1", "BLOCK += 1", False),
        ("numbers", "FACTOR = 3", "FACTOR = 4", False),
        ("numbers", "LATER = 5", "LATER = 6", False),
        ("helpers", "return x + LATER", "return x - LATER", False),
    ],
)
def test_what_changes_the_hash(tmp_path, name, old, new, same):
    changed = FILES[name].replace(old, new)
    assert changed != FILES[name]
    before = source_hash("kernels", "kernel", folder=folder(tmp_path / "a"))
    assert len(before) == 12
    assert (source_hash("kernels", "kernel", folder=folder(tmp_path / "b", **{name: changed})) == before) is same


def test_kernels_depend_on_their_own_code_alone():
    for function, modules in {
        "_norm_launches": {"norm", "norm_backward"},
        "_rms_norm_launches": {"norm", "norm_backward"},
        "_swiglu_launches": {"activation"},
        "_attention_launches": {"attention", "attention_backward", "attention_tiles", "dropout"},
        "_cross_entropy_launches": {"cross_entropy"},
        "_grouped_launches": {"paged_decode", "paged_prefill", "attention_tiles"},
    }.items():
        found = dependencies("aot", function, {("launch", "TABLE")})
        assert {module for module, _ in found} == {"aot", "launch"} | modules
        assert ("launch", "Config") in found  # what every kernel is compiled with
        assert ("launch", "read_table") not in found
    attention = {name for module, name in dependencies("aot", "_grouped_launches") if module == "attention_tiles"}
    assert attention == {"LOG2_E"}
    assert ("launch", "read_table") in dependencies("aot", "_norm_launches")
    assert (HERE / "launch.py").is_file()
