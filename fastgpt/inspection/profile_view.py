"""Shows a profile: tables on stdout, or one JSON object, and where asked for a picture and a Chrome trace."""

import re
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from fastgpt.checkpoint.source import Source
from fastgpt.config.inspection import ProfileConfig
from fastgpt.evaluation.report import print_json
from fastgpt.inspection import outputs, profile
from fastgpt.inspection.profile import Profile, Profiled, Row
from fastgpt.inspection.scopes import BACKWARD, FORWARD, module_of
from fastgpt.loggers import drawing
from fastgpt.model.facts import describe_shape
from fastgpt.ops import ceilings
from fastgpt.ops.ceilings import Ceilings
from fastgpt.system import tables
from fastgpt.system.device import describe
from fastgpt.system.units import counted

LONGEST_NAME = 60  # characters of an operation; those of compiled code have long names
MARK = ">"  # before the operation with the most to win
COLOURS = {FORWARD: "#4477aa", BACKWARD: "#ee9955", "": "#889988"}
NAMES = re.compile(rb'("(?:host_name|traceName)": *)"(?:[^"\\]|\\.)*"')  # in a trace
Times = Mapping[str, float]  # seconds by direction


def show(config: ProfileConfig, source: Source | None, why: str) -> int:
    """Profile the work and show it. Returns the exit code.

    Args:
        why: a line on how the settings were chosen.

    Raises:
        UsageError: the settings or the machine make it impossible, or a file cannot be written.
    """
    paths = {setting: outputs.check(setting, name) for setting, name in config.outputs.items()}
    unsaid = [why]  # until the first line of progress, before which everything is checked

    def say(text: str) -> None:
        print(*unsaid, text, sep="\n", file=sys.stderr)
        unsaid.clear()

    measured = (profile.generation if config.generate else profile.training)(config, source, say)
    say(f"measuring the bandwidth and the matrix products of {describe(measured.device)}, a few seconds")
    found = ceilings.measure(measured.device)
    profiles = [one.against(found) for one in measured.profiles]
    if config.json:
        print_json(as_json(config, measured, profiles, found))
    else:
        _print_all(config, measured, profiles, found)
    if path := paths.get("png"):
        outputs.save("png", path, [picture(config, measured, profiles)], beside=True)
    if path := paths.get("trace"):
        outputs.save("trace", path, [_trace(measured)], beside=True)
    return 0


def modules(one: Profile) -> dict[str, Times]:
    """Seconds of each module by direction; they add up to the whole."""
    found = defaultdict[str, defaultdict[str, float]](lambda: defaultdict(float))
    for place, seconds in one.places.items():
        found[module_of(place)][place.direction] += seconds
    return {name: dict(times) for name, times in found.items()}


def as_json(config: ProfileConfig, measured: Profiled, profiles: Sequence[Profile], found: Ceilings) -> dict[str, Any]:
    """All numbers, times in seconds."""
    return {
        "device": describe(measured.device),
        "arithmetic": measured.arithmetic,
        "compiled": measured.compiled,
        "model": _model(config),
        "ceilings": {
            "copy_bandwidth": found.copy_bandwidth,
            "read_bandwidth": found.read_bandwidth,
            "matmul": found.matmul,
        },
        "profiles": [
            {
                "what": one.what,
                "seconds": one.seconds,
                "seconds_without_profiler": one.plain,
                "profiled": one.taken,
                "kept": one.kept,
                "limit": one.least,
                "operations": [_row_values(row, one) for row in one.rows],
                "modules": modules(one),
            }
            for one in profiles
        ],
    }


def _row_values(row: Row, one: Profile) -> dict[str, Any]:
    return {
        "operation": row.name,
        "calls": row.calls,
        "seconds": row.total,
        "by_direction": dict(row.seconds),
        "share": row.total / one.seconds,
        "flops": row.work and row.work.calls * sum(count.flops for count in row.work.counts.values()),
        "bytes": row.work and row.work.calls * sum(count.bytes for count in row.work.counts.values()),
        "limit": row.limit and row.limit.seconds,
        "limit_by": row.limit and row.limit.by,
        "limit_reached": row.reached,
        "most_to_win": row.gain,
    }


