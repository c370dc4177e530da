"""Other programs on the CPUs, by a clock that the test moves."""

from collections.abc import Iterator, Sequence

import pytest

from fastgpt.system import contention, cpus
from fastgpt.system.barriers import Barriers
from fastgpt.system.contention import LOOK, ROW, ROW_SECONDS, Slowness, Watcher
from fastgpt.system.cpus import Moment

BUSY, CALM = 0.8, 0.1  # seconds of waiting in a second


class Machine:
    """A clock, the waiting of this process's threads, and the event that ends a watcher.

    `shares`: of each look while threads spin. `taken`: CPUs that others use in each look while they sleep, then none.
    """

    def __init__(self, shares: Sequence[float], taken: Sequence[float]):
        self.now, self.waited, self.others, self.shares, self.taken = 100.0, 5.0, 7.0, iter(shares), iter(taken)
        self.rests: list[float] = []
        self.asleep = self.over = False

    def is_set(self) -> bool:
        return self.over

    def wait(self, seconds: float) -> bool:
        self.now += seconds
        if seconds != LOOK:
            self.rests.append(seconds + LOOK)
        elif self.asleep:
            self.others += next(self.taken, 0.0) * seconds
        else:
            share = next(self.shares, None)
            self.over = share is None
            self.waited += (share or 0.0) * seconds
        return self.over


class Noted(Barriers):
    """Barriers that note what they are told, and tell the machine."""

    def __init__(self, machine: Machine | None = None):
        super().__init__(threads=2)
        self.machine = machine or Machine([], [])
        self.told: list[str] = []

    def sleep(self) -> bool:
        self.told.append("sleep")
        self.machine.asleep = True
        return True

    def spin(self) -> None:
        self.told.append("spin")
        self.machine.asleep = False


def watched(
    monkeypatch: pytest.MonkeyPatch, shares: list[float], taken: Sequence[float] = (), allowed: int = 2
) -> tuple[Machine, Noted, Watcher]:
    machine = Machine(shares, taken)
    watcher = Watcher(barriers := Noted(machine))
    monkeypatch.setattr(cpus, "allowed", lambda: allowed)
    monkeypatch.setattr(Moment, "now", lambda: Moment(machine.now, 0.0, machine.others))
    monkeypatch.setattr(watcher, "over", machine)
    monkeypatch.setattr(contention.time, "monotonic", lambda: machine.now)
    monkeypatch.setattr(cpus, "waited", lambda: machine.waited)
    watcher._watch()
    return machine, barriers, watcher


def test_threads_spin_for_as_long_as_none_waits_for_a_cpu(monkeypatch: pytest.MonkeyPatch):
    _, barriers, watcher = watched(monkeypatch, [CALM] * 50)
    assert barriers.told == []
    assert watcher.slept == 0


def test_threads_sleep_while_others_hold_the_cpus_and_spinning_is_tried_ever_more_rarely(
    monkeypatch: pytest.MonkeyPatch,
):
    machine, barriers, watcher = watched(monkeypatch, [CALM, CALM, BUSY, BUSY, BUSY, BUSY, BUSY])
    assert machine.rests == [1, 2, 4, 8, 8]
    assert barriers.told == ["sleep", "spin"] * 5
    assert watcher.slept == pytest.approx(23)


def test_once_the_others_have_gone_threads_spin_again_and_trying_begins_anew(monkeypatch: pytest.MonkeyPatch):
    calm = [CALM] * 30  # three seconds
    machine, barriers, _ = watched(monkeypatch, [BUSY, BUSY, *calm, BUSY, *calm])
    assert machine.rests == [1, 2, 1]
    assert barriers.told[-1] == "spin"


def test_spinning_is_not_tried_while_others_use_cpus_that_threads_need(monkeypatch: pytest.MonkeyPatch):
    machine, barriers, watcher = watched(monkeypatch, [BUSY, *[CALM] * 30], [1.0] * 40)
    assert machine.rests == [1]
    assert barriers.told == ["sleep", "spin"]
    assert watcher.slept == pytest.approx(5)  # a second, and while they were there


