"""Settings of the commands that read what runs have logged: `fastgpt plot` and `fastgpt explain`."""

import os
from dataclasses import dataclass
from pathlib import Path

from fastgpt.config.fields import Settings, option
from fastgpt.errors import UsageError

SUFFIXES = (".html", ".png", ".svg")


@dataclass(frozen=True)
class PlotConfig(Settings):
    """The curves of one or more runs."""

    runs: tuple[str, ...] = option(
        ("out",), "folders of runs, each of which may still be training; the flag's name may be left out", path=True
    )
    output: str = option("curves.html", "a page (.html) or a picture (.png, .svg) to write or replace", path=True)
    smooth: float | None = option(
        None,
        "curves are running means, in which a record that is k records away weighs `smooth` to the power of k; 0: no "
        "means; auto: over about a fiftieth of the records on each side",
        low=0,
        below=1,
        auto=True,
    )

    def check(self) -> None:
        if Path(self.output).suffix.lower() not in SUFFIXES:
            raise UsageError(f"`output` {self.output} ends in none of {', '.join(SUFFIXES)}; name such a file")
        seen: set[str] = set()
        for run in map(Path, self.runs):
            if (place := os.path.realpath(run)) in seen:
                raise UsageError(f"`runs` {run} is given twice; leave one out")
            seen.add(place)


@dataclass(frozen=True)
class ExplainConfig(Settings):
    """What is wrong with a run."""

    out_dir: str = option("out", "folder of the run; the flag's name may be left out", path=True)
    sample: bool = option(True, "also generate a text with the run's best checkpoint, and look for repetitions")
    json: bool = option(False, "print one JSON object instead of text")
    device: str = option("auto", "of the sample: auto, cpu, mps, cuda or cuda:N", group="Device")
    threads: int | None = option(
        None, "CPU threads; auto: one for each core that this process may use", low=1, high=4096, auto=True
    )
