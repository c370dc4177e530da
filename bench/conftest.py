"""What every benchmark shares: a round that times the peer beside us, the table of ratios, and clean results.

Two programs on a shared machine are only comparable within one run, so each round runs the peer and then us.
"""

import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgpt.device import describe, resolve_device


@pytest.fixture
def against(benchmark) -> Callable[..., float]:
    """Time `ours` against `peer` in alternating rounds; returns how many times faster ours is (median by median)."""

    def compare(ours: Callable[[], Any], peer: Callable[[], Any], *, rounds: int, units: int, **info: Any) -> float:
        """`units` (tokens, say) are what each call produces; `info` goes to the results."""
        peer(), ours()  # warm up: compile, allocate
        seconds: list[float] = []

        def timed_peer() -> None:
            began = time.perf_counter()
            peer()
            seconds.append(time.perf_counter() - began)

        benchmark.pedantic(ours, setup=timed_peer, rounds=rounds)
        slower, faster = statistics.median(seconds), benchmark.stats.stats.median
        benchmark.extra_info.update(info)
        benchmark.extra_info |= {
            "peer_seconds": slower,
            "tokens_per_second": units / faster,
            "peer_tokens_per_second": units / slower,
            "ratio": slower / faster,
        }
        return slower / faster

    return compare


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Say what the numbers depend on, and not whose machine it was."""
    kept = {"cpu": machine_info.get("cpu", {}).get("brand_raw", platform.processor()), "system": platform.system()}
    machine_info.clear()
    machine_info |= kept | {
        "device": describe(resolve_device("auto")),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict[str, Any]) -> None:
    where = Path(__file__).parent
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=where, capture_output=True, text=True)
    commit_info.clear()
    commit_info["id"] = commit.stdout.strip() or "unknown"


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    """A line a comparison: ours, the peer, the ratio, and the ratio aimed at."""
    session = getattr(config, "_benchmarksession", None)
    rows = [b for b in session.benchmarks if "ratio" in b.extra_info] if session else []
    if not rows:
        return
    terminalreporter.section("ratios, each within one run")
    for row in rows:
        info = row.extra_info
        terminalreporter.write_line(
            f"{row.name:<44} {info['tokens_per_second']:>10,.0f} tokens/s   {info['peer_name']}: "
            f"{info['peer_tokens_per_second']:,.0f}   ratio {info['ratio']:.2f} (aim {info['aim']})"
        )
