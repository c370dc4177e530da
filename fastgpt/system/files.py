"""Writes files that are whole or absent, and identified by their hash.

Every operation that reaches the disk raises an audit event (PEP 578) first: `fastgpt.write` and `fastgpt.sync` are
raised here, `open`, `os.mkdir`, `os.rename` and `os.remove` by Python itself. Tests hook into these events to kill the
process, or to fill the disk, at any operation.
"""

import errno
import hashlib
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypedDict

from fastgpt.errors import UsageError
from fastgpt.system import text_encoding

TEMPORARY = ".fastgpt-tmp-"
ASIDE, DOOMED = "aside-", "doomed-"  # follow TEMPORARY in names of folders that are to be deleted
BLOCK = 8 << 20  # bytes that are written at once, while they are hashed
SMALL = 1 << 18  # bytes below which parts are joined
Block = bytes | memoryview


class Identity(TypedDict):
    """Identifies a file by its size in bytes and its hash in hexadecimal."""

    size: int
    sha256: str


def regular(path: Path) -> Path:
    """The same path. Raises `OSError` for a pipe or a device, whose content might never end."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise OSError(errno.EINVAL, f"{path.name} is no regular file")
    return path


def stamp(path: Path) -> tuple[int, int, int]:
    """Numbers that change when the file is replaced or written. Raises `OSError`."""
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def absolute(path: Path) -> str:
    """The absolute path. Links stay, unless the path holds `..`, which after a link leads elsewhere."""
    return str(path.resolve() if ".." in path.parts else path.absolute())


@contextmanager
def parents_of(path: Path) -> Iterator[None]:
    """Make the folders above a path. If the block raises, those that were made here and are empty are removed.

    Raises:
        OSError: they cannot be made.
    """
    missing = [folder for folder in path.parents if not folder.exists()]
    try:
        for folder in reversed(missing):
            folder.mkdir(exist_ok=True)
        yield
    except BaseException:
        for folder in missing:
            with suppress(OSError):  # something was put there
                folder.rmdir()
        raise


def temporary_sibling(path: Path, purpose: str = "") -> Path:
    """A name in the same folder, for a file that is renamed to `path` once it is complete."""
    return path.with_name(f"{TEMPORARY}{purpose}{path.name}-{os.getpid()}")


def write(path: Path, parts: Iterable[Block]) -> Identity:
    """Write a file and sync it; its identity, hashed in a second thread while the first one writes."""
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as file, ThreadPoolExecutor(1) as hasher:
        for block in _blocks(parts):
            hashing = hasher.submit(digest.update, block)
            sys.audit("fastgpt.write", str(path), len(block))
            file.write(block)
            hashing.result()
            size += len(block)
    sync(path)
    return {"size": size, "sha256": digest.hexdigest()}


def write_atomic(path: Path, content: bytes | str) -> Identity:
    """Write a file to a synced temporary sibling and rename that, so that `path` is never half written."""
    temporary = temporary_sibling(path)
    identity = write(temporary, [content.encode("utf-8") if isinstance(content, str) else content])
    temporary.replace(path)
    sync(path.parent)
    return identity


def replace_folder(temporary: Path, path: Path) -> None:
    """Move a complete and synced folder to `path`, and replace a folder there.

    If the process dies in between, the old folder is left aside, and `recover` puts it back.
    """
    aside = temporary_sibling(path, ASIDE)
    if path.exists():
        path.rename(aside)
    try:
        temporary.rename(path)
    except OSError:
        if aside.exists():
            aside.rename(path)
        raise
    sync(path.parent)
    shutil.rmtree(aside, ignore_errors=True)


def delete_folder(path: Path) -> None:
    """Delete a folder. If the process dies meanwhile, no half of it is left under its name."""
    doomed = temporary_sibling(path, DOOMED)
    path.rename(doomed)
    doomed.unlink() if doomed.is_symlink() else shutil.rmtree(doomed)


def recover(parent: Path, only: str | None = None) -> None:
    """Clean up after a process that died while it wrote to a folder. No other process may be writing there.

    Folders that were put aside are put back, unless they were replaced. All other temporary files and folders are
    deleted if possible.

    Args:
        only: the name of a file or folder in `parent`; what belongs to others is left alone.
    """
    for path in sorted(parent.glob(f"{TEMPORARY}*")):
        name = path.name.removeprefix(TEMPORARY)
        original = parent / name.removeprefix(ASIDE).rpartition("-")[0]
        if only not in (None, original.name):
            continue
        if name.startswith(ASIDE) and path.is_dir() and not original.exists():
            path.rename(original)
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink()


def sha256(*paths: Path) -> str:
    """The hash of files, one after another, in hexadecimal."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Force a file, or the entries of a folder, to the disk."""
    if path.is_dir():
        if os.name == "nt":
            return  # Windows cannot sync folders
        descriptor = os.open(path, os.O_RDONLY)
    else:
        descriptor = os.open(path, os.O_RDWR)  # Windows syncs only files that are open for writing
    try:
        sys.audit("fastgpt.sync", str(path))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def decode_utf8(content: bytes, name: str) -> str:
    """The text of a file called `name`, without a byte order mark. Raises `UsageError` if it is not UTF-8."""
    try:
        return text_encoding.without_bom(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        where = f"byte {error.start} is 0x{content[error.start]:02x}"
        raise UsageError(f"{name} is not UTF-8: {where}; {text_encoding.advice(content)}") from None


def _blocks(parts: Iterable[Block]) -> Iterator[Block]:
    """The same bytes in blocks: small parts joined, large ones cut."""
    small = bytearray()
    for part in parts:
        if len(part) < SMALL:
            small += part
        if small and (len(part) >= SMALL or len(small) >= SMALL):
            yield bytes(small)
            small.clear()
        if len(part) >= SMALL:
            for start in range(0, len(part), BLOCK):
                yield part[start : start + BLOCK]
    if small:
        yield bytes(small)
