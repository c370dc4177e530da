"""Looks at models, runs and the machine.

    from fastgpt.inspection import attention_maps
    found = attention_maps(fastgpt.load("out"), "The with statement")

The names below are imported when first used, so that importing one module of the room loads no other.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastgpt.inspection.attention import AttentionMaps, attention_maps

__all__ = ["AttentionMaps", "attention_maps"]

_HOME = dict.fromkeys(__all__, "fastgpt.inspection.attention")


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
