"""pytest plugin of survey.py: what each case gave goes to a file of its own as soon as it is done.

    pytest -p bench.tools.progress --progress-out DIR

DIR gets <name>.json for each case, and running, which names the case that is being measured.

A measured case is a file in pytest-benchmark's format with one benchmark. Another has `outcome` ("failed", "skipped")
and `line`, which says why.
"""

import re
import subprocess
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from pytest_benchmark.utils import safe_dumps

RUNNING = "running"


def file_name(nodeid: str) -> str:
    """A file's name for a case, unique as far as cases differ in more than punctuation."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", nodeid).strip("-") + ".json"


def write(path: Path, content: dict[str, Any]) -> None:
    """Write whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(safe_dumps(content, indent=1), encoding="utf-8")
    temporary.replace(path)


def commit_of(folder: Path) -> str:
    """The commit that is checked out there; "" for a copy without its history, or without git."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False).stdout.strip()[:7]
    except FileNotFoundError:
        return ""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--progress-out", type=Path)


def pytest_configure(config: pytest.Config) -> None:
    if folder := config.getoption("--progress-out"):
        config.pluginmanager.register(Progress(config, folder))


class Progress:
    """Follows a session and writes its results down."""

    def __init__(self, config: pytest.Config, folder: Path):
        self.config, self.folder = config, folder
        self.outcomes: dict[str, tuple[str, str]] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        (self.folder / RUNNING).write_text(item.nodeid, encoding="utf-8")
        result = yield
        write(self.folder / file_name(item.nodeid), self.result(item.nodeid))
        (self.folder / RUNNING).unlink()
        if "CUDA error" in self.outcomes.get(item.nodeid, ("", ""))[1]:
            item.session.shouldstop = "after a CUDA error, every further call of this process may fail"
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not report.passed:
            self.outcomes[report.nodeid] = (report.outcome, summary(report))

    def result(self, nodeid: str) -> dict[str, Any]:
        if nodeid in self.outcomes:
            outcome, line = self.outcomes[nodeid]
            return {"nodeid": nodeid, "outcome": outcome, "line": line}
        session = getattr(self.config, "_benchmarksession")  # noqa: B009 - pytest-benchmark's own name for it
        own = [case for case in session.benchmarks if case.fullname == nodeid]
        if not own:
            return {"nodeid": nodeid, "outcome": "skipped", "line": "it measured nothing"}
        hook = self.config.hook
        commit_info = hook.pytest_benchmark_generate_commit_info(config=self.config)
        hook.pytest_benchmark_update_commit_info(config=self.config, commit_info=commit_info)
        return hook.pytest_benchmark_generate_json(
            config=self.config,
            benchmarks=own,
            include_data=True,
            machine_info=session.get_machine_info(),
            commit_info=commit_info,
        )


def summary(report: pytest.TestReport) -> str:
    """The exception, or the reason why the case was skipped, in one line."""
    if report.skipped and isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    lines = (crash.message if crash is not None else report.longreprtext).strip().splitlines()
    return lines[0] if lines else "no message"
