"""Progress: plain lines where stderr is no terminal, nothing where it is to be quiet, bars on a terminal."""

import sys

import pytest

from fastgpt.system import bars


@pytest.fixture(autouse=True)
def no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bars, "SECONDS", 0.0)


def on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "90")


def track(quiet: bool) -> list[str]:
    with bars.bars(quiet) as progress:
        progress.say("begun")
        return list(progress.track("reading", iter("abc"), [1_000_000, 500_000, 2_000_000]))


def count(quiet: bool = False) -> None:
    with bars.bar("read [x]", 1000, "tokens", quiet=quiet) as advance:
        advance(3)
        advance(997)


def test_a_line_now_and_then_where_it_is_piped(capsys: pytest.CaptureFixture[str]):
    assert track(quiet=False) == ["a", "b", "c"]
    count()
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        *("begun", "reading: 1 of 4 MB", "reading: 2 of 4 MB", "reading: 4 of 4 MB"),
        *("read [x]: 3 of 1,000 tokens", "read [x]: 1,000 of 1,000 tokens"),
    ]


def test_no_line_before_its_time(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bars, "SECONDS", 99.0)
    count()
    assert capsys.readouterr() == ("", "")


def test_quiet(capsys: pytest.CaptureFixture[str]):
    assert track(quiet=True) == ["a", "b", "c"]
    count(quiet=True)
    assert capsys.readouterr() == ("", "")


def test_bars_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    on_a_terminal(monkeypatch)
    assert track(quiet=False) == ["a", "b", "c"]
    err = capsys.readouterr().err
    assert "━" in err
    assert "4 of 4 MB" in err
    assert "reading: " not in err


def test_a_bar_that_is_gone_at_the_end(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    on_a_terminal(monkeypatch)
    count()
    out, err = capsys.readouterr()
    assert out == ""
    assert "1,000 of 1,000 tokens" in err
    assert "read [x]:" not in err
    assert err.endswith("\x1b[1A\x1b[2K")  # up a line, which is erased
