"""Makes Triton's interpreter twice as fast, in which the kernels' tests spend their time.

Four of its habits cost more than the numbers. In each call of a device function it searches all of the language for
functions to replace, and finds nothing. It computes with ten operations whether one overflows, and then tells nobody.
It builds a table of NumPy's types for each look-up in it. It checks the same few shapes again and again. The results
keep their bits, and an overflow fails. Checked with Triton 3.6, 3.7 and 3.9.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

EXACT = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


class ReplaceOnce:
    """The interpreter's `_patch_lang`, which does nothing where the language is replaced already.

    The interpreter replaces the functions of `triton.language` when a kernel starts, and puts them back when it ends.
    """

    def __init__(self, replace: Callable[..., Any]):
        self.replace = replace

    def __call__(self, function: Any) -> Any:
        modules = [value for value in function.__globals__.values() if value is tl or value is tl.core]
        if modules and not any(tl.core.is_builtin(module.load) for module in modules):
            return interpreter._LangPatchScope()  # with nothing to put back
        return self.replace(function)


def check_overflow(self: TritonSemantic, left: tl.tensor, right: tl.tensor, operation: Callable[..., Any]) -> None:
    """The semantic's `binary_op_sanitize_overflow_impl`, which fails where a number leaves a type of less than 64 bits.

    Triton's own asserts only in a kernel that is launched for debugging.
    """
    scalar = left.type.scalar
    if scalar.int_bitwidth >= 64:
        return
    exact = EXACT[operation.__name__](left.handle.data, right.handle.data, dtype=np.int64)
    fits = exact.min() >= scalar.get_int_min_value() and exact.max() <= scalar.get_int_max_value()
    assert fits, f"int{scalar.int_bitwidth} overflow detected for operation {operation.__name__}"


class NumpyTypes:
    """The interpreter's `_get_np_dtype`, which remembers its answers."""

    def __init__(self, find: Callable[[tl.dtype], np.dtype]):
        self.find = find
        self.known: dict[str, np.dtype] = {}

    def __call__(self, dtype: tl.dtype) -> np.dtype:
        name = dtype.scalar.name
        if name not in self.known:
            self.known[name] = self.find(dtype)
        return self.known[name]


def remember_shapes(build: Callable[..., None]) -> Callable[..., None]:
    """The start of a `block_type`, which checks each shape once."""
    known: dict[tuple[int, ...], tuple[Any, int, str]] = {}

    def start(self: tl.block_type, element_ty: tl.dtype, shape: Sequence[Any] | tl.tuple) -> None:
        sizes = tuple(size.value if isinstance(size, tl.constexpr) else size for size in shape)
        if sizes not in known:
            build(self, element_ty, shape)
            known[sizes] = self.shape, self.numel, str(self.shape)
        self.element_ty = element_ty
        self.shape, self.numel, text = known[sizes]
        self.name = f"<{text}, {element_ty}>"

    return start


MAKERS: list[tuple[Any, str, Callable[[Any], Any]]] = [
    (interpreter, "_patch_lang", ReplaceOnce),
    (interpreter, "_get_np_dtype", NumpyTypes),
    (TritonSemantic, "binary_op_sanitize_overflow_impl", lambda theirs: check_overflow),
    (tl.block_type, "__init__", remember_shapes),
]
# Where each function lies, its name, Triton's own and ours: what this version of Triton has of them.
CHANGES = [
    (place, name, theirs, make(theirs)) for place, name, make in MAKERS if (theirs := getattr(place, name, None))
]


def make_quick() -> None:
    """Change the interpreter of this process."""
    for place, name, _, ours in CHANGES:
        setattr(place, name, ours)
