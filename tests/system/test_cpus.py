"""The CPUs of this process, read from folders and files like Linux's."""

import os
from pathlib import Path

import pytest

from fastgpt.system import cpus
from fastgpt.system.cpus import Moment


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


V1 = {"cpu/a/b/cpu.cfs_period_us": "100000\n", "cpu/a/b/cpu.cfs_quota_us": "250000\n"}


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("0::/a/b", {"a/b/cpu.max": "150000 100000\n", "a/cpu.max": "max 100000\n"}, 1.5),
        ("0::/a/b", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "50000 100000\n"}, 0.5),
        ("0::/of/the/host", {"cpu.max": "400000 100000\n"}, 4),  # in a container
        ("4:cpu,cpuacct:/a/b\n3:cpuset:/\n0::/", V1, 2.5),
        ("4:cpu,cpuacct:/a/b", {**V1, "cpu/a/b/cpu.cfs_quota_us": "-1\n"}, float("inf")),
        ("0::/a", {"a/cpu.max": "damaged"}, float("inf")),
        ("0::/", {}, float("inf")),
    ],
)
def test_the_quota_is_the_least_from_the_own_cgroup_up(tmp_path: Path, membership: str, files: dict, expected: float):
    write(tmp_path / "process", {"cgroup": membership + "\n"})
    write(tmp_path / "cgroups", files)
    assert cpus.quota(tmp_path / "process", tmp_path / "cgroups") == expected


def test_without_cgroups_there_is_no_quota(tmp_path: Path):
    assert cpus.quota(tmp_path, tmp_path) == float("inf")


@pytest.mark.parametrize(
    ("affinity", "quota", "expected"), [(8, float("inf"), 8), (8, 2.5, 2), (8, 0.5, 1), (1, 2.5, 1)]
)
def test_usable_cpus_are_those_of_the_affinity_that_the_quota_pays_for_whole(
    monkeypatch: pytest.MonkeyPatch, affinity: int, quota: float, expected: int
):
    monkeypatch.setattr(cpus, "_affinity", lambda: set(range(affinity)))
    monkeypatch.setattr(cpus, "quota", lambda: quota)
    assert cpus.usable() == expected


def test_the_waiting_of_all_threads_is_summed(tmp_path: Path):
    write(tmp_path, {"task/1/schedstat": "7 2000000000 3\n", "task/2/schedstat": "9 500000000 1\n"})
    write(tmp_path, {"task/3/schedstat": ""})  # of a thread that has just ended
    assert cpus.waited(tmp_path) == 2.5
    assert cpus.waited(tmp_path / "nowhere") is None


def test_others_take_what_all_took_but_this_process_on_its_cpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    hertz = os.sysconf("SC_CLK_TCK")
    write(
        tmp_path,
        {"stat": "cpu 9 9 9\ncpu0 0 0 0 50 0 0 0 0 0 0\ncpu1 0 0 0 0 0 0 0 0\ncpu2 0 0 0 0 0 0 0 0\nbtime 1\n"},
    )
    monkeypatch.setattr(cpus, "_affinity", lambda: {0, 2})
    before = Moment.now(tmp_path / "stat")
    # Idle time and waiting for a disk count for nothing; niced work and what the host took (steal) count.
    busy = f"cpu0 {hertz} {hertz} 0 70 99 0 0 {hertz} 0 0\ncpu1 {9 * hertz} 0 0 0 0 0 0 0\ncpu2 0 0 {hertz} 0 0 0 0 0\n"
    write(tmp_path, {"stat": busy})
    now = Moment.now(tmp_path / "stat")
    assert before is not None
    assert now is not None
    assert now.all - before.all == 4
    assert Moment(14.0, 7.0, 108.0).taken_since(Moment(10.0, 5.0, 100.0)) == 1.5
    assert Moment(14.0, 9.0, 100.0).taken_since(Moment(10.0, 5.0, 100.0)) == 0
    assert Moment.now(tmp_path / "nowhere") is None
