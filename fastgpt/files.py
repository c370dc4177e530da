"""Files that are whole or absent, and known by their hash."""

import hashlib
import os
from pathlib import Path

from fastgpt.errors import UsageError

TEMPORARY = ".tmp-"


def temporary_sibling(path: Path) -> Path:
    """A name in the same folder, for what is renamed to `path` once it is whole."""
    return path.with_name(f"{TEMPORARY}{path.name}-{os.getpid()}")


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write a file by way of a synced temporary sibling, so that `path` is never half written."""
    temporary = temporary_sibling(path)
    temporary.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    sync(temporary)
    temporary.replace(path)
    sync(path.parent)


def sha256(*paths: Path) -> str:
    """The hash of files laid end to end, in hexadecimal."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Force a file, or a folder's entries, to the disk."""
    if path.is_dir():
        if os.name == "nt":
            return  # Windows syncs no folders
        descriptor = os.open(path, os.O_RDONLY)
    else:
        descriptor = os.open(path, os.O_RDWR)  # Windows syncs only what is open for writing
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def decode_utf8(content: bytes, name: str) -> str:
    """The text of a file called `name`. Raises `UsageError` for what is not UTF-8."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{name} is not UTF-8: byte {error.start} is 0x{content[error.start]:02x}") from None
