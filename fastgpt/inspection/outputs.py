"""Checks, before long work, that files can be written, and says what was written."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastgpt.errors import UsageError
from fastgpt.system.units import format_bytes


def check(setting: str, output: str) -> Path:
    """The path of a file that can be made or replaced. Raises `UsageError`, naming the setting, for any other."""
    path = Path(output)
    if path.is_dir():
        raise UsageError(f"`{setting}` {output} is a folder; name a file in it")
    if path.exists() and not path.is_file():
        raise UsageError(f"`{setting}` {output} is no regular file; name another")
    if not path.parent.is_dir():
        raise UsageError(f"`{setting}` {output}: there is no folder {path.parent}; make it, or name another file")
    for place in (path, path.parent):  # a file is replaced by a new one in its folder
        if place.exists() and not os.access(place, os.W_OK):
            raise UsageError(f"`{setting}` {output}: {place} cannot be written to; name another file")
    return path


@contextmanager
def explained(setting: str, path: Path) -> Iterator[None]:
    """Turn an error of writing into a `UsageError` that names the setting and the file; say what was written."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"`{setting}` {path} cannot be written: {error.strerror or error}; name another") from None
    print(f"wrote {path}: {format_bytes(path.stat().st_size)}")
