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
from typing import Any

import torch

DIAGONAL_FIRST, DIAGONAL_LAST = "in tl.static_range(1, -1, -1):", "in tl.static_range(2):"
OPERATIONS = ("fastgpt::", "torch.ops.fastgpt.")  # which the changed ones must not replace


@functools.cache
def diagonal_last() -> Callable[..., torch.Tensor]:
    """`attention.causal_attention` in the other order. Raises `RuntimeError` where the source is not as expected."""
    from fastgpt_kernels import attention  # imports triton

    source = changed(Path(attention.__file__).read_text(encoding="utf-8"))
    path = Path(tempfile.mkdtemp(prefix="fastgpt-")) / "attention_diagonal_last.py"  # Triton reads it again
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module.causal_attention


def changed(source: str) -> str:
    """The source with both loops in the other order, and operations of its own."""
    before, own, after = source.partition("def _accumulate_dk_dv(")
    if before.count(DIAGONAL_FIRST) != 2 or not own:
        raise RuntimeError(f"attention.py has not two loops {DIAGONAL_FIRST!r} before dk and dv")
    source = before.replace(DIAGONAL_FIRST, DIAGONAL_LAST) + own + after
    for name in OPERATIONS:
        source = source.replace(name, name.replace("fastgpt", "fastgpt_diagonal_last"))
    return source
