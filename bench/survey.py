"""The benchmarks in order of importance, for a machine that is at hand for a few minutes.

    python bench/survey.py --minutes 4 --out DIR

It runs case after case until the time is over, and needs nothing installed beyond what the suite itself imports. First
come the questions of bench/bench_first.py, which take some three minutes: do the kernels run, how fast is attention,
what do a training step and decoding gain. Each has its share of the time (PARTS); what is left of one then comes last.

As soon as a case is measured it is in DIR/cases, and in DIR/<date>-<commit>-survey.json, which bench/report.py reads.
A second run with the same DIR goes on where this one stopped: what has a file there, failed cases too, is skipped
(--again: measured again). At the end it prints a table.

Cases of one file that are equally important share a process, because importing torch takes seconds. One that fails is
recorded with what it raised; one that takes longer than --case_seconds is stopped and recorded with the last line of
its output. What was running when the time was over is not recorded, and comes next time. Exit code 0 also where cases
failed; 2 with one line for a bad flag, for a suite that cannot be collected, and for a DIR of another commit.

A plan for 15 minutes on a GPU, without a network, where PyTorch, Triton and pytest are installed and this is not:

    python bench/survey.py --minutes 4 --out DIR       does it run, and what does it gain
    python -m pytest -m gpu -n 12 -q                   parity: a kernel that computes nonsense is fast
    python bench/survey.py --minutes 4 --out DIR       goes on with the whole suite
    python bench/tune.py attention_forward --dtype 16-bit --width 64 --seconds 60

For fastgpt's own commands: python -m pip install --no-deps --no-build-isolation -e . (wheels of what else is missing:
--no-index --find-links FOLDER). Where few files come back from there, the one in DIR holds everything.
"""

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, where modules are named bench.*

from rich.console import Console
from rich.table import Table

from bench.report import COLUMNS, table_lines
from bench.tools import command_line
from bench.tools.measured import normalise
from bench.tools.progress import RUNNING, commit_of, file_name, write
from fastgpt import cli
from fastgpt.errors import UsageError

# What comes first: regular expressions that are searched for in a case's name, from the most important on. Every word
# of a pattern stands in the name; the order of words does not matter. What nothing matches comes last.
IMPORTANCE: tuple[tuple[str, ...], ...] = (
    (r"bench_first",),
    # a training step of GPT-2: our kernels, then the compiled stock path
    (r"bench_train", r"\[gpt2-triton-auto-"),
    (r"bench_train", r"\[gpt2-torch-auto-True"),
    (r"bench_train", r"\[gpt2-(?!medium)", r"-auto-"),
    # decoding with GPT-2
    (r"bench_generate", r"test_gpt2_|\[gpt2-(?!medium)"),
    # our kernels: attention at GPT-2's head size and lengths, then the others at GPT-2's widths
    (r"causal_attention", r"-triton-", r"-D64-", r"-T(1024|2048|4096)-"),
    (r"(layer|rms)_norm", r"-triton-", r"-C768-"),
    (r"swiglu|relu2", r"-triton-"),
    (r"linear_cross_entropy", r"-triton-", r"-C768-"),
    (r"paged_attention", r"-triton-", r"-D64-"),
    (r"-triton-",),
    # whether auto takes the best of them
    (r"bench_auto",),
    # then the long tail
    (r"bench_kernels",),
    (r"bench_train",),
    (r"bench_generate",),
    (r"bench_memory",),
    (r"bench_startup",),
)
# The seconds that the cases with these words in their names may take together before what follows has its turn.
PARTS = {
    "bench_first.py::test_runs": 75.0,
    "bench_first.py::test_attention": 40.0,
    "bench_first.py::test_training_step": 60.0,
    "bench_first.py::test_decode": 45.0,
}
POLL_SECONDS = 0.05
START_SECONDS = 120.0  # for importing and collecting
LEAST_SECONDS = 3.0  # a process that could not even import torch in what is left is not started


