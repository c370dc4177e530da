"""Stopping without losing anything: a signal is noted, and the loop stops where it can save."""

import signal
import sys
from types import FrameType


class Signals:
    """Between `with` and its end, SIGINT and SIGTERM are noted, to stop after the step; a second one stops at once."""

    def __init__(self):
        self.caught: int | None = None

    def __enter__(self) -> "Signals":
        self.previous = {}
        for number in (signal.SIGINT, signal.SIGTERM):
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
        print("\nstopping after this step, then saving; once more stops at once", file=sys.stderr)
