"""Tables and pictures of what was measured, and what changed between two measurements.

    python bench/report.py [RESULT.json ...] [--out DIR]    default: every file under bench/results/
    python bench/report.py --compare A.json B.json

The first writes DIR/README.md (DIR: bench/results) with a table for each file and group, newest first, and the
pictures of each device's newest measurements into DIR/<device>/pictures/.

The second prints what changed from A to B beyond the noise. The rule: the noise of a case is the interquartile range of
its rounds, and its time has changed where the two ranges from the first to the third quartile do not overlap. Its ratio
to the peer, which shares the machine's moods, has changed where ratio +- half its interquartile range do not overlap
(the ranges of both sides, added as independent ones). A case with fewer than 3 rounds in either file shows no noise,
and is only counted. Exit code 0, also where something changed; 2 with one line for a file that is missing or broken.
"""

# isort: off
import tool  # finds the engine

# isort: on
import os
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fastgpt import cli
from fastgpt.errors import UsageError
from fastgpt.system.files import write_atomic
from measured import Case, Peer, Run, by_device, format_rate, format_ratio, format_time, latest, read

HEADER = """# Measured

Written by `python bench/report.py` from the files beside it; do not edit. Each ratio is ours against a peer in the same
run, in alternating rounds: above 1, ours is faster. ± is half the interquartile range of the rounds. The share of the
limit is the least time that the machine's own bandwidth or matrix products, measured in the same run, allow a call,
against the time that it took.
"""


def write(runs: Sequence[Run], out: Path) -> list[Path]:
    """Write README.md and the pictures under `out`. Returns the files."""
    from pictures import draw

    sections, paths = [HEADER], []
    for device, its_runs in by_device(runs).items():
        sections.append(f"## {device}\n")
        drawn = draw(latest(its_runs), out / device / "pictures")
        sections += [f"![{path.stem.replace('-', ' ')}]({_link(path, out)})\n" for path in drawn]
        sections += [section for run in its_runs for section in _run_section(run, out)]
        paths += drawn
    readme = out / "README.md"
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(readme, "\n".join(sections))
    return [readme, *paths]


def _link(path: Path, folder: Path) -> str:
    return Path(os.path.relpath(path, folder)).as_posix()


def _run_section(run: Run, out: Path) -> list[str]:
    when = run.date.replace("T", " ")[:16]
    lines = [
        f"### {when}, commit {run.commit}\n",
        f"{run.machine}; torch {run.torch}; [{run.path.name}]({_link(run.path, out)})\n",
    ]
    groups: dict[str, list[Case]] = defaultdict(list)
    for case in run.cases:
        groups[case.group].append(case)
    for group, cases in groups.items():
        lines += [f"**{group}**\n", markdown(COLUMNS, [line for case in cases for line in table_lines(case)])]
    if run.failures:
        rows = [[f["nodeid"], f["outcome"], f["line"]] for f in run.failures]
        lines += ["**not measured**\n", markdown(("case", "outcome", "last line"), rows)]
    return lines


COLUMNS = ("case", "time", "ours /s", "against", "peer /s", "ratio", "aim", "of the limit", "memory")


def table_lines(case: Case) -> list[list[str]]:
    """A line for the case with the peer that its aim is about, and one for each other peer."""
    percent = case.info.get("percent_of_limit")
    limit = "" if percent is None else f"{percent:.0f}% ({case.info['limit']['by']})"
    peak = case.info.get("peak_memory")
    time = format_time(case.median)
    if case.has_spread:
        time += f" ± {(case.quartiles[1] - case.quartiles[0]) / 2 / case.median:.0%}"
    rate = f"{format_rate(case.units_per_second)} {case.unit}" if case.units_per_second else ""
    aim = f"{case.aim.text}: {'met' if case.aim.met else 'missed'}" if case.aim else ""
    memory = "" if peak is None else f"{peak / 2**20:,.0f} MiB"
    first = [case.title, time, rate, *_peer_cells(case.best), aim, limit, memory]
    others = [["", "", "", *_peer_cells(peer), "", "", ""] for peer in case.peers if peer is not case.best]
    return [first, *others]


