"""OpenMP's threads at barriers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastgpt.system import barriers, cpus
from fastgpt.system.barriers import BLOCKTIME, SETTINGS, Barriers
from fastgpt.system.cpus import Moment

# Milliseconds of CPU time that a parallel operation takes after its end, when its threads wait for the next one, and
# the process's threads: while they spin, sleep, spin; then the sums of the same numbers, and what importing changed.
SCRIPT = """
import os, time
before = dict(os.environ)
import torch, fastgpt.train, fastgpt.generate
from fastgpt.system.barriers import Barriers, can_sleep
torch.set_num_threads(2)
x = torch.rand(1 << 20, generator=torch.Generator().manual_seed(0))
def spent():
    taken = []
    for _ in range(9):
        total = x.sum()
        began = time.process_time()
        time.sleep(0.03)
        taken.append(time.process_time() - began)
    return sorted(taken)[4] * 1e3, len(os.listdir("/proc/self/task")), total.item()
barriers = Barriers(threads=2)
rows = [spent()]
barriers.sleep()
time.sleep(0.03)
rows.append(spent())
barriers.spin()
rows.append(spent())
for column in zip(*rows):
    print(*column)
print(can_sleep(), dict(os.environ) == before)
"""


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*SETTINGS, BLOCKTIME):
        monkeypatch.setenv(name, "")  # so that it is put back as it was
        monkeypatch.delenv(name)


@pytest.mark.skipif(
    sys.platform != "linux" or cpus.usable() < 2, reason="libgomp's threads spin only where each has a CPU"
)
@pytest.mark.slow
def test_threads_sleep_at_barriers_and_spin_again_and_sum_to_the_same_bits():
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True)
    *rows, words = done.stdout.splitlines()
    spent, threads, totals = ([float(text) for text in row.split()] for row in rows)
    assert spent[1] < 0.25 * min(spent[0], spent[2])
    assert threads[1] == threads[0] + 2  # the second team
    assert threads[2] == threads[0]
    assert len(set(totals)) == 1
    assert words == "True True"


def test_a_system_without_room_for_a_second_team_goes_on_without(monkeypatch: pytest.MonkeyPatch):
    def fail(self: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(barriers.threading.Thread, "start", fail)
    ours = Barriers(threads=2)
    assert not ours.sleep()
    ours.spin()


def test_a_libgomp_whose_file_was_replaced_is_left_alone(monkeypatch: pytest.MonkeyPatch):
    """By an update while the program runs: what has no file cannot be opened."""
    maps = "7f00-7f01 r-xp 00000000 08:01 123    /usr/lib/libgomp-abc.so.1.0.0 (deleted)\n"
    monkeypatch.setattr(Path, "read_text", lambda self, **_: maps)
    assert barriers._libraries() == []


def moments(monkeypatch: pytest.MonkeyPatch, *values: Moment | None) -> list[Moment | None]:
    """Let `Moment.now` give these in turn; the list of those that are left."""
    left = list(values)
    monkeypatch.setattr(Moment, "now", lambda: left.pop(0))
    return left


IDLE = [Moment(10.0, 1.0, 50.0), Moment(10.1, 1.1, 50.1)]
BUSY = [Moment(10.0, 1.0, 50.0), Moment(10.1, 1.1, 50.2)]


@pytest.mark.parametrize(("pair", "expected"), [(IDLE, None), (BUSY, "0")])
def test_the_load_before_pytorch_is_imported_chooses(monkeypatch: pytest.MonkeyPatch, pair: list, expected: str | None):
    left = moments(monkeypatch, *pair)
    barriers.choose(["train", "--n_layer", "2"])
    assert left == []
    assert os.environ.get(BLOCKTIME) == expected


@pytest.mark.parametrize("words", [["train", "--help"], ["train", "--n_layer", "2", "-h"]])
def test_help_is_shown_without_a_look_at_the_load(monkeypatch: pytest.MonkeyPatch, words: list[str]):
    left = moments(monkeypatch, *BUSY)
    barriers.choose(words)
    assert left == BUSY


@pytest.mark.parametrize("name", [*SETTINGS, BLOCKTIME])
def test_a_users_own_setting_is_left_alone(monkeypatch: pytest.MonkeyPatch, name: str):
    left = moments(monkeypatch, *BUSY)
    monkeypatch.setenv(name, "7")
    barriers.choose(["train"])
    assert left == BUSY
    assert os.environ.get(BLOCKTIME, "7") == "7"


@pytest.mark.parametrize(("load", "expected"), [(0.5, None), (3.0, "0")])
def test_without_linuxs_statistics_the_load_average_chooses(
    monkeypatch: pytest.MonkeyPatch, load: float, expected: str | None
):
    moments(monkeypatch, None, None)
    monkeypatch.setattr(cpus, "usable", lambda: 4)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0), raising=False)
    barriers.choose(["train"])
    assert os.environ.get(BLOCKTIME) == expected


@pytest.mark.parametrize("command", ["train", "generate"])
def test_commands_choose_before_they_import_pytorch(command: str, tmp_path: Path):
    code = f"""
import runpy, sys
from fastgpt.system import barriers
barriers.choose = lambda argv: print("chosen", *argv[1:])
sys.modules["torch"] = None  # cannot be imported
sys.argv = ["program", "--seed", "3"]
runpy.run_module("fastgpt.{command}", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "chosen --seed 3\n"
    assert "import of torch halted" in done.stderr
