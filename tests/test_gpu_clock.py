"""The clock of a GPU, on one that only keeps time: what Python takes to launch must not count."""

import pytest
import torch

from fastgpt.gpu_clock import FEWEST_CYCLES, MOST_CYCLES, GpuClock

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


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    return FakeGpu(monkeypatch)


@pytest.mark.parametrize("repeats", [1, 16, 60])
@pytest.mark.parametrize(("launching", "running"), [(1e-6, 1e-3), (100e-6, 2e-6), (1e-3, 1e-5)])
def test_launching_is_not_counted(gpu: FakeGpu, launching: float, running: float, repeats: int):
    clock = GpuClock()
    for _ in range(2):
        assert clock.seconds(gpu.call(launching, running), repeats) == pytest.approx(repeats * running)


def test_a_wait_that_was_too_short_becomes_longer_and_stays_so(gpu: FakeGpu):
    clock, call = GpuClock(), gpu.call(100e-6, 2e-6)
    clock.seconds(call)
    assert gpu.slept == [FEWEST_CYCLES]
    clock.seconds(call, 100)  # 10 milliseconds to launch
    clock.seconds(call, 100)
    assert gpu.slept[1:] == [FEWEST_CYCLES * 4**n for n in (0, 1, 2, 3, 3)]


def test_what_waits_for_the_gpu_is_timed_with_its_waiting(gpu: FakeGpu):
    def call() -> None:
        gpu.call(30e-6, 2e-6)()
        gpu.wait()

    assert GpuClock().seconds(call, 10) == pytest.approx(9 * 32e-6 + 2e-6, rel=0.2)
    assert max(gpu.slept) <= 4 * MOST_CYCLES


def test_laps_are_of_each_call_alone(gpu: FakeGpu):
    times = iter([1e-6, 5e-6, 2e-6])
    laps = GpuClock().laps(lambda: gpu.run(next(times)), 3, before=lambda: gpu.run(1e-3))
    assert laps == pytest.approx([1e-6, 5e-6, 2e-6])
