"""Shared by the command lines of the tools beside the benchmarks.

Importing it makes the engine importable where it is not installed, as on a machine that is at hand for minutes. Tools
import it before the engine.
"""

import argparse
import sys
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "bench"
RESULTS = BENCH / "results"

sys.path += [str(ROOT), str(ROOT / "kernels")]  # at the end: one that is installed comes first


class Parser(argparse.ArgumentParser):
    """A parser whose complaint is the `UsageError` that `fastgpt.cli.run` prints in one line."""

    def error(self, message: str) -> NoReturn:
        from fastgpt.errors import UsageError

        raise UsageError(f"{message} (see {self.prog} --help)")


def positive(text: str) -> float:
    """A flag's number above 0, for argparse's `type`."""
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return number


def count(text: str) -> int:
    """A flag's whole number from 1 on, for argparse's `type`."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1 on")
    return number