def test_others_on_cpus_that_threads_do_not_need_are_no_reason_to_sleep(monkeypatch: pytest.MonkeyPatch):
    _, _, watcher = watched(monkeypatch, [BUSY, *[CALM] * 30], [1.4] * 40, allowed=3)
    assert watcher.slept == pytest.approx(1)


def test_a_watcher_whose_system_has_no_room_for_a_second_team_gives_up(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Noted, "sleep", lambda self: False)
    machine, barriers, _ = watched(monkeypatch, [BUSY] * 5)
    assert machine.rests == barriers.told == []


def test_a_watcher_looks_in_its_own_thread_and_ends_with_its_block(monkeypatch: pytest.MonkeyPatch):
    times: Iterator[float] = iter(range(10**6))
    monkeypatch.setattr(cpus, "waited", lambda: float(next(times)))  # each look finds far more
    barriers = Noted()
    with Watcher(barriers) as watcher:
        for _ in range(100):
            if barriers.told:
                break
            watcher.thread.join(0.05)
    assert barriers.told == ["sleep", "spin"]
    assert not watcher.thread.is_alive()


def test_one_thread_and_a_users_own_policy_are_not_watched(monkeypatch: pytest.MonkeyPatch):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cpus, "waited", lambda: 1.0)
    assert not isinstance(contention.watching(1), Watcher)
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert not isinstance(contention.watching(2), Watcher)


class Steps:
    """Steps on a machine where threads wait `share` of the time, and others take so many of two CPUs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, share: float, taken: float = 1.0, threads: int = 2):
        self.now, self.share, self.taken = 0.0, share, taken
        self.slowness = Slowness(threads)
        monkeypatch.setattr(contention.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(cpus, "waited", lambda: self.now * self.share)
        monkeypatch.setattr(cpus, "usable", lambda: 2)
        monkeypatch.setattr(Moment, "now", lambda: Moment(self.now, 0.0, self.now * self.taken))

    def take(self, seconds: float, count: int) -> list[str]:
        """What is said after so many steps."""
        said = []
        for _ in range(count):
            self.now += seconds
            said.append(self.slowness.advice(seconds))
        return [text for text in said if text]


ADVICE = (
    "steps take 4.0 times as long as the best: other programs hold 1.0 of 2 CPUs; stop them, or this run, and resume "
    "it with `threads` 1"
)


def test_slow_steps_beside_other_programs_give_advice_once(monkeypatch: pytest.MonkeyPatch):
    steps = Steps(monkeypatch, BUSY)
    assert steps.take(1.0, 3) + steps.take(2.9, 30) == []
    assert steps.take(4.0, 20) == [ADVICE]
    assert steps.take(4.0, 100) == []


def test_a_few_slow_steps_or_a_few_seconds_of_them_are_not_worth_advice(monkeypatch: pytest.MonkeyPatch):
    steps = Steps(monkeypatch, BUSY)
    steps.take(1.0, 1)
    for _ in range(5):
        assert steps.take(4.0, ROW) + steps.take(1.0, 1) == []
    quick = Steps(monkeypatch, BUSY)
    quick.take(0.01, 1)
    assert quick.take(0.05, round(ROW_SECONDS / 0.05) - 1) == []
    assert len(quick.take(0.05, 10)) == 1


def test_steps_that_are_slow_for_another_reason_give_no_advice(monkeypatch: pytest.MonkeyPatch):
    steps = Steps(monkeypatch, CALM)
    steps.take(1.0, 1)
    assert steps.take(10.0, 30) == []
    steps.share = BUSY  # others have come since
    assert len(steps.take(10.0, 30)) == 1


def test_where_fewer_threads_would_not_help_none_are_advised(monkeypatch: pytest.MonkeyPatch):
    steps = Steps(monkeypatch, BUSY, threads=1)
    steps.take(1.0, 1)
    (said,) = steps.take(4.0, 30)
    assert said.endswith("hold 1.0 of 2 CPUs; stop them")
