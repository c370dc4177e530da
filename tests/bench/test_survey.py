"""bench/survey.py on a tiny suite: what it measures, records, skips and leaves when the time is over."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import bench_first, survey
from bench.survey import groups, importance
from bench.tools.progress import file_name

SUITE = """
import os
import time
from pathlib import Path
import pytest

@pytest.mark.parametrize("n", [1, 2])
def test_measured(benchmark, n):
    benchmark.pedantic(sum, (range(n),), rounds=3)

def test_failing(benchmark):
    raise ValueError("the device is on fire")

def test_slow(benchmark):
    print("going to sleep", flush=True)
    time.sleep(60)

def test_ending_the_process(benchmark):
    print("about to crash", flush=True)
    os._exit(7)

def test_skipped(benchmark):
    pytest.skip("needs a CUDA GPU")

def test_last(benchmark):
    merged = list((Path(__file__).parents[1] / "out").glob("*-survey.json"))
    benchmark.extra_info["merged_before"] = [path.read_text().count("test_measured[1]") > 0 for path in merged]
    benchmark.pedantic(sum, (range(9),), rounds=3)
"""
PYTEST = "-p no:cacheprovider"


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    folder = tmp_path / "bench"
    folder.mkdir()
    (folder / "bench_fake.py").write_text(SUITE, encoding="utf-8")
    (tmp_path / "pytest.ini").write_text(f"[pytest]\npython_files = bench_*.py\naddopts = {PYTEST}\n", encoding="utf-8")
    return folder


def run(suite: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, survey.__file__, "--suite", str(suite), "--out", str(suite.parent / "out"), *flags]
    # Where these tests run in several processes, pytest-benchmark would take the survey's for one of them.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def cases(suite: Path) -> dict[str, dict]:
    return {path.name: json.loads(path.read_text()) for path in (suite.parent / "out" / "cases").glob("*.json")}


def case(name: str) -> str:
    return file_name(f"bench/bench_fake.py::{name}")


@pytest.mark.slow
def test_records_everything_goes_on_and_resumes(suite: Path):
    done = run(suite, "--minutes", "3", "--case_seconds", "4")
    assert done.returncode == 0, done.stderr
    found = cases(suite)
    assert found[case("test_failing")]["outcome"] == "failed"
    assert "the device is on fire" in found[case("test_failing")]["line"]
    assert found[case("test_slow")]["outcome"] == "timed out"
    assert found[case("test_ending_the_process")]["outcome"] == "failed"
    assert "exit code 7" in found[case("test_ending_the_process")]["line"]
    assert found[case("test_skipped")] == {
        "nodeid": "bench/bench_fake.py::test_skipped",
        "outcome": "skipped",
        "line": "needs a CUDA GPU",
    }
    measured = [case(name) for name in ("test_measured[1]", "test_measured[2]", "test_last")]
    for name in measured:
        assert found[name]["benchmarks"][0]["stats"]["rounds"] == 3
    # A run may be cut off at any moment, so what is measured is in the merged file at once.
    assert found[case("test_last")]["benchmarks"][0]["extra_info"]["merged_before"] == [True]
    (merged,) = (suite.parent / "out").glob("*-survey.json")
    content = json.loads(merged.read_text())
    assert {c["name"] for c in content["benchmarks"]} == {"test_measured[1]", "test_measured[2]", "test_last"}
    assert len(content["failures"]) == 4
    assert "3 measured, 4 failed, stopped or skipped, 0 not reached" in done.stdout

    (suite.parent / "out" / "cases" / case("test_last")).unlink()
    before = {name: (suite.parent / "out" / "cases" / name).stat().st_mtime_ns for name in cases(suite)}
    again = run(suite, "--minutes", "3", "--case_seconds", "4")
    assert again.returncode == 0, again.stderr
    assert "7 cases, 6 of them done before" in again.stdout
    assert case("test_last") in cases(suite)
    for name, moment in before.items():
        assert (suite.parent / "out" / "cases" / name).stat().st_mtime_ns == moment, name


@pytest.mark.slow
def test_what_runs_when_the_time_is_over_is_not_recorded(suite: Path):
    began = time.monotonic()
    done = run(suite, "--minutes", "0.07")
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began < 30  # and not the minute that test_slow takes
    assert case("test_slow") not in cases(suite)
    assert "not reached" in done.stdout
    assert "0 not reached" not in done.stdout


def test_a_part_that_has_had_its_time_gives_way_and_what_is_left_of_it_comes_last(tmp_path, monkeypatch, capsys):
    costs = {"part[quick]": 0.0, "part[slow]": 15.0, "part[cut]": 12.0, "part[late]": 1.0, "after": 30.0}
    ran = []

    def run_once(self: survey.Survey, group: list[str]) -> None:
        """As one process does, without taking the time."""
        for nodeid in group:
            name = nodeid.partition("test_")[2]
            ran.append(name)
            took = min(costs[name], self.allowed(nodeid))
            self.charge(nodeid, took)
            if took < costs[name]:
                return
            self.record(nodeid, "skipped", "")

    monkeypatch.setattr(survey, "PARTS", {"bench_fake.py::test_part": 20.0})
    monkeypatch.setattr(survey.Survey, "run_once", run_once)
    monkeypatch.setattr(survey.Survey, "collect", lambda self: [f"bench/bench_fake.py::test_{name}" for name in costs])
    out = tmp_path / "out"
    assert survey.main(["--suite", str(tmp_path), "--out", str(out), "--minutes", "1", "--case_seconds", "90"]) == 0
    assert ran == ["part[quick]", "part[slow]", "part[cut]", "after", "part[cut]", "part[late]"]
    assert "bench_fake.py::test_part has had its 20 s; what is left of it comes last" in capsys.readouterr().out
    assert len(list((out / "cases").glob("*.json"))) == len(costs)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--minutes", "0"], "--minutes: 0 is not a number above 0"),
        (["--minutes", "1", "--suite", "nowhere"], "--suite nowhere is no folder"),
        (["--minutes", "1", "--out", __file__], "is a file; give a folder"),
        (["--minutes", "1", "--hours", "1"], "--hours"),
        ([], "--minutes"),
    ],
)
def test_bad_flags_are_one_line(capsys, tmp_path: Path, flags: list[str], words: str):
    default = [] if "--out" in flags else ["--out", str(tmp_path / "out")]
    assert survey.cli.run(survey.main, [*flags, *default]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert words in line


def test_the_first_questions_have_their_turns_within_four_minutes():
    """Each part is one of bench_first's functions, and they come first, in the order of the file."""
    functions = re.findall(r"^def (test_\w+)", Path(bench_first.__file__).read_text(encoding="utf-8"), re.M)
    names = [f"bench/bench_first.py::{name}[x]" for name in functions]
    assert [next(part for part in survey.PARTS if part in name) for name in names] == list(survey.PARTS)
    assert sum(survey.PARTS.values()) <= 240
    assert next(groups(["bench/bench_train.py::test_training_step[gpt2-triton-auto-True]", *names])) == names


def test_important_cases_come_first_and_share_processes():
    names = [
        "bench/bench_startup.py::test_first_token",
        "bench/bench_train.py::test_training_step[gpt2-medium-triton-auto-False-0.0-None]",
        "bench/bench_kernels.py::test_kernel[causal_attention-forward-triton-B16-T1024-H12-D64-bfloat16]",
        "bench/bench_train.py::test_training_step[gpt2-torch-auto-True-0.0-None]",
        "bench/bench_train.py::test_training_step[gpt2-triton-auto-False-0.0-None]",
        "bench/bench_train.py::test_training_step[gpt2-triton-auto-True-0.0-None]",
    ]
    assert list(groups(names)) == [names[4:6], [names[3]], [names[2]], [names[1]], [names[0]]]
    assert importance("bench/bench_new.py::test_new") == len(survey.IMPORTANCE)
