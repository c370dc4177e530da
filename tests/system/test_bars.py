"""Progress: plain lines where stderr is no terminal, nothing where it is to be quiet, bars on a terminal."""

import sys

import pytest

from fastgpt.system import bars


@pytest.fixture(autouse=True)
def no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bars, "SECONDS", 0.0)


def track(quiet: bool) -> list[str]:
    with bars.bars(quiet) as progress:
        progress.say("begun")
        return list(progress.track("reading", iter("abc"), [1_000_000, 500_000, 2_000_000]))


def test_a_line_now_and_then_where_it_is_piped(capsys: pytest.CaptureFixture[str]):
    assert track(quiet=False) == ["a", "b", "c"]
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == ["begun", "reading: 1 of 4 MB", "reading: 2 of 4 MB", "reading: 4 of 4 MB"]


def test_quiet(capsys: pytest.CaptureFixture[str]):
    assert track(quiet=True) == ["a", "b", "c"]
    assert capsys.readouterr() == ("", "")


def test_bars_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    assert track(quiet=False) == ["a", "b", "c"]
    err = capsys.readouterr().err
    assert "━" in err
    assert "3.5/3.5 MB" in err
    assert "reading: " not in err
