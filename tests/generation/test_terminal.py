"""The output of generation: in a file, and on a terminal with a live line."""

import ast
import io
import re
import sys
from types import SimpleNamespace
from typing import Any, cast

from fastgpt.generation import terminal
from fastgpt.generation.request import Stats
from tests.helpers.places import ROOT

GENERATION = ROOT / "fastgpt" / "generation"


def test_all_printing_is_in_one_file():
    printing = {
        path.name
        for path in [ROOT / "fastgpt" / "generate.py", *GENERATION.glob("*.py")]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    }
    assert printing == {"terminal.py"}


def test_the_speed_line_leaves_out_what_was_not_measured():
    assert terminal.speed_line(Stats()) == "prefill 0 tokens"
    line = terminal.speed_line(Stats(prefill_tokens=1, prefill_seconds=0.5, decode_tokens=3000, decode_seconds=2.0))
    assert line == "prefill 1 token at 2 tokens/s, decode 3,000 tokens at 1,500 tokens/s"


class Screen(io.StringIO):
    """A stderr that is a terminal."""

    def isatty(self) -> bool:
        return True


def test_on_a_terminal_progress_is_one_line_that_leaves_nothing_behind(monkeypatch):
    monkeypatch.setattr(terminal, "LIVE_INTERVAL", -1.0)
    monkeypatch.setattr(sys, "stderr", screen := Screen())
    for name, value in (("TERM", "xterm"), ("COLUMNS", "100")):
        monkeypatch.setenv(name, value)
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    answers = SimpleNamespace(done=0, total=3)
    with terminal.PromptsDisplay(cast(Any, answers), None) as display:
        for answers.done in range(4):
            display.show()
            display.progress.refresh()
    written = screen.getvalue()
    assert [int(done) for done in re.findall(r"(\d) of 3 done", written)][-1] == 3
    assert {int(done) for done in re.findall(r"(\d) of 3 done", written)} == {0, 1, 2, 3}
    erase_line = "\x1b[2K"
    assert written.rindex(erase_line) > written.rindex("3 of 3 done")


def test_a_live_line_is_not_drawn_among_answers_on_the_same_terminal(monkeypatch):
    monkeypatch.setattr(terminal, "PLAIN_INTERVAL", -1.0)
    monkeypatch.setattr(sys, "stderr", screen := Screen())
    with terminal.PromptsDisplay(cast(Any, SimpleNamespace(done=1, total=3)), None, live=False) as display:
        display.show()
    assert screen.getvalue() == "1 of 3 done\n"
