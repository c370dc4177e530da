"""The progress display: whole fields on every width, a sign of life from the first micro-batch on."""

import builtins
import io
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from rich.console import Console

from fastgpt.checkpoint.progress import Progress
from fastgpt.loggers import console
from fastgpt.loggers.console import Display
from tests.helpers.notebooks import as_a_notebook_shows
from tests.helpers.records import RECORD

FIRST = RECORD | {"ms": None, "tokens_per_second": None, "mfu": None}


def piped(**options) -> Display:
    return Display(Console(file=io.StringIO(), width=40, force_jupyter=False), **{"total": 90} | options)


def lines(display: Display) -> list[str]:
    return display.console.file.getvalue().splitlines()


@contextmanager
def started(display: Display, val_loss: float | None = None) -> Iterator[Display]:
    """The display of a run, from its start to its end."""
    display.start(Progress(val_loss=val_loss))
    yield display
    display.finish(None)


def shown(record: dict, val_loss: float | None = None, **options) -> str:
    with started(piped(**options), val_loss) as display:
        display.log(record)
    (line,) = lines(display)
    return line


class ZMQInteractiveShell:
    """A stand-in for IPython's, by whose name notebooks are known."""


class Shell(ZMQInteractiveShell):
    """Of a notebook that has derived its own, as Colab has."""


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(console, "time", type("Clock", (), {"monotonic": staticmethod(lambda: now[0])}))
    return now


class Terminal:
    """A terminal of some columns; `line` is its live line as it stands now."""

    def __init__(self, width: int, total: int = 2000, **options):
        self.display = Display(Console(file=io.StringIO(), force_terminal=True, width=width), total, **options)

    @property
    def line(self) -> str:
        out = io.StringIO()
        Console(file=out, width=self.display.console.width).print(self.display._line())
        (line,) = out.getvalue().splitlines()
        return line.replace("━", "").replace("╸", "").strip()


def test_a_pipe_gets_every_field_however_narrow_it_is():
    assert shown(RECORD, 2.5) == (
        "step 30/90  loss 2.3457  val 2.5000  0:03 left  12,346 tokens/s  50.0 ms  lr 9.90e-04  norm 1.23  MFU 42.1%  "
        "3 MiB"
    )


def test_what_is_not_known_is_said_to_be_unknown():
    line = shown(RECORD | {"mfu": None, "memory": None})
    assert "val -" in line
    assert "MFU" not in line  # no peak is known
    assert "memory unknown" in line


def test_a_step_that_was_not_timed_says_nothing_of_time():
    assert shown(FIRST) == "step 30/90  loss 2.3457  val -  lr 9.90e-04  norm 1.23  3 MiB"


def test_the_first_loss_alone_stands_beside_that_of_a_uniform_guess():
    with started(piped(uniform=4.6347)) as display:
        display.log(FIRST)
        display.log(RECORD)
    first, second = lines(display)
    assert "loss 2.3457 (ln V, a uniform guess, is 4.63)  val -" in first
    assert "guess" not in second


def test_a_terminal_keeps_the_first_loss_as_a_line_of_its_own():
    terminal = Terminal(80, uniform=4.6347)
    with started(terminal.display) as display:
        display.log(FIRST)
        display.log(RECORD)
    assert display.console.file.getvalue().count("step 30/2000  loss 2.3457 (ln V, a uniform guess, is 4.63)\n") == 1
    assert "guess" not in terminal.line


@pytest.mark.parametrize(
    ("width", "line"),
    [
        (
            140,
            "step 1510/2000  loss 2.3457  val 2.5000  0:24 left  12,346 tokens/s  50.0 ms  lr 9.90e-04  norm 1.23  "
            "MFU 42.1%  3 MiB",
        ),
        (110, "step 1510/2000  loss 2.3457  val 2.5000  0:24 left  12,346 tokens/s  50.0 ms  MFU 42.1%  3 MiB"),
        (80, "step 1510/2000  loss 2.3457  val 2.5000  0:24 left  12,346 tokens/s"),
        (60, "step 1510/2000  loss 2.3457  val 2.5000  0:24 left"),
        (40, "step 1510/2000  loss 2.3457  0:24 left"),
        (30, "step 1510/2000  loss 2.3457"),
    ],
)
def test_a_narrow_terminal_drops_whole_fields_the_least_important_first(width: int, line: str):
    terminal = Terminal(width)
    with started(terminal.display, 2.5) as display:
        display.log(RECORD | {"step": 1510})
        assert terminal.line == line


def test_a_terminal_has_a_bar_and_counts_micro_batches_from_the_first_on(clock: list[float]):
    terminal = Terminal(120)
    display = terminal.display
    display.begin("micro", 0, 40)
    assert terminal.line == "step 0/2000"
    clock[0] += 12
    display.reach(1)
    assert terminal.line == "step 0/2000  micro 1/40  266:40:00 left"
    clock[0] += 16
    display.reach(3)  # those after the first tell more
    assert terminal.line == "step 0/2000  micro 3/40  177:46:40 left"
    display.log(RECORD | {"step": 10})
    display.begin("evaluation", 10, 8)
    display.reach(2)
    assert "step 10/2000  loss 2.3457  evaluation 2/8  val -" in terminal.line