def _print_all(config: ProfileConfig, measured: Profiled, profiles: Sequence[Profile], found: Ceilings) -> None:
    console = tables.console()
    rate = found.matmul[measured.arithmetic]
    console.print(_model(config))
    console.print(
        f"{measured.arithmetic} on {describe(measured.device)}; ceilings {found.bandwidth / 1e9:,.1f} GB/s, "
        f"{rate / 1e9:,.4g} GFLOP/s"
    )
    for one in profiles:
        console.print()
        console.print(heading(one))
        console.print()
        console.print(_operations(one))
        console.print()
        for line in notes(one, compiled=measured.compiled):
            console.print(line)
        if not measured.compiled:
            console.print()
            console.print(_modules(one, config.n_layer))


def heading(one: Profile) -> str:
    """The lines above the tables: the piece of work, and the measurements behind the numbers."""
    kept = f"the middle {one.kept} of {one.taken}" if one.kept < one.taken else f"{one.kept}"
    return (
        f"{one.what}: {_ms(one.plain)} ms, and {_ms(one.seconds)} ms under the profiler;\n"
        f"times below are under the profiler, means of {kept}, in ms"
    )


def notes(one: Profile, *, compiled: bool) -> list[str]:
    """The operation in which the most time could be won, and what the table cannot show."""
    lines = []
    if (row := one.most_to_win) is not None and row.limit is not None:
        lines.append(
            f"{MARK} most to win: {_short(row.name)}, {_ms(row.gain)} of {_ms(one.seconds)} ms above its limit "
            f"({row.limit.by})"
        )
    if compiled:
        lines.append("compiled code has no modules: its calls and kernels go by PyTorch's names")
    elif any((row.reached or 0) > 1 for row in one.rows):
        lines.append(
            "above 100%: its data stay in the caches, which are faster than the memory, or the machine was busier "
            "while its ceilings were measured"
        )
    return lines


def _operations(one: Profile) -> Table:
    directions = _directions(one)
    table = _table("operation", "calls", *directions, "ms", "share", "limit", "reached")
    for row in one.rows:
        mark = MARK if row is one.most_to_win else " "
        parts = [_ms(row.seconds[name]) if name in row.seconds else "" for name in directions]
        limit = ("", "") if row.limit is None else (_ms(row.limit.seconds), f"{row.reached or 0:.0%}")
        calls = f"{row.calls:g}" if row.calls else ""
        table.add_row(
            f"{mark} {_short(row.name)}", calls, *parts, _ms(row.total), f"{row.total / one.seconds:.1%}", *limit
        )
    table.add_section()
    sums = [_ms(sum(row.seconds.get(name, 0.0) for row in one.rows)) for name in directions]
    total, least = sum(row.total for row in one.rows), one.least or 0.0
    table.add_row("  in all", "", *sums, _ms(total), f"{total / one.seconds:.1%}", _ms(least), f"{least / total:.0%}")
    return table


def _directions(one: Profile) -> list[str]:
    """The directions that have columns of their own; none where all is forward."""
    return [FORWARD, BACKWARD] if any(place.direction == BACKWARD for place in one.places) else []


def _modules(one: Profile, layers: int) -> Table:
    """A row for each module, the layers in one with its parts below, and the fastest and the slowest layer."""
    found, directions = modules(one), _directions(one)
    table = _table("module", *directions, "ms", "share")

    def add(name: str, *times: Times) -> None:
        ways = [sum(own.get(way, 0.0) for own in times) for way in directions]
        whole = sum(sum(own.values()) for own in times)
        table.add_row(name, *(_ms(way) if way else "" for way in ways), _ms(whole), f"{whole / one.seconds:.1%}")

    def of(layer: int | None, part: str | None = None) -> list[Times]:
        """Those of a layer, or of all, and of a part of it."""
        kept = []
        for name, times in found.items():
            head, _, rest = name.partition(".")
            number, _, its = rest.partition(".")
            if head == "h" and layer in (None, int(number)) and part in (None, its):
                kept.append(times)
        return kept

    add("embedding", found.get("embedding", {}))
    if of(None):
        add(f"h.0 to h.{layers - 1}, {counted(layers, 'layer')}" if layers > 1 else "h.0", *of(None))
        for part in ("norms", "attn", "mlp", ""):
            if times := of(None, part):
                add(f"  {part or 'rest'}", *times)
        if layers > 1:
            order = sorted(range(layers), key=lambda layer: sum(sum(times.values()) for times in of(layer)))
            add(f"  fastest: h.{order[0]}", *of(order[0]))
            add(f"  slowest: h.{order[-1]}", *of(order[-1]))
    for name in ("ln_f", "head", "optimizer", "other"):
        if name in found:
            add(name, found[name])
    return table


