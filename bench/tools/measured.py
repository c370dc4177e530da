"""Result files as typed rows: what `pytest bench/ --benchmark-json FILE` wrote, in the newer and the older keys.

read(path) -> Run        every case of one file. Raises UsageError, naming the file, where it is missing or broken.
latest(runs) -> cases    the newest measurement of each case, for one device
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgpt.errors import UsageError

FEWEST_ROUNDS = 3  # below, the quartiles say nothing about noise


@dataclass(frozen=True)
class Peer:
    """What the case was measured against. Seconds of one call; spread is their interquartile range, None if unknown."""

    name: str
    seconds: float | None
    spread: float | None
    units_per_second: float | None
    ratio: float
    """How many times faster ours is."""
    ratio_spread: float | None
    """The interquartile range of the ratio, from both sides' as if they were independent."""


@dataclass(frozen=True)
class Aim:
    """What a case was meant to reach, in words, and whether it did."""

    text: str
    met: bool


@dataclass(frozen=True)
class Case:
    """One benchmark of one run. Times are in seconds, memory in bytes; None where the file does not say."""

    fullname: str
    group: str
    """pytest-benchmark's group, or what the file is about: "train" for bench_train.py."""
    family: str
    """What has a picture of its own: pytest-benchmark's group, or else the benchmark's function."""
    params: dict[str, Any]
    info: dict[str, Any]
    """extra_info as it stands."""
    median: float
    quartiles: tuple[float, float]
    rounds: int
    unit: str
    units_per_second: float | None
    peers: tuple[Peer, ...]
    best: Peer | None
    """The peer that the aim is about."""
    aim: Aim | None

    @property
    def title(self) -> str:
        """The family in words and its settings; the aim has a column of its own."""
        words = self.family.replace("_", " ")
        shown = spell(self.settings)
        return f"{words}: {shown}" if shown else words

    @property
    def settings(self) -> dict[str, Any]:
        """The case within its family: the parameters, or the backend, dtype and shape of a kernel's case."""
        if not isinstance(shape := self.info.get("shape"), dict):
            return {name: value for name, value in self.params.items() if name != "aim"}
        return {name: self.info[name] for name in ("backend", "dtype") if name in self.info} | shape

    @property
    def has_spread(self) -> bool:
        return self.rounds >= FEWEST_ROUNDS

    def number(self, *names: str) -> float | None:
        """The first of these settings or facts that is a number."""
        for name in names:
            for value in (self.settings.get(name), self.info.get(name)):
                if is_number(value):
                    return value
        return None


@dataclass(frozen=True)
class Run:
    """One result file."""

    path: Path
    device: str
    """The folder under results/, or a name made from the machine's."""
    machine: str
    torch: str
    date: str
    commit: str
    cases: tuple[Case, ...]
    failures: tuple[dict[str, Any], ...]
    """What bench/survey.py could not measure."""


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def read(path: Path) -> Run:
    """The cases of a result file. Raises `UsageError`."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        machine = content["machine_info"]
        described = machine.get("device", "unknown device")
        if described.startswith("CPU"):
            parts = machine["cpu"], machine.get("instructions"), described.removeprefix("CPU, ")
            described = ", ".join(part for part in parts if part)
        return Run(
            path,
            device_folder(path, described),
            described,
            machine.get("torch", "unknown"),
            content["datetime"][:19],
            content["commit_info"].get("id", "unknown")[:7],
            tuple(normalise(case) for case in content["benchmarks"]),
            tuple(content.get("failures", ())),
        )
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; give a file of pytest bench/ --benchmark-json FILE") from None
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        what = f"it lacks {error}" if isinstance(error, LookupError) else str(error)
        raise UsageError(f"{path} is no result of pytest bench/ --benchmark-json FILE: {what}") from None


def device_folder(path: Path, machine: str) -> str:
    """The folder of a file under results/; elsewhere a name in the same manner."""
    folders = path.resolve().parent.parts
    if "results" in folders[:-1]:
        return folders[len(folders) - 1 - folders[::-1].index("results") + 1]
    return re.sub(r"[^a-z0-9]+", "-", machine.lower()).strip("-")


def normalise(case: Mapping[str, Any]) -> Case:
    """One entry of a file's `benchmarks`, whatever its keys' age."""
    # Files from before December 2026 say "column" for "backend".
    info = {"backend" if name == "column" else name: value for name, value in case["extra_info"].items()}
    stats = case["stats"]
    median, quartiles = stats["median"], (stats["q1"], stats["q3"])
    ours = (quartiles[1] - quartiles[0]) / median if stats["rounds"] >= FEWEST_ROUNDS else None
    peers = tuple(_peer(name, peer, ours) for name, peer in _peers(info).items())
    named = info.get("aim_peer") or info.get("best_peer")
    best = next((p for p in peers if p.name == named), min(peers, key=lambda p: p.ratio, default=None))
    file, _, name = case["fullname"].partition("::")
    return Case(
        fullname=case["fullname"],
        group=case["group"] or Path(file).stem.removeprefix("bench_"),
        family=case["group"] or re.sub(r"\[.*", "", name, flags=re.S).removeprefix("test_"),
        params=case["params"] or {},
        info=info,
        median=median,
        quartiles=quartiles,
        rounds=stats["rounds"],
        unit=info.get("unit", "tokens"),
        units_per_second=info.get("units_per_second", info.get("tokens_per_second")),
        peers=peers,
        best=best,
        aim=_aim(info, median, best),
    )


def _peers(info: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    """Every peer's facts, which older files hold for one peer, beside ours."""
    if "peer_name" not in info:
        return info.get("peers") or {}
    seconds, rate, ratio = (info.get(key) for key in ("peer_seconds", "peer_tokens_per_second", "ratio"))
    return {info["peer_name"]: {"seconds": seconds, "units_per_second": rate, "ratio": ratio}}


