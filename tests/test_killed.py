"""A process that is killed at any moment leaves a run that goes on: SIGKILL, for real."""

import itertools
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastgpt import checkpoint, files
from fastgpt.checkpoint import capture
from fastgpt.config import TrainConfig
from fastgpt.model import GPT
from fastgpt.optim import make_optimizer
from fastgpt.saver import Saver

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
CONFIG = TrainConfig(vocab_size=11, block_size=8, n_layer=1, n_head=2, n_embd=8)
DISK = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "fastgpt.write", "fastgpt.sync"}
Parts = tuple[GPT, torch.optim.Optimizer]


@pytest.fixture(scope="module")
def parts() -> Parts:
    model = GPT(CONFIG)
    return model, make_optimizer(model, CONFIG)


def start(action: Callable[[], None]) -> int:
    """Run an action in a process of its own, whose number this is; its exit code is 0 or, where it raises, 1."""
    child = os.fork()
    if child:
        return child
    try:
        action()
        os._exit(0)
    except BaseException as error:
        os.write(2, f"{error!r}\n".encode())
    finally:
        os._exit(1)


def is_killed_at(step: int, action: Callable[[], None]) -> bool:
    """Run an action in a process that kills itself before its n-th step that reaches the disk; whether it did."""
    count = itertools.count()

    def hook(event: str, _: object) -> None:
        if event in DISK and next(count) == step:
            os.kill(os.getpid(), signal.SIGKILL)

    def watched() -> None:
        sys.addaudithook(hook)
        action()

    status = os.waitstatus_to_exitcode(os.waitpid(start(watched), 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0


def whole(run: Path) -> Path:
    """The newest checkpoint after the next start's cleaning; every checkpoint there is must be whole."""
    files.recover(run)
    assert not list(run.glob(".fastgpt-tmp-*"))
    for folder in checkpoint.steps(run):
        checkpoint.verify(folder)
    for name in ("latest", "best"):
        checkpoint.verify(checkpoint.find(run, name))
    return checkpoint.find(run, "latest")


def test_killed_at_every_step_that_reaches_the_disk(tmp_path: Path, parts: Parts):
    seen = set()
    for survived in itertools.count():
        run = tmp_path / str(survived)
        for step in (1, 2, 3):
            checkpoint.save(run, capture(step, *parts, {}), best_step=1)

        def save(run: Path = run) -> None:
            Saver(run, 2, beside=False).save(capture(4, *parts, {}), 4, lambda: None)

        killed = is_killed_at(survived, save)
        seen.add(whole(run).name)
        assert (run / "step-000003").is_dir()  # what was the latest
        save()  # what the resumed run does
        assert whole(run) == checkpoint.find(run, "best") == run / "step-000004"
        assert [folder.name for folder in checkpoint.steps(run)] == ["step-000003", "step-000004"]
        if not killed:
            break
    assert survived > 30
    assert seen == {"step-000003", "step-000004"}


def test_killed_while_a_checkpoint_is_written_anew(tmp_path: Path, parts: Parts):
    seen = set()
    for survived in itertools.count():
        run = tmp_path / str(survived)
        checkpoint.save(run, capture(1, *parts, {"written": "first"}), best_step=1)
        killed = is_killed_at(
            survived, lambda run=run: checkpoint.save(run, capture(1, *parts, {"written": "again"}), best_step=1)
        )
        seen.add(checkpoint.load_state(whole(run))["written"])
        if not killed:
            break
    assert seen == {"first", "again"}


def test_killed_before_there_is_any_checkpoint(tmp_path: Path, parts: Parts):
    for survived in itertools.count():
        run = tmp_path / str(survived)
        run.mkdir()
        killed = is_killed_at(survived, lambda run=run: checkpoint.save(run, capture(1, *parts, {})))
        files.recover(run)
        assert not list(run.glob(".fastgpt-tmp-*"))
        if checkpoint.steps(run):  # though `latest` may not name it yet
            told = []
            assert checkpoint.newest_intact(run, told.append) == run / "step-000001"
            assert bool(told) != (run / "latest").exists()
        if not killed:
            break
    assert survived > 10


@pytest.mark.parametrize("beside", [False, True])
def test_killed_at_25_random_moments(tmp_path: Path, parts: Parts, beside: bool):
    draw = random.Random(beside)
    lost = []
    for number in range(25):
        run = tmp_path / str(number)
        reading, writing = os.pipe()

        def endless(run: Path = run, writing: int = writing) -> None:
            saver = Saver(run, 2, beside=beside)
            for step in range(1, 10**6):
                saver.save(capture(step, *parts, {}), step - step % 3 or 1, lambda: None)
                assert saver.outcome(wait=True).saved
                os.write(writing, step.to_bytes(4))

        child = start(endless)
        os.read(reading, 4)  # the first one is there
        time.sleep(draw.random() * 0.05)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(writing)
        told = 1
        while step := os.read(reading, 4):
            told = int.from_bytes(step)
        os.close(reading)
        lost.append(told - int(whole(run).name[5:]))
    assert set(lost) <= {0, -1}  # -1: it was committed, and had not yet been told