def test_quick_steps_do_not_flicker(clock: list[float]):
    terminal = Terminal(120)
    terminal.display.begin("micro", 0, 2)
    clock[0] += 0.1
    terminal.display.reach(1)
    assert "micro" not in terminal.line


def test_a_pipe_is_told_of_a_long_step_after_its_first_micro_batch_and_each_minute(clock: list[float]):
    with started(piped()) as display:
        for step in (0, 1):
            display.begin("micro", step, 40)
            for done in range(1, 41):
                clock[0] += 12
                display.reach(done)
    found = lines(display)
    assert found[0] == "step 1: micro-batch 1 of 40 done after 0:12; about 8:00 a step, 12:00:00 in all"
    assert found[1:3] == [
        "step 0/90  micro 6/40  6:48 left in this step",
        "step 0/90  micro 11/40  5:48 left in this step",
    ]
    assert found[8] == "step 1/90  micro 1/40  7:48 left in this step"
    assert len(found) == 16


def test_a_step_that_compiles_first_is_judged_by_its_second_micro_batch(clock: list[float]):
    with started(piped(settled=2)) as display:
        display.begin("micro", 0, 10)
        for done, seconds in ((1, 50), (2, 2)):
            clock[0] += seconds
            display.reach(done)
    assert lines(display) == ["step 1: micro-batch 2 of 10 done after 0:52; about 0:20 a step, 30:00 in all"]


def test_a_pipe_hears_nothing_of_quick_micro_batches(clock: list[float]):
    with started(piped()) as display:
        for step in range(9):
            display.begin("micro", step, 2)
            for done in (1, 2):
                clock[0] += 1
                display.reach(done)
    assert lines(display) == []


def test_a_terminal_gets_a_live_line_and_samples_as_they_are(capsys):
    terminal = Terminal(200, total=90)
    with started(terminal.display) as display:
        display.log(RECORD)
        display.product("[bold]sampled[/bold]")
    out = display.console.file.getvalue()
    assert "30/90" in out
    assert "loss 2.3457" in out
    assert capsys.readouterr().out == "[bold]sampled[/bold]\n"


@pytest.mark.parametrize("shell", [ZMQInteractiveShell, Shell])
def test_a_notebook_has_one_line_that_is_written_anew_in_its_place(monkeypatch, capsys, clock: list[float], shell):
    monkeypatch.setattr(builtins, "get_ipython", shell, raising=False)
    display = piped(uniform=4.6347, total=300)
    file = display.console.file
    with started(display, 2.5):
        for step in range(200):
            display.begin("micro", step, 2)
            clock[0] += 0.05
            display.reach(1)
            if step % 10 == 9:
                display.log((RECORD if step > 9 else FIRST) | {"step": step + 1})
        assert as_a_notebook_shows(file.getvalue()) == [
            "step 10/300  loss 2.3457 (ln V, a uniform guess, is 4.63)",
            "step 200/300  loss 2.3457  val 2.5000  0:05 left  12,346 tokens/s  50.0 ms  MFU 42.1%  3 MiB",
        ]
        display.say("step 200: saved")
        assert as_a_notebook_shows(file.getvalue())[1:] == [
            "step 200: saved",
            "step 200/300  loss 2.3457  val 2.5000  0:05 left  12,346 tokens/s  50.0 ms  MFU 42.1%  3 MiB",
        ]
        display.product("sampled")
    assert capsys.readouterr().out == "sampled\n"
    assert file.getvalue().endswith("\n")
    assert not set(file.getvalue()) - set("\r\n") & set(map(chr, range(32)))  # no other control character


def test_a_notebooks_line_is_not_drawn_at_every_step(monkeypatch, clock: list[float]):
    monkeypatch.setattr(builtins, "get_ipython", ZMQInteractiveShell, raising=False)
    with started(piped()) as display:
        for step in range(1000):
            display.begin("micro", step, 1)
            clock[0] += 0.001
            display.reach(1)
    assert display.console.file.getvalue().count("\r") < 12


@pytest.mark.parametrize("shell", [None, type("TerminalInteractiveShell", (), {})])
def test_ipython_on_a_terminal_is_no_notebook(monkeypatch, shell):
    if shell:
        monkeypatch.setattr(builtins, "get_ipython", shell, raising=False)
    assert not console.in_notebook()
    assert piped().live is None


def test_text_for_stdout_stands_above_the_live_line_which_leaves_no_copy(capsys):
    terminal = Terminal(80)
    with started(terminal.display):
        terminal.display.product("a sample")
        taken_away = terminal.display.console.file.getvalue().count("\x1b[2K")  # "erase the line"
    assert capsys.readouterr().out == "a sample\n"
    assert taken_away >= 1
    assert terminal.display.console.file.getvalue().rstrip("\n\x1b[?25h").endswith("step 0/2000")
