"""Makes hidden folders to write in. If a process dies, the next one deletes its folder."""

import secrets
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from fastgpt.system import lock
from fastgpt.system.files import parents_of

SUFFIX, LOCK = ".scratch", ".lock"


@contextmanager
def scratch_folder(target: Path) -> Iterator[Path]:
    """A new folder beside `target`. At the end of the block it is deleted, unless it was renamed to `target`.

    If the block raises, the folders above it that were made for it are removed too.

    Files and folders whose names begin with its name belong to it. A lock beside it shows that its process is alive.

    Raises:
        OSError: it cannot be made.
    """
    with parents_of(target), ExitStack() as stack:
        for path in target.parent.glob(f".*{SUFFIX}{LOCK}"):
            _delete_if_left(path)
        while True:
            folder = target.with_name(f".{target.name}.{secrets.token_hex(4)}{SUFFIX}")
            stack.callback(_delete, folder)
            try:
                stack.enter_context(lock.held(folder.with_name(folder.name + LOCK)))
                break
            except lock.Locked:  # another process tries whether this new lock is a leftover
                continue
        folder.mkdir()
        yield folder


def _delete_if_left(path: Path) -> None:
    """Delete the folder of a lock, unless a process holds the lock."""
    try:
        with lock.held(path, make=False):  # its owner may be about to make it
            _delete(path.with_name(path.name.removesuffix(LOCK)))
    except (lock.Locked, OSError):  # in use, or of another user
        return


def _delete(folder: Path) -> None:
    """Delete a folder and all whose names begin with its name; the lock last, which leads to the others."""
    for path in sorted(folder.parent.iterdir(), key=lambda path: path.name.endswith(LOCK)):
        if path.name.startswith(folder.name):
            path.unlink(missing_ok=True) if path.is_file() else shutil.rmtree(path, ignore_errors=True)
