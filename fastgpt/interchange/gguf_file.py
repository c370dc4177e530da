from pathlib import Path

from fastgpt.interchange.foreign import ForeignModel


def load(path: Path) -> ForeignModel:
    raise NotImplementedError