@dataclass(frozen=True)
class Budget:
    """Until when things may run, by `time.monotonic`."""

    end: float

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    @property
    def spent(self) -> bool:
        return self.left < LEAST_SECONDS


@dataclass(frozen=True)
class Survey:
    """One run: the suite's folder, where results go, how long a case may take, what is left to each part, all cases."""

    suite: Path
    out: Path
    case_seconds: float
    budget: Budget
    console: Console
    parts: dict[str, float] = field(default_factory=lambda: PARTS.copy())
    order: list[str] = field(default_factory=list)

    @property
    def cases(self) -> Path:
        return self.out / "cases"

    @property
    def ceilings_file(self) -> Path:
        """The file of the suite's option --ceilings, which the first case that needs them measures."""
        return self.out / "ceilings.json"

    def ceilings(self) -> dict[str, Any] | None:
        """The machine's measured limits; None until a case needs them."""
        return json.loads(self.ceilings_file.read_text(encoding="utf-8")) if self.ceilings_file.exists() else None

    def environment(self) -> dict[str, str]:
        """Of a child, which finds the engine, the benchmarks and the plugin where none of them is installed.

        It loads no other plugin of pytest's that is: they take seconds to import.
        """
        paths = [command_line.ROOT, command_line.ROOT / "kernels"]
        others = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
        return os.environ | {
            "PYTHONPATH": os.pathsep.join([*map(str, paths), *others]),
            "PYTHONUNBUFFERED": "1",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        }

    def pytest(self, *flags: str) -> list[str]:
        """A command that runs in the folder above the suite, so that names are as everywhere: bench/bench_x.py::..."""
        ceilings = ["--ceilings", str(self.ceilings_file)] if (self.suite / "ceilings.py").exists() else []
        return [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "pytest_benchmark.plugin",
            "-p",
            "bench.tools.progress",
            *flags,
            *ceilings,
        ]

    def collect(self) -> list[str]:
        """The names of all cases. Raises `UsageError` with what pytest says where it cannot tell."""
        command = self.pytest(self.suite.name, "--collect-only", "-q")
        try:
            done = subprocess.run(
                command,
                cwd=self.suite.parent,
                env=self.environment(),
                capture_output=True,
                text=True,
                timeout=max(self.budget.left, LEAST_SECONDS),
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise UsageError(f"collecting {self.suite} took all of --minutes; give more") from None
        found = [line for line in done.stdout.splitlines() if "::" in line and not line.startswith("ERROR")]
        said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        if not found:
            raise UsageError(f"pytest collects nothing in {self.suite}: {said[-1] if said else 'no output'}")
        for line in said:
            if line.startswith("ERROR"):  # a file that cannot be imported is no reason to leave out the others
                self.console.print(line, markup=False, highlight=False)
        return found

    def part(self, nodeid: str) -> str:
        """The part that a case belongs to; "" for none."""
        return next((name for name in self.parts if name in nodeid), "")

    def is_over(self, nodeid: str) -> bool:
        """Whether its part has had its time."""
        return self.parts.get(self.part(nodeid), 1.0) <= 0

    def run(self, group: list[str]) -> None:
        """Measure these cases in one process, or in more where one of them has to be stopped."""
        left = [nodeid for nodeid in group if not self.is_over(nodeid)]
        while left and not self.budget.spent:
            self.run_once(left)
            before = len(left)
            left = [nodeid for nodeid in left if not self.is_done(nodeid) and not self.is_over(nodeid)]
            if len(left) == before and not self.budget.spent:  # the process died before its first case
                self.record(left.pop(0), "failed", last_line(self.out / "output.txt"))

    def is_done(self, nodeid: str) -> bool:
        return (self.cases / file_name(nodeid)).exists()

    def run_once(self, group: list[str]) -> None:
        """One process for these cases. A case that takes too long is recorded and ends it."""
        output, running = self.out / "output.txt", self.cases / RUNNING
        running.unlink(missing_ok=True)
        command = self.pytest(*group, "--benchmark-only", "-q", "--progress-out", str(self.cases))
        with output.open("w", encoding="utf-8") as file:
            process = subprocess.Popen(
                command,
                cwd=self.suite.parent,
                env=self.environment(),
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that a case's own processes can be stopped with it
            )
            case, began = "", time.monotonic()
            while process.poll() is None:
                time.sleep(POLL_SECONDS)
                now = running.read_text(encoding="utf-8") if running.exists() else ""
                if now != case:
                    self.charge(case, time.monotonic() - began)
                    merge(self)
                    case, began = now, time.monotonic()
                took = time.monotonic() - began
                late = took > self.allowed(case)
                if late or self.budget.left < 0:
                    stop(process)
                    self.charge(case, took)
                    if late and not (self.is_over(case) and took < PARTS[self.part(case)] / 2):
                        line = f"no end within {took:.0f} s; its output ends: {last_line(output)}"
                        left = [nodeid for nodeid in group if not self.is_done(nodeid)]
                        for nodeid in [case] if case else left[:1]:  # none: it has not ended after its last
                            self.record(nodeid, "timed out", line)
                    running.unlink(missing_ok=True)
        if running.exists():
            line = f"it ended the process with exit code {process.returncode}: {last_line(output)}"
            self.record(running.read_text(encoding="utf-8"), "failed", line)
            running.unlink()

    def allowed(self, case: str) -> float:
        """The seconds that a case may take, or ("") a process to come to its first."""
        return min(self.case_seconds, self.parts.get(self.part(case), self.case_seconds)) if case else START_SECONDS

    def charge(self, case: str, seconds: float) -> None:
        """Count what a case took of its part's time."""
        if part := self.part(case):
            before, self.parts[part] = self.parts[part], self.parts[part] - seconds
            if before > 0 and self.is_over(case):
                self.console.print(f"{part} has had its {PARTS[part]:.0f} s; what is left of it comes last")

    def record(self, nodeid: str, outcome: str, line: str) -> None:
        write(self.cases / file_name(nodeid), {"nodeid": nodeid, "outcome": outcome, "line": line})


def stop(process: subprocess.Popen) -> None:
    """End a process and its children."""
    with contextlib.suppress(ProcessLookupError):  # it may end by itself in between
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def last_line(output: Path) -> str:
    lines = [line for line in output.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "(none)"


def importance(nodeid: str) -> int:
    """The place in IMPORTANCE of the first entry whose patterns are all in the name."""
    for place, patterns in enumerate(IMPORTANCE):
        if all(re.search(pattern, nodeid) for pattern in patterns):
            return place
    return len(IMPORTANCE)


def groups(nodeids: Sequence[str]) -> Iterator[list[str]]:
    """The cases in order of importance, those of one file and one importance together."""
    together: dict[tuple[int, str], list[str]] = {}
    for nodeid in sorted(nodeids, key=importance):  # stable: otherwise in the suite's own order
        together.setdefault((importance(nodeid), nodeid.partition("::")[0]), []).append(nodeid)
    yield from together.values()


def read_cases(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(measured, not measured): the content of every case's file. Raises `UsageError` for a broken one."""
    contents = []
    for path in sorted(folder.glob("*.json")):
        try:
            contents.append(json.loads(path.read_text(encoding="utf-8")))
        except ValueError as error:
            raise UsageError(f"{path} is broken: {error}; delete it to measure the case again") from None
    return [c for c in contents if "benchmarks" in c], [c for c in contents if "outcome" in c]


def check_commit(survey: Survey) -> None:
    """Raises `UsageError` where DIR holds results of another commit than the one that is checked out."""
    found, _ = read_cases(survey.cases)
    commits = {c["commit_info"].get("id", "unknown")[:7] for c in found}
    here = commit_of(survey.suite)
    if here and commits - {here, "unknown"}:
        held = ", ".join(sorted(commits))
        raise UsageError(
            f"--out {survey.out} holds cases of commit {held}, and this is {here}; give another or --again"
        )


def merge(survey: Survey) -> tuple[Path | None, dict[str, Any]]:
    """Write all results into one file in pytest-benchmark's format. Returns it, None where nothing was measured."""
    found, failures = read_cases(survey.cases)
    places = {nodeid: place for place, nodeid in enumerate(survey.order)}
    found.sort(key=lambda c: places.get(c["benchmarks"][0]["fullname"], len(places)))
    content: dict[str, Any] = {"failures": failures, "ceilings": survey.ceilings(), "benchmarks": []}
    if not found:
        return None, content
    content |= {key: found[0][key] for key in ("machine_info", "commit_info", "version")}
    content["datetime"] = min(c["datetime"] for c in found)
    content["benchmarks"] = [case for c in found for case in c["benchmarks"]]
    path = survey.out / f"{content['datetime'][:10]}-{content['commit_info'].get('id', 'unknown')[:7]}-survey.json"
    write(path, content)
    return path, content


def show(console: Console, content: dict[str, Any]) -> None:
    """The table at the end: what was measured, then what was not."""
    table = Table(box=None, padding=(0, 1))
    for name in COLUMNS:
        table.add_column(name, overflow="fold")
    for case in content["benchmarks"]:
        for line in table_lines(normalise(case)):
            table.add_row(*line)
    if content["benchmarks"]:
        console.print(table)
    for failure in content["failures"]:
        console.print("{outcome}: {nodeid}: {line}".format(**failure), markup=False, highlight=False)


def run_all(survey: Survey) -> None:
    """Measure what is not yet, group by group."""
    for group in groups([nodeid for nodeid in survey.order if not survey.is_done(nodeid)]):
        if survey.budget.spent:
            return
        survey.run(group)
        done, left = sum(map(survey.is_done, survey.order)), max(survey.budget.left, 0)
        survey.console.print(f"{done}/{len(survey.order)}  {left:.0f} s left  {group[-1]}", markup=False)


def main(argv: Sequence[str] | None = None) -> int:
    parser = command_line.Parser(prog="python bench/survey.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=command_line.positive, required=True, help="the time it may take in all")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--again", action="store_true", help="measure what is in DIR again")
    parser.add_argument(
        "--case_seconds", type=command_line.positive, default=90.0, help="the most for one case; default 90"
    )
    parser.add_argument("--suite", type=Path, default=command_line.BENCH, metavar="FOLDER", help="default: bench/")
    flags = parser.parse_args(argv)
    if not flags.suite.is_dir():
        parser.error(f"--suite {flags.suite} is no folder")
    if flags.out.exists() and not flags.out.is_dir():
        parser.error(f"--out {flags.out} is a file; give a folder")
    console = Console()
    if not console.is_terminal:
        console.width = 160
    budget = Budget(time.monotonic() + 60 * flags.minutes)
    survey = Survey(flags.suite.resolve(), flags.out.resolve(), flags.case_seconds, budget, console)
    if flags.again:
        shutil.rmtree(survey.cases, ignore_errors=True)
        survey.ceilings_file.unlink(missing_ok=True)
    survey.cases.mkdir(parents=True, exist_ok=True)
    check_commit(survey)
    survey.order.extend(itertools.chain.from_iterable(groups(survey.collect())))
    done = sum(map(survey.is_done, survey.order))
    console.print(f"{len(survey.order)} cases, {done} of them done before", highlight=False)
    run_all(survey)
    survey.parts.clear()  # what is left of a part that has had its time
    run_all(survey)
    path, content = merge(survey)
    show(console, content)
    missing = sum(not survey.is_done(nodeid) for nodeid in survey.order)
    counts = f"{len(content['benchmarks'])} measured, {len(content['failures'])} failed, stopped or skipped"
    console.print(f"{counts}, {missing} not reached{f'; {path}' if path else ''}", highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
