"""Hidden folders to write in. Where a process died in one, the next process deletes it."""

import secrets
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from fastgpt.system import lock

SUFFIX, LOCK = ".scratch", ".lock"


@contextmanager
def scratch_folder(target: Path) -> Iterator[Path]:
    """A new folder beside `target`, to be renamed to it or deleted at the end of the block.

    What begins with its name belongs to it. A lock beside it tells others that its process lives.

    Raises:
        OSError: it cannot be made.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for path in target.parent.glob(f".*{SUFFIX}{LOCK}"):
        _delete_if_left(path)
    with ExitStack() as stack:
        while True:
            folder = target.with_name(f".{target.name}.{secrets.token_hex(4)}{SUFFIX}")
            stack.callback(_delete, folder)
            try:
                stack.enter_context(lock.held(folder.with_name(folder.name + LOCK)))
                break
            except lock.Locked:  # by a process that looked for leftovers before this one had its new lock
                continue
        folder.mkdir()
        yield folder


def _delete_if_left(path: Path) -> None:
    """Delete a folder whose lock this is, unless somebody holds it."""
    try:
        with lock.held(path, make=False):  # made anew, it could be the one that its owner is about to make
            _delete(path.with_name(path.name.removesuffix(LOCK)))
    except (lock.Locked, OSError):  # in use, or somebody else's
        return


def _delete(folder: Path) -> None:
    """Delete a folder and all that begins with its name; its lock last, which tells of the rest."""
    for path in sorted(folder.parent.iterdir(), key=lambda path: path.name.endswith(LOCK)):
        if path.name.startswith(folder.name):
            path.unlink(missing_ok=True) if path.is_file() else shutil.rmtree(path, ignore_errors=True)
