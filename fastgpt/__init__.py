"""fastgpt: train and run GPT models.

    import fastgpt
    print(fastgpt.load("out").generate("The with statement"))

The names below are imported when first used, so that `import fastgpt` costs nothing.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "load": "fastgpt.generate",
    "TextGenerator": "fastgpt.generate",
    "GPT": "fastgpt.model",
    "ModelConfig": "fastgpt.config",
    "PRESETS": "fastgpt.config",
    "TrainConfig": "fastgpt.config",
    "UsageError": "fastgpt.errors",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fastgpt' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
