"""Locks on files. The system frees a lock when its process ends, however it ends.

The file holds the owner's process number, which the message of a refused lock names. The filelock library (seen: 4.3)
does not replace this module: its lock names no owner, always makes the file, which `check` must not, and cannot lock a
file that is already open, as `claim` does.
"""

import errno
import os
import re
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

PATIENCE_SECONDS = 2.0  # for a new owner to write its number


class Locked(Exception):
    """Another process holds the lock; `owner` is its process number, as text, or "unknown"."""

    def __init__(self, owner: str):
        super().__init__(f"locked by process {owner}")
        self.owner = owner


@contextmanager
def held(path: Path, *, make: bool = True) -> Iterator[None]:
    """Lock the file `path` until the end of the block, and write this process's number to it.

    Args:
        make: make the file if it is missing.

    Raises:
        Locked: another process holds it.
        OSError: the file cannot be made or written.
    """
    with _opened(path, "a+" if make else "r+") as file:
        file.truncate(0)
        file.seek(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def check(path: Path) -> None:
    """Raise `Locked` if another process holds the lock. Makes and changes nothing."""
    if path.is_file():
        with open(path, "r+", encoding="utf-8", opener=_open_regular) as file:
            _take_or_name_owner(file)


def claim(descriptor: int) -> bool:
    """Lock an open file until it is closed. False if another process holds it; True also if its disk has no locks."""
    with open(descriptor, "rb", buffering=0, closefd=False) as file:
        try:
            return _take(file)
        except OSError:
            return True


@contextmanager
def _opened(path: Path, mode: str) -> Iterator[IO[str]]:
    """Open and lock the file `path`. If its owner deleted it between the two, try again with the new file."""
    while True:
        with open(path, mode, encoding="utf-8", opener=_open_regular) as file:
            _take_or_name_owner(file)
            if _is_still(path, file):
                yield file
                return


def _open_regular(path: str, flags: int) -> int:
    """Open a regular file. Symbolic links and pipes are refused: a link may lead to a file that must not be changed."""
    descriptor = os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0), 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, f"{Path(path).name} is no regular file")
    return descriptor


def _is_still(path: Path, file: IO[str]) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _take_or_name_owner(file: IO[str]) -> None:
    """Lock an open file, or raise `Locked` with the owner's number.

    Retries for a while, for two reasons. A new owner writes its number after it took the lock: of starts that race, the
    losers would otherwise name nobody, or the last owner. And `check` holds the lock for a moment, which must refuse
    nobody. TestNameOfTheOwner in tests/system/test_lock.py holds both.
    """
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not _take(file):
        file.seek(0)
        owner = file.read().strip()
        known = re.fullmatch(r"\d{1,18}", owner, re.ASCII) is not None and _is_alive(int(owner))
        if known or time.monotonic() > deadline:
            raise Locked(owner if known else "unknown")
        time.sleep(0.01)


def _take(file: IO) -> bool:
    """Lock an open file without waiting; False if it is locked. Raises `OSError` if the file system has no locks."""
    try:
        if os.name == "nt":
            import msvcrt

            file.seek(1 << 20)  # beyond the text, which others may read
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # pyright: ignore[reportAttributeAccessIssue]
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # Linux and macOS; Windows
        return False
    return True


def _is_alive(process: int) -> bool:
    if os.name == "nt":
        return True  # os.kill would end it
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # somebody else's
        return True
    return True
