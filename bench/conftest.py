"""What every benchmark shares: rounds that time the peers beside us, the machine's ceilings, a summary, clean results.

Two programs on a shared machine are only comparable within one run, so each round runs us and every peer once.
"""

import dataclasses
import json
import platform
import random
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.tools.machine import cpu_instructions, gpu_driver, triton_version
from bench.tools.progress import commit_of
from bench.tools.timing import Clock, call_memory, spread
from fastgpt.ops.ceilings import Ceilings, dtype_name, measure
from fastgpt.system.device import describe, peak_memory, resolve_device
from fastgpt.system.files import write_atomic

CEILINGS = pytest.StashKey[Ceilings]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastgpt's benchmarks")
    group.addoption("--ceilings", metavar="FILE", type=Path, help="read the machine's ceilings, or write them there")
    group.addoption("--pictures", metavar="DIR", type=Path, help="draw what the benchmarks can show into this folder")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the benchmarks run: the GPU if there is one."""
    return resolve_device("auto")


@pytest.fixture(scope="session")
def ceilings(request: pytest.FixtureRequest, device: torch.device) -> Ceilings:
    """This machine's bandwidth and matrix products, measured once a run (or once a file, with --ceilings)."""
    file: Path | None = request.config.getoption("--ceilings")
    if file is not None and file.exists():
        measured = Ceilings(**json.loads(file.read_text()))
    else:
        measured = measure(device)
        if file is not None:
            write_atomic(file, json.dumps(dataclasses.asdict(measured)))
    request.config.stash[CEILINGS] = measured
    return measured


@pytest.fixture
def clock(request: pytest.FixtureRequest, device: torch.device) -> Clock:
    """The clock of one benchmark; pytest-benchmark reads it too."""
    clock = Clock(device)
    mark = request.node.get_closest_marker("benchmark")
    options = (mark.kwargs if mark else {}) | {"timer": clock.read}
    request.node.add_marker(pytest.mark.benchmark(**options), append=False)
    return clock


@pytest.fixture
def against(clock: Clock, benchmark, request: pytest.FixtureRequest) -> Callable[..., dict[str, float]]:
    """Time `ours` against its peers in the same rounds; returns how many times faster than each peer ours is."""

    def compare(
        ours: Callable[[], Any],
        peers: Mapping[str, Callable[[], Any]],
        *,
        rounds: int,
        in_a_row: int = 1,
        units: float,
        unit: str = "tokens",
        flops: float | None = None,
        bytes: float | None = None,
        arithmetic: torch.dtype | str = torch.float32,
        aim: float | None = None,
        aim_peer: str | None = None,
        launching: bool = True,
        settle: Callable[[], Any] = lambda: None,
        **info: Any,
    ) -> dict[str, float]:
        """
        Args:
            ours: what is measured.
            peers: what it is measured against, by name; may be empty.
            rounds: how often each is timed, after one call to warm up.
            in_a_row: so many calls of each follow one another in a round, and their mean counts.
            units: what one call of `ours` produces, in `unit`s; the peers produce the same.
            flops, bytes: what one call computes, and moves at the least; either sets a limit.
            arithmetic: the dtype of its matrix products, or "tf32".
            aim: the ratio aimed at, against `aim_peer` or else the best peer.
            settle: called after each call, untimed: waits for what the call has left under way.
            launching: count the time that Python needs to launch work on a GPU; False times the kernels alone.
            info: goes to the results.

        Returns:
            For each peer, its median time divided by ours.
        """
        if aim_peer is not None and aim_peer not in peers:
            raise ValueError(f"aim_peer {aim_peer!r} is not among the peers: {', '.join(peers) or 'none'}")
        calls, memory, order = {**peers, "": ours}, {}, random.Random(0)
        for name, call in calls.items():
            call()  # compile, allocate
            settle()
            if clock.device.type == "cuda":
                memory[name] = call_memory(call, clock.device)
        timed = clock.wall if launching else clock.kernels
        turns = {name: call if in_a_row == 1 else repeated(call, in_a_row) for name, call in calls.items()}
        seconds: dict[str, list[float]] = {name: [] for name in calls}

        def time_all() -> None:
            """Each once, in an order drawn anew, as what ran before leaves its mark: on caches, clocks, threads."""
            for name in order.sample(list(calls), len(calls)):
                seconds[name].append(timed(turns[name]) / in_a_row)
                settle()
            clock.count(seconds[""][-1])

        benchmark.pedantic(time_all, rounds=rounds)
        own = statistics.median(seconds.pop(""))
        rows = {name: peer_row(times, own, units) for name, times in seconds.items()}
        for name in rows.keys() & memory.keys():
            rows[name]["call_memory"] = memory[name][1]
        best = min(rows, key=lambda name: rows[name]["seconds"], default=None)
        judged = aim_peer or best
        benchmark.extra_info |= info | {
            "in_a_row": in_a_row,
            "unit": unit,
            "units_per_second": units / own,
            "flops": flops,
            "bytes": bytes,
            "tflops": flops / own * 1e-12 if flops else None,
            "gbps": bytes / own * 1e-9 if bytes else None,
            "peak_memory": memory[""][0] if memory else peak_memory(clock.device),
            "call_memory": memory[""][1] if memory else None,
            "peers": rows,
            "best_peer": best,
            "ratio": rows[judged]["ratio"] if judged else None,
            "aim": aim,
            "aim_peer": aim_peer,
        }
        if flops or bytes:
            limit = limit_row(request.getfixturevalue("ceilings"), bytes or 0, flops or 0, arithmetic)
            benchmark.extra_info |= {"limit": limit, "percent_of_limit": 100 * limit["seconds"] / own}
        return {name: row["ratio"] for name, row in rows.items()}

    return compare


