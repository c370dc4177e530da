"""Every number in README's section on speed stands in one of the result files that the section links.

A row of a table has to match one single case in all its figures: a column of figures is one whose cells are numbers.
Everything else, sentences and descriptions, has to match any case, or what a case is called. A number is compared after
rounding to the digits that README shows; one of a single digit exactly. Times may be shown in seconds, milliseconds or
microseconds, memory in bytes, MiB or GiB, bandwidth in GB/s, products in TFLOP/s, shares in percent.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path

import pytest

from tests.helpers.places import ROOT

README = ROOT / "README.md"
# Descriptions whose numbers no result file holds: the words in which they stand, and where they come from.
ALLOWED = {
    "240 tokens": "NEW_TOKENS of bench_generate.py",
    "64 prompts of 1 to 128 tokens, 128 new each": "REQUESTS and LONGEST of bench_generate.py",
    "1 to 128 new tokens": "LONGEST of bench_generate.py",
    "32 prompts that share 200 tokens": "SHARERS and PREFIX of bench_generate.py",
}
UNITS = "x|×|ms|µs|s|%|GB|MB|MiB|GiB|k"
NUMBER = re.compile(rf"(?P<digits>\d[\d,]*(?:\.\d+)?)(?: ?(?P<unit>{UNITS})(?![A-Za-z]))?")
NAME_BEFORE = re.compile(r"[A-Za-z_][\w.]*-?$")  # the 16 of bfloat16, the 2 of GPT-2
LONGEST_NAME = 40  # characters before a number that are looked at
STATISTICS = ("median", "iqr")  # not the extremes: the more numbers, the easier a made-up one finds its like


@dataclass(frozen=True)
class Shown:
    """A number as README shows it."""

    text: str
    unit: str

    @cached_property
    def value(self) -> float:
        return float(self.text.replace(",", ""))

    @cached_property
    def tolerance(self) -> float:
        if len(self.text.replace(",", "").replace(".", "").lstrip("0")) <= 1:
            return 0.0
        return 0.5 * 10 ** -len(self.text.partition(".")[2]) * (1 + 1e-9)

    def is_rounded(self, value: float) -> bool:
        return abs(self.value - value) <= self.tolerance


@dataclass
class Figures:
    """What a case, or a file beside its cases, says."""

    values: list[float] = field(default_factory=list)
    """Measured, in every unit in which they may be shown."""
    words: list[float] = field(default_factory=list)
    """Numbers in names, parameters and keys."""

    def hold(self, shown: Shown) -> bool:
        scale = 100 if shown.unit == "%" else 1
        return any(shown.is_rounded(v) or shown.is_rounded(scale * v) for v in self.values + self.words)


def read_numbers(text: str) -> Iterator[Shown]:
    """The numbers in a text, but for those that are part of a name, as in bfloat16, GPT-2 or 8481C."""
    for match in NUMBER.finditer(text):
        after = text[match.end() : match.end() + 1]
        if not NAME_BEFORE.search(text[max(0, match.start() - LONGEST_NAME) : match.start()]) and not after.isalpha():
            yield Shown(match["digits"].rstrip(","), match["unit"] or "")


def plain(text: str) -> str:
    """Without code, link targets, dates and the descriptions that ALLOWED names."""
    text = re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.S)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    text = re.sub(r"\d{4}-\d{2}-\d{2}", "", text)
    for phrase in ALLOWED:
        text = re.sub(rf"(?<![\d.,]){re.escape(phrase)}".replace(r"\ ", r"\s+"), "", text)
    return text


def leaves(content: object, key: str = "") -> Iterator[tuple[str, float]]:
    """Every number with the keys that lead to it, as in peers.stock.seconds."""
    if isinstance(content, dict):
        for name, value in content.items():
            yield from leaves(value, f"{key}.{name}")
    elif isinstance(content, list):
        for value in content:
            yield from leaves(value, key)
    elif isinstance(content, int | float) and not isinstance(content, bool):
        yield key, content


def in_units(key: str, value: float) -> list[float]:
    if key.rpartition(".")[2] in (*STATISTICS, "spread") or "seconds" in key:
        return [value, value * 1e3, value * 1e6]
    return [value, value / 2**20, value / 2**30] if "memory" in key or "bytes" in key else [value]


def read_case(case: dict) -> Figures:
    info, params = case["extra_info"], case["params"] or {}
    measured = {key: case["stats"][key] for key in STATISTICS}
    values = [shown for key, value in leaves([info, params, measured]) for shown in in_units(key, value)]
    words = json.dumps([case["fullname"], params, info]).replace("_", " ")
    return Figures(values, [float(n.text.replace(",", "")) for n in read_numbers(words)])


@cache
def read_file(path: Path) -> list[Figures]:
    """The cases of a result file, and behind them what it says of the machine; of a text, its numbers."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".json":
        return [Figures(words=[float(n.text.replace(",", "")) for n in read_numbers(text)])]
    content = json.loads(text)
    machine = content["machine_info"]
    rates = [shown for _, value in leaves(machine) for shown in (value, value / 1e9, value / 1e12)]
    texts = [text for text in machine.values() if isinstance(text, str)]
    versions = [float(n) for text in texts for n in re.findall(r"(?<![\w.])\d+(?:\.\d+)?", text)]
    return [*map(read_case, content["benchmarks"]), Figures(rates, versions)]


