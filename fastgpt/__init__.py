"""fastgpt: train and run GPT models.

    import fastgpt
    print(fastgpt.load("out").generate("The with statement"))

The names below are imported when first used, so that `import fastgpt` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastgpt.config.generation import SamplingParams
    from fastgpt.config.model import ModelConfig
    from fastgpt.config.training import PRESETS, TrainConfig
    from fastgpt.errors import CorruptCheckpoint, UsageError
    from fastgpt.fit import FitSummary, fit
    from fastgpt.generation.engine import Engine
    from fastgpt.generation.generator import TextGenerator
    from fastgpt.generation.load import load
    from fastgpt.generation.request import Completion, Piece
    from fastgpt.model.gpt import GPT

__version__ = "0.1.0"
__all__ = [
    "GPT",
    "PRESETS",
    "Completion",
    "CorruptCheckpoint",
    "Engine",
    "FitSummary",
    "ModelConfig",
    "Piece",
    "SamplingParams",
    "TextGenerator",
    "TrainConfig",
    "UsageError",
    "fit",
    "load",
]

_MODULES = {
    "fastgpt.config.generation": ("SamplingParams",),
    "fastgpt.config.model": ("ModelConfig",),
    "fastgpt.config.training": ("PRESETS", "TrainConfig"),
    "fastgpt.errors": ("CorruptCheckpoint", "UsageError"),
    "fastgpt.fit": ("FitSummary", "fit"),
    "fastgpt.generation.engine": ("Engine",),
    "fastgpt.generation.generator": ("TextGenerator",),
    "fastgpt.generation.load": ("load",),
    "fastgpt.generation.request": ("Completion", "Piece"),
    "fastgpt.model.gpt": ("GPT",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fastgpt' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
