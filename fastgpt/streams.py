"""Standard streams that a run outlives: closed from the start, or closed by whoever watched."""

import os
import sys
from pathlib import Path
from typing import Any


class Lasting:
    """A standard stream that leads nowhere once its pipe or terminal is closed."""

    def __init__(self, stream: Any):
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> None:
        try:
            self.stream.write(text)
        except OSError:
            self._lead_nowhere()

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError:
            self._lead_nowhere()

    def _lead_nowhere(self) -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def open_missing() -> None:
    """Let the standard streams that were closed before this process began (by >&-, say) lead nowhere.

    Their numbers are taken first, or a file that is opened later would get what is meant for people.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115 - it stays open