def complaints(readme: str) -> list[str]:
    """The numbers of the section that no linked file holds."""
    section = re.search(r"^## Speed$(.*?)(?=^## |\Z)", readme, re.M | re.S)
    assert section, "README has no section '## Speed'"
    links = re.findall(r"\]\((bench/results/[^)\s]+\.(?:json|txt))\)", section[1])
    figures = [one for link in dict.fromkeys(links) for one in read_file(ROOT / link)]
    found = []
    for line in plain(section[1]).splitlines():
        rest, row = line, []
        if line.startswith("|"):
            cells = [cell.strip().strip("*") for cell in line.strip().strip("|").split("|")]
            row = [number for cell in cells if is_figure(cell) for number in read_numbers(cell)]
            rest = " ".join(cell for cell in cells if not is_figure(cell))
        if row and not any(all(case.hold(number) for number in row) for case in figures):
            found.append(f"no single case has {', '.join(n.text for n in row)}: {line}")
        found += [f"{n.text}{n.unit}: {line}" for n in read_numbers(rest) if not any(f.hold(n) for f in figures)]
    return found


def is_figure(cell: str) -> bool:
    """Whether a cell is a number, perhaps with its noise and its unit."""
    return bool(re.fullmatch(rf"[~≥≤]?\s*[\d.,]+(?:\s*±\s*[\d.,]+)?\s*(?:{UNITS})?", cell))


def test_every_number_is_measured():
    assert complaints(README.read_text(encoding="utf-8")) == []


SPEED = """
## Speed

On two threads of an AVX512-BF16 machine (2026-11-21), GPT-2 in bfloat16 with `--n_layer 77`:

| | tokens/s | peer | ratio |
|---|---|---|---|
| training, `baby` shape, dropout 0.2 | 4,932 | 1,405 | 3.51 |
| decoding 240 tokens | 455 | 52 | 8.77 |

A step takes 34.5 ms where it is eager, and 2.1 s to start.
Results: [one](bench/results/amd-epyc-2-threads/2026-11-21-7044ff3-training-and-decoding.json).

## After

1234567
"""


def test_the_checker_takes_what_is_measured():
    assert complaints(SPEED) == []


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("4,932", "4,933", "no single case has 4,933, 1,405, 3.51"),
        ("3.51", "3.39", "no single case has 4,932, 1,405, 3.39"),  # measured, but for another case
        ("dropout 0.2", "dropout 0.3", "0.3: "),
        ("240 tokens", "260 tokens", "260: "),
        ("240 tokens", "1240 tokens", "1240: "),
        ("34.5 ms", "71.3 ms", "71.3ms: "),
        ("to start", "to start, 7 times as fast", "7: "),
        ("to start", "to start, 1.234x", "1.234x: "),
        ("to start", "to start, at 1-977 tokens", "977: "),
        ("[one](bench/results/amd-epyc-2-threads/2026-11-21-7044ff3-training-and-decoding.json)", "none", "4,932"),
    ],
)
def test_the_checker_finds_what_is_made_up(before: str, after: str, expected: str):
    assert before in SPEED
    assert any(expected in complaint for complaint in complaints(SPEED.replace(before, after)))


def test_the_checker_finds_any_changed_digit_in_readme():
    """Each figure of README's tables, one unit off in its last digit."""
    text = README.read_text(encoding="utf-8")
    section = text[text.index("## Speed") :]
    figures = re.findall(r"(?<=\| )[\d,]+\.?\d*(?= \|)", section)
    assert figures
    for figure in figures:
        last = int(figure[-1])
        wrong = figure[:-1] + str((last + 4) % 10)
        assert complaints(text.replace(f"| {figure} |", f"| {wrong} |", 1)), f"{figure} -> {wrong} goes unseen"