def _table(*columns: str) -> Table:
    """A table whose first column has names, which may be long, and the others numbers."""
    table = Table(box=box.SIMPLE, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for at, name in enumerate(columns):
        table.add_column(name, justify="right" if at else "left", no_wrap=at > 0, overflow="fold")
    return table


def picture(config: ProfileConfig, measured: Profiled, profiles: Sequence[Profile]) -> bytes:
    """A PNG: a bar of time for each operation, and a line at its limit."""
    from matplotlib.figure import Figure

    heights = [1.5 + 0.3 * len(one.rows) for one in profiles]
    figure = Figure(figsize=(9, 0.5 + sum(heights)), dpi=120, layout="constrained")
    figure.suptitle(f"{_model(config)}\n{measured.arithmetic} on {describe(measured.device)}", fontsize=10)
    parts = figure.subplots(len(profiles), height_ratios=heights, squeeze=False)[:, 0]
    for axes, one in zip(parts, profiles, strict=True):
        _bars(axes, one)
    return drawing.render(figure)


def _bars(axes: Any, one: Profile) -> None:
    ways = [way for way in (FORWARD, BACKWARD) if any(way in row.seconds for row in one.rows)]
    ends = [0.0] * len(one.rows)
    for way in (*ways, ""):
        widths = [_in_way(row, way) * 1e3 for row in one.rows]
        if any(widths):
            axes.barh(range(len(ends)), widths, left=ends, color=COLOURS[way], label=way or "update and other")
            ends = [end + width for end, width in zip(ends, widths, strict=True)]
    right = 1.25 * max(ends)
    label = "limit: the least that memory or arithmetic allow"
    for at, (row, end) in enumerate(zip(one.rows, ends, strict=True)):
        text = f"{row.total / one.seconds:.1%}"
        if row.limit is not None and row.reached is not None:
            text += f", {row.reached:.0%} of the limit"
            limit = row.limit.seconds * 1e3
            if limit <= right:
                axes.plot([limit, limit], [at - 0.4, at + 0.4], color="black", linewidth=2, label=label)
                label, end = "_", max(end, limit) if limit < end + 0.3 * right else end
        axes.annotate(text, (end, at), (5, 0), textcoords="offset points", va="center", fontsize=8)
    most = one.most_to_win
    axes.set_yticks(range(len(ends)), [f"{MARK} {_short(r.name)}" if r is most else _short(r.name) for r in one.rows])
    axes.invert_yaxis()
    axes.set_xlim(0, right)
    axes.set_xlabel(f"ms of a {one.what} ({_ms(one.seconds)} ms, without the profiler {_ms(one.plain)} ms)", fontsize=9)
    axes.tick_params(labelsize=8.5)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), ncols=4, frameon=False)


def _in_way(row: Row, way: str) -> float:
    """Seconds in this direction; "" is all that is neither forward nor backward."""
    return row.seconds.get(way, 0.0) if way else row.total - sum(row.seconds.get(w, 0.0) for w in (FORWARD, BACKWARD))


def _trace(measured: Profiled) -> bytes:
    """The profile as a Chrome trace, without the name of the host and the path of the file."""
    with tempfile.TemporaryDirectory(prefix="fastgpt-") as folder:
        path = Path(folder) / "trace.json"
        measured.trace.export_chrome_trace(str(path))
        return NAMES.sub(rb'\1""', path.read_bytes())


def _model(config: ProfileConfig) -> str:
    return f"{describe_shape(config)}, vocabulary {config.known_vocab:,}"


def _ms(seconds: float) -> str:
    """Milliseconds with about three digits."""
    ms = seconds * 1e3
    return f"{ms:,.0f}" if ms >= 100 else f"{ms:.1f}" if ms >= 10 else f"{ms:.2f}" if ms >= 0.1 else f"{ms:.3f}"


def _short(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"