def repeated(call: Callable[[], Any], times: int) -> Callable[[], None]:
    def calls() -> None:
        for _ in range(times):
            call()

    return calls


def peer_row(times: list[float], own: float, units: float) -> dict[str, float]:
    """What the results say of a peer, beside our own median time."""
    median = statistics.median(times)
    return {"seconds": median, "spread": spread(times), "units_per_second": units / median, "ratio": median / own}


def limit_row(ceilings: Ceilings, bytes: float, flops: float, arithmetic: torch.dtype | str) -> dict[str, Any]:
    """What the results say of the limit."""
    limit = ceilings.limit(bytes=bytes, flops=flops, arithmetic=arithmetic)
    rate = ceilings.matmul.get(dtype_name(arithmetic))
    return dataclasses.asdict(limit) | {
        "arithmetic": dtype_name(arithmetic),
        "copy_gbps": ceilings.copy_bandwidth * 1e-9,
        "read_gbps": ceilings.read_bandwidth * 1e-9,
        "matmul_tflops": rate * 1e-12 if rate else None,
    }


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Say what the numbers depend on, and not whose machine it was."""
    brand = machine_info.get("cpu", {}).get("brand_raw", platform.processor())
    machine_info.clear()
    machine_info |= {
        "cpu": brand,
        "instructions": cpu_instructions(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "device": describe(resolve_device("auto")),
        "torch": torch.__version__,
        "triton": triton_version(),
        "python": platform.python_version(),
    }
    if torch.cuda.is_available():
        machine_info |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "driver": gpu_driver()}
    if measured := config.stash.get(CEILINGS, None):
        machine_info["ceilings"] = dataclasses.asdict(measured)


def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict[str, Any]) -> None:
    commit_info.clear()
    commit_info["id"] = commit_of(Path(__file__).parent) or "unknown"


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    """A line a comparison, and apart from them the aims that were missed."""
    session = getattr(config, "_benchmarksession", None)
    rows = [(b.name, b.extra_info) for b in session.benchmarks if "units_per_second" in b.extra_info] if session else []
    if not rows:
        return
    terminalreporter.section("measured within one run, each peer beside us")
    for name, info in rows:
        terminalreporter.write_line(summary_line(name, info))
    for name, info in rows:
        if missed(info):
            judged = info["aim_peer"] or info["best_peer"]
            text = f"AIM MISSED {name}: {info['ratio']:.2f} of {info['aim']:g} against {judged}"
            terminalreporter.write_line(text, red=True)


def missed(info: dict[str, Any]) -> bool:
    return info["aim"] is not None and (info["ratio"] is None or info["ratio"] < info["aim"])


def summary_line(name: str, info: dict[str, Any]) -> str:
    """One comparison: what it does a second, how near the limit it is, and how many times faster than each peer."""
    parts = [f"{name:<60} {info['units_per_second']:>12,.5g} {info['unit']}/s"]
    if limit := info.get("limit"):
        parts.append(f"{info['percent_of_limit']:3.0f}% of {limit['by']}")
    parts += [f"{row['ratio']:.2f}x {peer}" for peer, row in info["peers"].items()]
    if info["aim"] is not None:
        parts.append(f"aim {info['aim']:g} {'MISSED' if missed(info) else 'met'}")
    return "  ".join(parts)
