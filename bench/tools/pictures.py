"""The pictures of measurements, each a function from cases to named figures; those without data are left out.

    draw(cases, folder) -> paths      every picture of one device's cases, as PNG files

In each, filled marks and whole lines are ours, hollow marks and dashed lines are peers.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from bench.tools.measured import Case, format_ratio, is_number, spell

WIDTH, DOTS = 8.0, 120  # inches, and dots an inch: 960 pixels, what a README shows unscaled
OURS, PEERS = "#1f5fa8", ("#d1662b", "#5b8c3a", "#8a5aa8", "#a88c2b", "#777777")
MET, MISSED, NO_AIM = "#5b8c3a", "#c0392b", "#1f5fa8"
MOST_OPS = 10  # of a profile; the others are added up
MOST_BARS = 30  # of one chart of ratios
BATCH = ("batch", "B", "batch_size")
CONTEXT = ("context", "T", "block_size", "tokens")

Named = Iterator[tuple[str, Figure]]


def draw(cases: Sequence[Case], folder: Path) -> list[Path]:
    """Draw every picture that the cases have data for. Returns the files, in the order in which to show them."""
    paths = []
    for picture in PICTURES:
        for name, figure in picture(cases):
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.png"
            figure.savefig(path, dpi=DOTS, metadata={"Software": None})
            paths.append(path)
    return paths


def _figure(height: float, title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize=12)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _log(axes: Axes, which: str) -> None:
    """A logarithmic axis, its numbers written out: powers of two along x, 1, 2 and 5 of each decade along y."""
    for name in which:
        getattr(axes, f"set_{name}scale")("log", base=2 if name == "x" else 10)
        axis = getattr(axes, f"{name}axis")
        if name == "y":
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
        axis.set_minor_formatter(NullFormatter())


def _by_family(cases: Iterable[Case]) -> dict[str, list[Case]]:
    groups = defaultdict(list)
    for case in cases:
        groups[case.family].append(case)
    return groups


def claimed(cases: Sequence[Case]) -> list[Case]:
    """Without the backends of a kernel that nobody claims to be fast: the reference, and torch beside triton."""
    triton = {case.family for case in cases if case.info.get("backend") == "triton"}
    slower = {True: ("reference", "torch"), False: ("reference",)}
    return [case for case in cases if case.info.get("backend") not in slower[case.family in triton]]


def ratios(cases: Sequence[Case]) -> Named:
    """The speed relative to the best peer, with the aim of each."""
    groups = defaultdict(list)
    for case in claimed(cases):
        if case.best is not None:
            groups[case.group].append(case)
    for group, members in groups.items():
        name = group.replace("_", " ")
        for start in range(0, len(members), MOST_BARS):
            part = members[start : start + MOST_BARS]
            yield f"ratios {name} {start or ''}", _ratio_bars(part, f"{name}: ours against the best peer")


def _ratio_bars(cases: Sequence[Case], title: str) -> Figure:
    shown = [(case, case.best) for case in reversed(cases) if case.best is not None]
    figure, axes = _figure(1.3 + 0.42 * len(shown), title)
    aims = [case.info["aim"] if is_number(case.info.get("aim")) else None for case, _ in shown]
    right = 1.12 * max(1.0, *(best.ratio for _, best in shown), *(aim for aim in aims if aim))
    colours = [NO_AIM if case.aim is None else MET if case.aim.met else MISSED for case, _ in shown]
    axes.barh(range(len(shown)), [best.ratio for _, best in shown], color=colours)
    for at, ((_, best), aim) in enumerate(zip(shown, aims, strict=True)):
        noise = (best.ratio_spread or 0.0) / 2
        if noise:
            axes.errorbar(best.ratio, at, xerr=noise, ecolor="#333333", capsize=2)
        end = best.ratio + noise
        if aim is not None:
            axes.plot([aim, aim], [at - 0.45, at + 0.45], color="black", linewidth=2.2)
            end = max(end, aim) if aim < end + right / 10 else end  # the number stands clear of the line
        text = format_ratio(best.ratio)
        axes.annotate(text, (end, at), (5, 0), textcoords="offset points", va="center", fontsize=9)
    axes.axvline(1.0, color="#555555", linewidth=0.8, linestyle=":")
    one_family = len({case.family for case in cases}) == 1
    names = [spell(case.settings) if one_family and case.settings else case.title for case, _ in shown]
    labels = [f"{_short(name)}\nagainst {best.name}" for name, (_, best) in zip(names, shown, strict=True)]
    axes.set_yticks(range(len(shown)), labels)
    axes.tick_params(axis="y", labelsize=8.5)
    axes.grid(axis="y", visible=False)
    axes.set_xlim(0, right)
    legend = "black line: the aim; green met, red missed, blue without an aim"
    axes.set_xlabel(f"times as fast as the peer\n{legend}", fontsize=9)
    return figure


def _short(text: str, width: int = 60) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"


def rooflines(cases: Sequence[Case]) -> Named:
    """Each kernel's points below what memory and arithmetic allow; without operations, its bandwidth against size."""
    for family, members in _by_family(claimed(cases)).items():
        limited = [case for case in members if case.info.get("limit") and case.info.get("bytes")]
        counted = [case for case in limited if case.info.get("flops")]
        name = family.replace("_", " ")
        if counted:
            yield f"roofline {family}", _roofline(counted, f"{name}: roofline")
        elif limited:
            yield f"roofline {family}", _bandwidth(limited, f"{name}: bandwidth, against the size of the call")


