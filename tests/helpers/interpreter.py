"""Makes Triton's interpreter a quarter faster, in which the kernels' tests spend their time.

The interpreter replaces the functions of `triton.language` when a kernel starts, and puts the originals back when it
ends. In between it searches all of the language again in each call of a device function, and finds nothing to replace.
Checked with Triton 3.6, 3.7 and 3.9.
"""

from collections.abc import Callable
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


class ReplaceOnce:
    """The interpreter's `_patch_lang`, which does nothing where the language is replaced already."""

    def __init__(self, replace: Callable[..., Any]):
        self.replace = replace

    def __call__(self, function: Any) -> Any:
        modules = [value for value in function.__globals__.values() if value is tl or value is tl.core]
        if modules and not any(tl.core.is_builtin(module.load) for module in modules):
            return interpreter._LangPatchScope()  # with nothing to put back
        return self.replace(function)


def replace_once() -> None:
    """Change the interpreter of this process, unless this version of Triton has another."""
    if hasattr(interpreter, "_patch_lang"):
        interpreter._patch_lang = ReplaceOnce(interpreter._patch_lang)