def _peer(name: str, facts: Mapping[str, Any], ours: float | None) -> Peer:
    """ours: our own interquartile range as a share of the median, None where unknown."""
    seconds, spread, ratio = facts.get("seconds"), facts.get("spread"), facts["ratio"]
    ratio_spread = None
    if ours is not None and seconds and spread is not None:
        ratio_spread = ratio * math.hypot(ours, spread / seconds)
    return Peer(name, seconds, spread, facts.get("units_per_second"), ratio, ratio_spread)


def _aim(info: Mapping[str, Any], median: float, best: Peer | None) -> Aim | None:
    """The aim, of whichever kind: a ratio, a time, or a growth that stays below."""
    if is_number(info.get("aim")) and best is not None:
        return Aim(f"≥ {info['aim']:g}", best.ratio >= info["aim"])
    if is_number(info.get("aim_seconds")):
        aim = info["aim_seconds"]
        return Aim(f"≤ {aim:g} s" if aim >= 1e-3 else f"≤ {aim * 1e6:g} µs", median <= aim)
    if is_number(info.get("aim_below")) and is_number(info.get("growth")):
        return Aim(f"growth ≤ {info['aim_below']:g}", info["growth"] <= info["aim_below"])
    return None


def spell(settings: Mapping[str, object]) -> str:
    """Settings in words: a word says itself, a number needs its name, and a switch is there or not."""
    words = []
    for name, value in settings.items():
        if isinstance(value, str):
            words.append(value)
        elif value is not None and value is not False:
            words.append(name if value is True else f"{name} {value}")
    return ", ".join(words)


def latest(runs: Iterable[Run]) -> list[Case]:
    """The newest measurement of each case, in the order in which the cases were first measured."""
    newest: dict[str, Case] = {}
    for run in sorted(runs, key=lambda run: run.date):
        newest |= {case.fullname: case for case in run.cases}
    return list(newest.values())


def by_device(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs of each device, newest first."""
    devices = sorted({run.device for run in runs})
    return {
        device: sorted((run for run in runs if run.device == device), key=lambda run: run.date, reverse=True)
        for device in devices
    }


def format_time(seconds: float) -> str:
    """Three digits and the unit that suits them: 2.14 s, 33.6 ms, 780 µs."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{_digits(seconds / size)} {unit}"
    return f"{_digits(seconds * 1e9)} ns"


def format_rate(rate: float | None) -> str:
    return "" if rate is None else f"{rate:,.0f}" if rate >= 100 else _digits(rate)


def format_ratio(ratio: float) -> str:
    """Two decimals, and three below 1, so that a narrow miss does not look like a hit."""
    return f"{ratio:.2f}" if ratio >= 1 else f"{ratio:.3f}"


def _digits(number: float) -> str:
    """Three of them, at the least."""
    return f"{number:,.{0 if number >= 100 else 1 if number >= 10 else 2}f}"
