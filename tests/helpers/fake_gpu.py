"""A GPU that takes its time, for clocks to measure."""

import pytest
import torch

HERTZ = 2e9


class FakeGpu:
    """A queue that takes its time, beside a host that takes its own: all that torch.cuda tells of both."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = self.done = 0.0  # of the host, and when the GPU will have done all it was given
        self.slept = []
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool):
                assert enable_timing

            def record(self) -> None:
                self.at = gpu.done = max(gpu.done, gpu.now)

            def query(self) -> bool:
                return gpu.now >= self.at

            def synchronize(self) -> None:
                gpu.now = max(gpu.now, self.at)

            def elapsed_time(self, end: "Event") -> float:
                return (end.at - self.at) * 1e3

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: self.wait())
        monkeypatch.setattr(torch.cuda, "_sleep", self.sleep)

    def wait(self) -> None:
        self.now = max(self.now, self.done)

    def sleep(self, cycles: int) -> None:
        self.slept.append(cycles)
        self.run(cycles / HERTZ)

    def run(self, seconds: float) -> None:
        self.done = max(self.done, self.now) + seconds

    def call(self, launching: float, running: float):
        """A call that takes Python and the GPU so long."""

        def call() -> None:
            self.now += launching
            self.run(running)

        return call
