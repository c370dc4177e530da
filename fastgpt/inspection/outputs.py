"""Checks, before long work, that files can be written, and writes them in one step."""

import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fastgpt.errors import UsageError
from fastgpt.system.files import temporary_sibling, write
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
    with _explained(setting, path), tempfile.TemporaryFile(dir=path.parent):
        pass  # permissions do not tell that a disk is read-only
    return path


def save(setting: str, path: Path, parts: Iterable[bytes], *, beside: bool = False) -> None:
    """Write a file in one step, and say so: on stdout, or on stderr if the file is `beside` what stdout shows.

    Raises:
        UsageError: it cannot be written; the setting is named.
    """
    temporary = temporary_sibling(path)
    try:
        with _explained(setting, path):
            size = write(temporary, parts)["size"]
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    print(f"wrote {path}: {format_bytes(size)}", file=sys.stderr if beside else sys.stdout)


@contextmanager
def _explained(setting: str, path: Path) -> Iterator[None]:
    """Turn an `OSError` within the block into a `UsageError` that names the setting."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"`{setting}` {path} cannot be written: {error.strerror or error}; name another") from None
