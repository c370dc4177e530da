"""The clock of a GPU, on one that only keeps time: what Python takes to launch must not count."""

import pytest

from fastgpt.ops.gpu_clock import FEWEST_CYCLES, MOST_CYCLES, GpuClock
from tests.helpers.fake_gpu import FakeGpu


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
