"""Tables of names and values."""

import io
import re

import pytest
from rich.console import Console

from fastgpt.system.tables import print_rows


@pytest.mark.parametrize(("terminal", "lines"), [(False, 1), (True, 2)])
def test_a_row_is_a_line_where_it_is_piped_and_fits_a_terminal(monkeypatch, terminal: bool, lines: int):
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=60, highlight=False, markup=False)
    monkeypatch.setattr("rich.console.Console", lambda **_: console)
    print_rows({"time": " ".join(["word"] * 16), "steps": "1"})
    plain = re.sub(r"\x1b\[[\d;]*m", "", stream.getvalue())
    assert len([line for line in plain.splitlines() if "word" in line]) == lines
    assert not terminal or max(map(len, plain.splitlines())) <= 60
    assert plain.count("word") == 16


def test_values_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]):
    wide = "이름" * 60  # two columns for each character
    print_rows({"folder": "data/:smile:[b]", "wide": wide})
    assert [line.split() for line in capsys.readouterr().out.split("\n") if line.strip()] == [
        ["folder", "data/:smile:[b]"],
        ["wide", wide],
    ]