def _peer_cells(peer: Peer | None) -> list[str]:
    if peer is None:
        return ["", "", ""]
    spread = "" if peer.ratio_spread is None else f" ± {peer.ratio_spread / 2:.2f}"
    return [peer.name, format_rate(peer.units_per_second), f"{format_ratio(peer.ratio)}{spread}"]


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, without the columns that are empty in every row."""
    kept = [at for at in range(len(columns)) if any(row[at] for row in rows)]
    lines = [[columns[at] for at in kept], ["---"] * len(kept)]
    lines += [[row[at].replace("|", "\\|").replace("\n", " ") for at in kept] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def time_changed(a: Case, b: Case) -> bool:
    """Whether the middle halves of the rounds lie apart."""
    return a.quartiles[1] < b.quartiles[0] or b.quartiles[1] < a.quartiles[0]


def ratio_changed(a: Case, b: Case) -> bool:
    """Whether the ratios to the peer lie further apart than their noise; False where either is not known."""
    if a.best is None or b.best is None or a.best.name != b.best.name:
        return False
    spreads = (a.best.ratio_spread, b.best.ratio_spread)
    if spreads[0] is None or spreads[1] is None:
        return False
    return abs(a.best.ratio - b.best.ratio) > (spreads[0] + spreads[1]) / 2


def compare(a: Run, b: Run, console: Console) -> None:
    """Print what changed from a to b, cases in only one of them, and how many stayed as they were."""
    before, after = ({case.fullname: case for case in run.cases} for run in (a, b))
    pairs = [(before[name], after[name]) for name in before if name in after]
    known = [(x, y) for x, y in pairs if x.has_spread and y.has_spread]
    changed = [(x, y) for x, y in known if time_changed(x, y) or ratio_changed(x, y)]
    for letter, run in (("A", a), ("B", b)):
        console.print(f"{letter}  {run.path}: {run.date[:10]}, commit {run.commit}, {run.machine}", highlight=False)
    if a.machine != b.machine:
        console.print("[yellow]These are different machines: read the ratios, not the times.[/]")
    if changed:
        _print_changes(changed, console)
    for letter, names in (("A", before.keys() - after.keys()), ("B", after.keys() - before.keys())):
        for name in sorted(names):
            console.print(f"only in {letter}: {name}", highlight=False, markup=False)
    without = (
        f"; {len(pairs) - len(known)} with fewer than 3 rounds, so without a known noise" if pairs != known else ""
    )
    console.print(f"{len(changed)} changed, {len(known) - len(changed)} within the noise{without}", highlight=False)


def _print_changes(changed: Iterable[tuple[Case, Case]], console: Console) -> None:
    table = Table(box=None, padding=(0, 1))
    table.add_column("case", overflow="fold")
    for name in ("time A", "time B", "change", "ratio A", "ratio B", "what changed"):
        table.add_column(name, justify="right", no_wrap=True)
    for x, y in changed:
        parts = [name for name, is_so in (("time", time_changed(x, y)), ("ratio", ratio_changed(x, y))) if is_so]
        colour = "green" if y.median < x.median else "red"
        table.add_row(
            x.title,
            *(f"{format_time(c.median)} ± {(c.quartiles[1] - c.quartiles[0]) / 2 / c.median:.0%}" for c in (x, y)),
            f"[{colour}]{y.median / x.median - 1:+.1%}[/]",
            *(_peer_cells(c.best)[2] for c in (x, y)),
            " and ".join(parts),
        )
    console.print(table)


def main(argv: Sequence[str] | None = None) -> int:
    parser = tool.Parser(prog="python bench/report.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("results", nargs="*", type=Path, metavar="RESULT.json")
    parser.add_argument("--out", type=Path, default=tool.RESULTS, metavar="DIR")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("A", "B"))
    flags = parser.parse_args(argv)
    console = Console()
    if not console.is_terminal:
        console.width = 160
    if flags.compare:
        if flags.results:
            parser.error(f"--compare takes two files, and {flags.results[0]} is one more")
        compare(read(flags.compare[0]), read(flags.compare[1]), console)
        return 0
    files = flags.results or sorted(tool.RESULTS.rglob("*.json"))
    if not files:
        raise UsageError(f"{tool.RESULTS} holds no result; run pytest bench/ --benchmark-only --benchmark-json FILE")
    written = write([read(path) for path in files], flags.out)
    for path in written:
        console.print(str(path), highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
