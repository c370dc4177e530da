"""Notes signals, so that a loop can stop or save at a point where nothing is lost."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

STOPPING = ("SIGINT", "SIGTERM", "SIGHUP")
SAVING = "SIGUSR1"


class Signals:
    """Within its `with` block, notes signals: SIGINT, SIGTERM and SIGHUP to stop, SIGUSR1 to save and go on.

    A second signal to stop stops at once, and so does the first while there is nothing to save. A signal that was
    ignored before, as SIGHUP is under nohup, stays ignored.

    Attributes:
        caught: the number of the signal to stop, or None.
        save_asked: a checkpoint is wanted; the code that saves sets it back.
        patient: whether there is something to save.
    """

    def __init__(self, patient: bool = True):
        self.caught: int | None = None
        self.save_asked, self.patient = False, patient

    def __enter__(self) -> "Signals":
        self.previous = {}
        for name, handler in [*((name, self._stop) for name in STOPPING), (SAVING, self._save)]:
            number = getattr(signal, name, None)  # Windows has neither SIGHUP nor SIGUSR1
            if number is None or (name in STOPPING and signal.getsignal(number) is signal.SIG_IGN):
                continue
            try:
                self.previous[number] = signal.signal(number, handler)
            except ValueError:  # not in the main thread, where signals do not arrive
                break
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if not self.patient and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.patient or self.caught is not None:
            raise SystemExit(128 + number)
        self.caught = number
        _say("saving, then stopping; once more stops at once")

    def _save(self, number: int, frame: FrameType | None) -> None:
        self.save_asked = True
        _say("saving, then going on")


@contextmanager
def noted(*names: str, notice: str | None = None) -> Iterator[list[int]]:
    """Collects the numbers of signals, so that the block can act on them where nothing is left half done.

    `notice`: printed at the first signal; a second signal then stops at once, as with `Signals`.
    """
    caught: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if notice is not None and caught:
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        caught.append(number)
        if notice is not None:
            _say(notice)

    before = {}
    for name in names:
        number = getattr(signal, name, None)
        if number is None or signal.getsignal(number) is signal.SIG_IGN:
            continue
        with suppress(ValueError):  # not in the main thread, where signals do not arrive
            before[number] = signal.signal(number, note)
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ignore_saving() -> None:
    """Ignore SIGUSR1 from now on: while no run listens to it, it would kill the process."""
    if hasattr(signal, SAVING):
        with suppress(ValueError):  # not in the main thread
            signal.signal(getattr(signal, SAVING), signal.SIG_IGN)


def _say(text: str) -> None:
    with suppress(OSError):  # the terminal is closed, as after a SIGHUP
        # Not print: the signal may have come while the buffer of stderr was being written.
        os.write(2, f"\n{text}\n".encode())
