"""Stopping without losing anything: a signal is noted, and the loop stops where it can save."""

import os
import signal
from contextlib import suppress
from types import FrameType


class Signals:
    """Between `with` and its end, SIGINT, SIGTERM and SIGHUP are noted, to stop where all can be saved.

    A second signal stops at once.
    """

    def __init__(self):
        self.caught: int | None = None

    def __enter__(self) -> "Signals":
        self.previous = {}
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number is None:
                continue
            try:
                self.previous[number] = signal.signal(number, self._note)
            except ValueError:  # not in the main thread, where signals do not arrive
                break
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.caught is not None:
            raise SystemExit(128 + number)
        self.caught = number
        with suppress(OSError):  # a closed terminal, which is what SIGHUP tells
            # Not print: the signal may have come while the buffer of stderr was being written.
            os.write(2, b"\nstopping after this step, then saving; once more stops at once\n")
