"""A run outlives its standard streams, closed before it began or full; of generated text no loss goes unsaid."""

import errno
import io
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fastgpt import cli, generate
from fastgpt.checkpoint import store
from fastgpt.generation import writing
from fastgpt.system.streams import Lasting, Product, StreamLost
from tests.helpers.covering import some
from tests.helpers.runs import FLAGS, records
from tests.helpers.untrained import fresh

pytestmark = [
    pytest.mark.usefixtures("workplace"),
    pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a shell and /dev/full"),
]


@pytest.mark.parametrize("streams", some(1, ["<&- >&- 2>&-", ">&-", "2>&-", ">/dev/full", "2>/dev/full"]))
def test_a_run_needs_nobody_who_listens(streams: str):
    command = shlex.join([sys.executable, "-m", "fastgpt.train", *FLAGS, "--sample_interval", "3"])
    done = subprocess.run(["sh", "-c", f"{command} {streams}"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    store.verify(store.find(Path("out"), "latest"))
    assert list(records(Path("out"))) == [1, 2, 3, 4, 5, 6]


FULL, CLOSED = "No space left on device", "it is closed"


@pytest.mark.parametrize("flags", ["--help", pytest.param("--prompts p.txt --no-compile", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("streams", "reason"), [(">/dev/full", FULL), (">&-", CLOSED), ("| true", None)])
def test_a_product_that_cannot_be_written_is_one_line(flags: str, streams: str, reason: str | None):
    """By the command itself: Python, too, has nothing to say of it at its end. A reader that left knows why."""
    if flags != "--help":
        command = shlex.join([sys.executable, "-m", "fastgpt.train", *FLAGS])
        subprocess.run(["sh", "-c", command], capture_output=True, timeout=120, check=True)
        Path("p.txt").write_text("The fox\nThe dog\n")
    command = f"{shlex.join([sys.executable, '-m', 'fastgpt.generate'])} {flags} --device cpu --cache dense"
    line = f"({command}; echo code $? >&2) | true" if reason is None else f"{command} {streams}; echo code $? >&2"
    done = subprocess.run(["sh", "-c", line], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, timeout=120)
    *told, code = done.stderr.splitlines()
    assert code == "code 1"
    assert "Traceback" not in done.stderr
    errors = [line for line in told if "rror" in line]
    assert len(errors) == (reason is not None)
    assert all(line.startswith("error: stdout takes no more: " + str(reason)) for line in errors)


@pytest.mark.parametrize("flags", ["--cache dense", "--cache paged --kv_memory 100kB", "--interactive --no-compile"])
def test_generated_text_that_cannot_be_written_is_one_line(monkeypatch, capsys, flags: str):
    class Full(io.StringIO):
        def flush(self) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writing, "load", lambda *_, **__: fresh(block_size=32))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"abc\n")))
    monkeypatch.setattr(sys, "stdout", Full())
    assert cli.run(generate.main, ["--max_new_tokens", "3", "--prompt", "a", *flags.split()]) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if "rror" in line]
    assert errors == ["error: stdout takes no more: No space left on device"]


def test_a_stream_that_is_lost_is_told_once_or_not_at_all():
    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(errno.EPIPE, "gone")

    told = Product(Broken())
    with pytest.raises(StreamLost, match="gone"):
        told.write("a")
    assert told.write("b") == 1
    assert Lasting(Broken()).write("a") == 1
    assert Lasting(Product(Broken())).write("a") == 1
    closed = Product(io.StringIO(), closed=True)
    assert closed.write("") == 0
    with pytest.raises(StreamLost, match="it is closed"):
        closed.write("a")


def test_what_is_meant_for_people_is_written_into_no_file():
    """A file that is opened where stderr is closed would get its number."""
    code = (
        "import os, sys; from fastgpt.system import streams; streams.open_missing(); "
        "file = os.open('precious', os.O_CREAT | os.O_RDWR); os.write(2, b'said'); print('told', file=sys.stderr); "
        "sys.exit(file <= 2)"
    )
    done = subprocess.run(["sh", "-c", f"{shlex.join([sys.executable, '-c', code])} 2>&-"], timeout=60)
    assert done.returncode == 0
    assert Path("precious").stat().st_size == 0