def _bandwidth_of(case: Case) -> float:
    """The measured bytes a second that the case's limit was worked out from."""
    limit = case.info["limit"]
    if limit["by"] == "memory":
        return case.info["bytes"] / limit["seconds"]
    return max(value for key, value in limit.items() if key.endswith("_gbps") and is_number(value)) * 1e9


def _roofline(cases: Sequence[Case], title: str) -> Figure:
    figure, axes = _figure(4.6, title)
    intensity = [case.info["flops"] / case.info["bytes"] for case in cases]
    left, right = min(intensity) / 4, max(intensity) * 4
    bandwidth = max(_bandwidth_of(case) for case in cases)
    limits = [case.info["limit"] for case in cases]
    roofs = {
        limit.get("arithmetic", "matmul"): limit["matmul_tflops"] for limit in limits if limit.get("matmul_tflops")
    }
    top = max(roofs.values()) * 1e12 if roofs else bandwidth * right
    ridge = top / bandwidth  # operations per byte from which on arithmetic is the limit
    left = min(left, ridge / 4)
    axes.plot([left, ridge], [left * bandwidth / 1e12, top / 1e12], color="black", linewidth=1.3)
    middle = (left * ridge) ** 0.5
    label, place = f"memory {bandwidth / 1e9:,.0f} GB/s", (middle, middle * bandwidth / 1e12)
    axes.annotate(label, place, (8, -8), textcoords="offset points", fontsize=9)
    end = max(right, 4 * ridge)
    for name, roof in roofs.items():
        axes.plot([roof * 1e12 / bandwidth, end], [roof, roof], color="black", linewidth=1.3)
        label = f"{name} {roof:,.3g} TFLOP/s"
        axes.annotate(label, (end, roof), (0, 4), textcoords="offset points", ha="right", fontsize=9)
    _points(axes, cases, intensity, lambda case, seconds: case.info["flops"] / seconds / 1e12)
    _log(axes, "xy")
    axes.set_xlabel("operations per byte (FLOP/B)")
    axes.set_ylabel("speed (TFLOP/s)")
    axes.legend(loc="lower right", fontsize=9)
    return figure


def _bandwidth(cases: Sequence[Case], title: str) -> Figure:
    figure, axes = _figure(4.2, title)
    ceiling = max(_bandwidth_of(case) for case in cases) / 1e9
    axes.axhline(ceiling, color="black", linewidth=1.3, label=f"memory {ceiling:,.0f} GB/s")
    sizes = [case.info["bytes"] / 2**20 for case in cases]
    _points(axes, cases, sizes, lambda case, seconds: case.info["bytes"] / seconds / 1e9)
    _log(axes, "x")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("bytes that one call must move (MiB)")
    axes.set_ylabel("speed (GB/s)")
    axes.legend(fontsize=9)
    return figure


def _points(axes: Axes, cases: Sequence[Case], x: Sequence[float], speed: Callable[[Case, float], float]) -> None:
    """Ours and every peer, a mark for each case."""
    for colour, name in zip(PEERS * len(cases), _peer_names(cases), strict=False):
        pairs = [
            (at, speed(case, peer.seconds))
            for at, case in zip(x, cases, strict=True)
            for peer in case.peers
            if peer.name == name and peer.seconds
        ]
        if pairs:
            axes.plot(*zip(*pairs, strict=True), "o", markerfacecolor="none", color=colour, label=name)
    axes.plot(x, [speed(case, case.median) for case in cases], "o", color=OURS, label="ours")


def _peer_names(cases: Iterable[Case]) -> list[str]:
    return list(dict.fromkeys(peer.name for case in cases for peer in case.peers))


def tokens_per_second(cases: Sequence[Case]) -> Named:
    """Tokens a second against the batch, and against the context, where a benchmark has several of them."""
    for axis, names, label in (("batch", BATCH, "sequences in the batch"), ("context", CONTEXT, "context (tokens)")):
        for family, members in _by_family(cases).items():
            lines = {}
            for series, part in _series(members, names).items():
                if all(case.unit == "tokens" and case.units_per_second for case in part):
                    lines[series] = part
            if lines:
                figure, axes = _figure(4.4, f"{family.replace('_', ' ')}: tokens/s against the {axis}")
                _rates(axes, lines, names)
                axes.set_xlabel(label)
                axes.set_ylabel("tokens/s")
                yield f"tokens by {axis} {family}", figure


def _series(cases: Iterable[Case], names: Sequence[str]) -> dict[str, list[Case]]:
    """The cases that differ in one number alone, which is called one of `names`, by what they share; in its order."""
    groups = defaultdict(list)
    for case in cases:
        if case.number(*names) is not None:
            rest = {key: value for key, value in case.settings.items() if key not in names}
            groups[spell(rest)].append(case)
    sweeps = {series: sorted(part, key=lambda case: case.number(*names) or 0) for series, part in groups.items()}
    return {series: part for series, part in sweeps.items() if len({case.number(*names) for case in part}) > 1}


