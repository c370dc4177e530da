"""Processes that share work: order, errors, and their end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastgpt.errors import RunFailed, UsageError
from fastgpt.system.workers import workers
from tests.helpers.places import ROOT

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals of Unix")


def work(item: int) -> int:
    if item == 13:
        raise UsageError("no luck")
    if item < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return item * item


def process(_: int) -> int:
    return os.getpid()


def test_one_job_is_done_here():
    with workers(1) as helpers:
        assert list(helpers.map(work, range(5))) == [0, 1, 4, 9, 16]
        assert list(helpers.map(process, [0])) == [os.getpid()]
        with pytest.raises(UsageError, match="no luck"):
            list(helpers.map(work, [13]))


def test_results_come_in_order_from_other_processes_and_so_does_an_error():
    with workers(2) as helpers:
        assert list(helpers.map(work, range(12))) == [item * item for item in range(12)]
        assert os.getpid() not in helpers.map(process, range(4))
        results = helpers.map(work, [1, 2, 13, 3])
        assert [next(results), next(results)] == [1, 4]
        with pytest.raises(UsageError, match="no luck"):
            next(results)


def test_a_killed_worker_ends_the_work_in_one_message():
    with pytest.raises(RunFailed, match="a worker process was killed"), workers(2) as helpers:
        list(helpers.map(work, [1, -1, 2]))


@pytest.mark.slow
def test_workers_end_with_a_process_that_is_killed(tmp_path: Path):
    program = tmp_path / "program.py"
    program.write_text(
        "import os, time\nfrom fastgpt.system.workers import workers\n"
        "def wait(item):\n    print(os.getpid(), flush=True)\n    time.sleep(60)\n"
        "if __name__ == '__main__':\n    with workers(2) as helpers:\n        list(helpers.map(wait, range(2)))\n"
    )
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    with subprocess.Popen(
        [sys.executable, str(program)], stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path}
    ) as parent:
        assert parent.stdout is not None
        children = [int(parent.stdout.readline()) for _ in range(2)]
        parent.kill()
    deadline = time.monotonic() + 20
    while alive := [child for child in children if Path(f"/proc/{child}").exists()]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.05)
