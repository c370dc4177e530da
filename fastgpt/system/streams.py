"""Handles standard streams that were closed from the start, or by their reader, or lead to a full disk."""

import io
import os
import sys
from pathlib import Path
from typing import Any


class StreamLost(OSError):
    """A standard stream cannot be written to; `strerror` says why."""


class _Wrapped:
    """A stream whose failures are caught. Text that is written after a failure is dropped."""

    def __init__(self, stream: Any):
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except OSError as error:
            self._lose(error)
        return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError as error:
            self._lose(error)

    def _lose(self, error: OSError) -> None:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        except io.UnsupportedOperation:  # no file
            self.stream = io.StringIO()


class Lasting(_Wrapped):
    """A standard stream whose failure stops nothing."""


class Product(_Wrapped):
    """A stdout that takes the product of a command, so that its failure is an error. The error is raised once.

    The first call that fails raises `StreamLost`. Later calls do not, nor does Python's flush at exit.
    """

    def __init__(self, stream: Any, closed: bool = False):
        """`closed`: it was so before this process began."""
        super().__init__(stream)
        self.closed_before = closed

    def check(self) -> None:
        """Raise `StreamLost` if the stream was closed: for code that writes to its descriptor, or must know early."""
        if self.closed_before:
            self.closed_before = False
            raise StreamLost(0, "it is closed")

    def write(self, text: str) -> int:
        if text:
            self.check()
        return super().write(text)

    def _lose(self, error: OSError) -> None:
        super()._lose(error)
        raise StreamLost(error.errno, error.strerror or str(error)) from None


def open_missing() -> set[str]:
    """Open the null device for standard streams that were closed before this process began, as by >&-; their names.

    Their numbers must be taken, or a file that is opened later would get one, and with it the text for that stream.
    """
    missing = set()
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free
            missing.add(name)
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115 - it stays open
    return missing
