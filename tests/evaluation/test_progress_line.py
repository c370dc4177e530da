"""Progress on stderr: plain lines when piped, a bar that leaves nothing behind on a terminal."""

import functools

import pytest
from rich.console import Console

from fastgpt.evaluation import progress_line


@pytest.mark.parametrize(
    ("interval", "lines"), [(0.0, ["read: 3 of 1,000 tokens", "read: 1,000 of 1,000 tokens"]), (99, [])]
)
def test_plain_lines_come_once_in_a_while(capsys, monkeypatch, interval: float, lines: list[str]):
    monkeypatch.setattr(progress_line, "PLAIN_INTERVAL", interval)
    with progress_line.progress_line("read", 1000, "tokens") as advance:
        advance(3)
        advance(997)
    out, err = capsys.readouterr()
    assert (out, err.splitlines()) == ("", lines)


def test_a_terminal_shows_a_bar(capsys, monkeypatch):
    monkeypatch.setattr(progress_line, "Console", functools.partial(Console, force_terminal=True, width=90))
    monkeypatch.setattr(progress_line, "PLAIN_INTERVAL", 0.0)
    with progress_line.progress_line("read [x]", 10, "tokens") as advance:
        advance(4)
        advance(6)
    out, err = capsys.readouterr()
    assert out == ""
    assert "10 of 10 tokens" in err
    assert "read [x]:" not in err
