"""fastgpt: train and run GPT models.

    import fastgpt
    print(fastgpt.load("out").generate("The with statement"))

The names below are imported when first used, so that `import fastgpt` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastgpt.completion import Completion, Piece
    from fastgpt.config import PRESETS, ModelConfig, SamplingParams, TrainConfig
    from fastgpt.engine import Engine
    from fastgpt.errors import CorruptCheckpoint, UsageError
    from fastgpt.generate import TextGenerator, load
    from fastgpt.model import GPT

__version__ = "0.1.0"
__all__ = [
    "GPT",
    "PRESETS",
    "Completion",
    "CorruptCheckpoint",
    "Engine",
    "ModelConfig",
    "Piece",
    "SamplingParams",
    "TextGenerator",
    "TrainConfig",
    "UsageError",
    "load",
]

_MODULES = {
    "fastgpt.config": ("PRESETS", "ModelConfig", "SamplingParams", "TrainConfig"),
    "fastgpt.completion": ("Completion", "Piece"),
    "fastgpt.engine": ("Engine",),
    "fastgpt.errors": ("CorruptCheckpoint", "UsageError"),
    "fastgpt.generate": ("TextGenerator", "load"),
    "fastgpt.model": ("GPT",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fastgpt' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