def _rates(axes: Axes, lines: dict[str, list[Case]], names: Sequence[str]) -> None:
    for colour, (series, part) in zip((OURS, *PEERS) * len(lines), lines.items(), strict=False):
        x = [case.number(*names) or 0 for case in part]
        axes.plot(x, [case.units_per_second or 0 for case in part], "o-", color=colour, label=f"ours {series}".strip())
        for style, name in zip(("--", ":", "-.") * len(part), _peer_names(part), strict=False):
            pairs = [
                (at, peer.units_per_second)
                for at, case in zip(x, part, strict=True)
                for peer in case.peers
                if peer.name == name and peer.units_per_second
            ]
            if pairs:
                line = f"{name} {series}".strip()
                axes.plot(*zip(*pairs, strict=True), f"o{style}", markerfacecolor="none", color=colour, label=line)
    _log(axes, "xy")
    axes.set_xticks(sorted({case.number(*names) or 0 for part in lines.values() for case in part}))
    axes.legend(fontsize=9)


def memory(cases: Sequence[Case]) -> Named:
    """Peak memory against T and against V: extra_info holds these as a list, and "peak_bytes" = {name: list}."""
    for axis, label in (("T", "T (tokens of a sequence)"), ("V", "V (vocabulary)")):
        for case in cases:
            places, peaks = case.info.get(axis), case.info.get("peak_bytes")
            if not isinstance(places, list) or not isinstance(peaks, dict):
                continue
            name = case.fullname.rpartition("::")[2].removeprefix("test_").replace("_", " ")
            figure, axes = _figure(4.4, f"{name}: peak memory")
            for colour, (backend, sizes) in zip((OURS, *PEERS) * len(peaks), peaks.items(), strict=False):
                axes.plot(places, [size / 2**20 for size in sizes], "o-", color=colour, label=backend)
            _log(axes, "xy")
            axes.set_xticks(places)
            axes.set_xlabel(label)
            axes.set_ylabel("peak memory (MiB)")
            axes.legend(fontsize=9)
            yield f"memory by {axis} {name}", figure


def allocation(cases: Sequence[Case]) -> Named:
    """Memory over one step: extra_info["allocation"] = {name: [[moment, bytes], ...]}, or bytes alone, one an event."""
    for case in cases:
        curves = case.info.get("allocation")
        if not curves:
            continue
        figure, axes = _figure(4.2, f"{case.title}: memory over one step")
        for colour, (name, curve) in zip((OURS, *PEERS) * len(curves), curves.items(), strict=False):
            x, y = zip(
                *(point if isinstance(point, list) else (at, point) for at, point in enumerate(curve)), strict=True
            )
            axes.plot(
                [at / x[-1] for at in x],
                [size / 2**20 for size in y],
                drawstyle="steps-post",
                color=colour,
                label=f"{name}: at most {max(y) / 2**20:,.0f} MiB",
            )
        axes.set_xlim(0, 1)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("through the step (0 its start, 1 its end)")
        axes.set_ylabel("allocated (MiB)")
        axes.legend(fontsize=9)
        yield f"allocation {case.title}", figure


def profile(cases: Sequence[Case]) -> Named:
    """The parts of a step's time: extra_info["profile"] = {variant: [{"op": name, "microseconds": time}, ...]}."""
    for case in cases:
        variants = case.info.get("profile")
        if variants:
            yield f"profile {case.title}", _profile(variants, case.title)


def _profile(variants: dict[str, list[dict[str, Any]]], title: str) -> Figure:
    times = {
        name: {entry["op"]: entry["microseconds"] / 1e3 for entry in entries} for name, entries in variants.items()
    }
    ops = {op for by_op in times.values() for op in by_op}
    largest = sorted(ops, key=lambda op: max(by_op.get(op, 0.0) for by_op in times.values()), reverse=True)[:MOST_OPS]
    rest = len(ops) - len(largest)
    names = [*largest, f"{rest} others"] if rest else largest
    figure, axes = _figure(1.6 + 0.3 * len(names) * len(variants), title)
    high = 0.8 / len(times)
    for number, (colour, (name, by_op)) in enumerate(zip((OURS, *PEERS) * len(times), times.items(), strict=False)):
        widths = [by_op.get(op, 0.0) for op in largest]
        widths += [sum(by_op.values()) - sum(widths)] if rest else []
        places = [at + (number - (len(times) - 1) / 2) * high for at in range(len(names))]
        axes.barh(places, widths, high, color=colour, label=f"{name}: {sum(by_op.values()):.3g} ms in all")
    axes.set_yticks(range(len(names)), [_short(op, 40) for op in names])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("time in one step (ms)")
    axes.legend(loc="lower right")
    return figure


PICTURES: tuple[Callable[[Sequence[Case]], Named], ...] = (
    ratios,
    profile,
    tokens_per_second,
    memory,
    allocation,
    rooflines,
)
