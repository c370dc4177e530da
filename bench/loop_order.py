"""Causal attention with its two loops in the other order: first over the keys that are seen whole, then the diagonal.

The kernels go over the diagonal first, because NVIDIA's compiler then overlaps matrix products (wgmma) on Hopper, and
otherwise waits after each. This shows what that is worth, from the kernels' own source with the order changed in the
forward pass and in that of dq; dk and dv stay as they are.
"""

import functools
import importlib.util
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

DIAGONAL_FIRST, DIAGONAL_LAST = "in tl.static_range(1, -1, -1):", "in tl.static_range(2):"
OPERATIONS = ("fastgpt::", "torch.ops.fastgpt.")  # which the changed ones must not replace


@functools.cache
def diagonal_last() -> Callable[..., torch.Tensor]:
    """`attention.causal_attention` in the other order. Raises `RuntimeError` where the source is not as expected."""
    from fastgpt_kernels import attention, attention_backward  # imports triton

    folder = Path(tempfile.mkdtemp(prefix="fastgpt-"))  # Triton reads the sources again
    _load(attention_backward, folder)  # registers the operation that the changed forward pass calls
    return _load(attention, folder).causal_attention


def _load(original: ModuleType, folder: Path) -> Any:
    """A module of the changed source."""
    path = folder / f"{original.__name__.rpartition('.')[2]}_diagonal_last.py"
    path.write_text(changed(Path(original.__file__ or "").read_text(encoding="utf-8")), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def changed(source: str) -> str:
    """The source of a pass with its loop over the keys in the other order, and operations of its own."""
    before, own, after = source.partition("def _accumulate_dk_dv(")
    if before.count(DIAGONAL_FIRST) != 1:
        raise RuntimeError(f"the source has not one loop {DIAGONAL_FIRST!r} before dk and dv")
    source = before.replace(DIAGONAL_FIRST, DIAGONAL_LAST) + own + after
    for name in OPERATIONS:
        source = source.replace(name, name.replace("fastgpt", "fastgpt_diagonal_last"))
    return source
