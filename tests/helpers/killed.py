"""Kills a process, for real, before one of its steps that reach the disk."""

import itertools
import os
import signal
import sys
from collections.abc import Callable

DISK = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "fastgpt.write", "fastgpt.sync"}


def start(action: Callable[[], None]) -> int:
    """Run an action in a process of its own, whose number this is; its exit code is 0 or, where it raises, 1."""
    child = os.fork()
    if child:
        return child
    try:
        action()
        os._exit(0)
    except BaseException as error:
        os.write(2, f"{error!r}\n".encode())
    finally:
        os._exit(1)


def reaches_the_disk(event: str, _: tuple) -> bool:
    return event in DISK


def is_killed_at(
    step: int, action: Callable[[], None], counts: Callable[[str, tuple], bool] = reaches_the_disk
) -> bool:
    """Run an action in a process that kills itself before its n-th step that counts; whether it did."""
    count = itertools.count()

    def hook(event: str, arguments: tuple) -> None:
        if counts(event, arguments) and next(count) == step:
            os.kill(os.getpid(), signal.SIGKILL)

    def watched() -> None:
        sys.addaudithook(hook)
        action()

    status = os.waitstatus_to_exitcode(os.waitpid(start(watched), 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0
