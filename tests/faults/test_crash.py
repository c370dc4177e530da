"""kill -9 at random steps: the run that is resumed each time is, to the bit, the one that was never killed."""

import hashlib
import random
import re
import subprocess
from pathlib import Path

import pytest

from fastgpt.checkpoint import store
from tests.helpers.runs import records, run, spawn

pytestmark = pytest.mark.usefixtures("workplace")
HARD = "--dropout 0.2 --batch_size 2 --gradient_accumulation_steps 3 --warmup_iters 5 --eval_iters 1 --log_interval 1"


def killed_at(process: subprocess.Popen, step: int) -> None:
    """Wait until the process has shown this step, and kill it."""
    for line in process.stderr:
        if (shown := re.match(r"step (\d+)/", line)) and int(shown[1]) >= step:
            process.kill()
            process.communicate()
            return
    raise AssertionError(f"the process ended before step {step}")


def result(out_dir: Path) -> dict:
    """The losses to the bit, and the hash of all that the last checkpoint holds."""
    folder = store.find(out_dir, "latest")
    files = (store.MODEL, store.OPTIMIZER, store.STATE)
    return {
        "losses": {step: loss.hex() for step, loss in records(out_dir).items()},
        "val_losses": {step: loss.hex() for step, loss in records(out_dir, "val_loss").items()},
        "hashes": {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in files},
        "best": store.find(out_dir, "best").name,
    }


@pytest.mark.parametrize(
    ("flags", "length", "kills"),
    [
        ("--async_save --optimizer muon", 60, 1),
        *(
            pytest.param(flags, 400, 20, marks=pytest.mark.slow)
            for flags in ("", "--async_save", "--compile", "--dtype bfloat16 --keep_last 1")
        ),
    ],
)
def test_killed_at_random_steps_it_is_the_run_that_was_not(capfd, flags: str, length: int, kills: int):
    interval = 15 if length < 100 else 7  # an evaluation draws a picture, which takes as long as many steps
    flags += f" --max_iters {length} --eval_interval {interval}"
    run(f"{HARD} {flags}", "whole")
    draw = random.Random(f"{flags}{kills}")
    behind = interval * (2 if "async" in flags else 1)  # steps that a kill may cost; a background save takes a while
    steps = sorted(draw.sample(range(behind + 1, length - 5), kills))
    for number, step in enumerate(steps):
        killed_at(spawn(f"{HARD} {flags} {'--init_from resume' if number else ''}"), step)
        assert int(store.find(Path("out"), "latest").name[5:]) >= step - behind
    capfd.readouterr()
    run(f"{HARD} {flags} --init_from resume")
    assert "damaged" not in capfd.readouterr().err
    assert result(Path("out")) == result(Path("whole"))
