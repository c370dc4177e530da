"""Standard streams that a run outlives: closed from the start, or closed by whoever watched."""

import io
import os
import sys
from pathlib import Path
from typing import Any


class Lasting:
    """A standard stream that leads nowhere once it takes no more: whoever read it left, or its disk is full."""

    def __init__(self, stream: Any):
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except OSError:
            self._lead_nowhere()
        return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError:
            self._lead_nowhere()

    def _lead_nowhere(self) -> None:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        except io.UnsupportedOperation:  # no file
            self.stream = io.StringIO()


def open_missing() -> None:
    """Let the standard streams that were closed before this process began (by >&-, say) lead nowhere.

    Their numbers are taken first, or a file that is opened later would get what is meant for people.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115 - it stays open
