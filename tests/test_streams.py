"""A run outlives its standard streams: closed before it began, or full."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fastgpt import checkpoint
from tests.runs import FLAGS, records

pytestmark = [
    pytest.mark.usefixtures("workplace"),
    pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a shell and /dev/full"),
]


@pytest.mark.parametrize("streams", [">&-", "2>&-", "<&- >&- 2>&-", ">/dev/full", "2>/dev/full"])
def test_a_run_needs_nobody_who_listens(streams: str):
    command = shlex.join([sys.executable, "-m", "fastgpt.train", *FLAGS, "--sample_interval", "3"])
    done = subprocess.run(["sh", "-c", f"{command} {streams}"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    checkpoint.verify(checkpoint.find(Path("out"), "latest"))
    assert list(records(Path("out"))) == [1, 2, 3, 4, 5, 6]


def test_what_is_meant_for_people_is_written_into_no_file():
    """A file that is opened where stderr is closed would get its number."""
    code = (
        "import os, sys; from fastgpt import streams; streams.open_missing(); "
        "file = os.open('precious', os.O_CREAT | os.O_RDWR); os.write(2, b'said'); print('told', file=sys.stderr); "
        "sys.exit(file <= 2)"
    )
    done = subprocess.run(["sh", "-c", f"{shlex.join([sys.executable, '-c', code])} 2>&-"], timeout=60)
    assert done.returncode == 0
    assert Path("precious").stat().st_size == 0
