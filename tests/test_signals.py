"""Signals: the first is noted and loses nothing, the second ends at once."""

import os
import re
import shlex
import signal
from pathlib import Path

import pytest
import torch

from fastgpt import checkpoint, cli, evaluate, run_folder, train
from fastgpt.config import TrainConfig
from fastgpt.signals import Signals
from tests.runs import ENDLESS, contents, records, run, signal_at_step, spawn, tensors

pytestmark = [
    pytest.mark.usefixtures("workplace"),
    pytest.mark.skipif(os.name == "nt", reason="Windows sends no such signals"),
]
NAMES = ("SIGINT", "SIGTERM", "SIGHUP")


@pytest.mark.parametrize("name", NAMES)
def test_a_signal_is_noted_and_a_second_one_ends_at_once(capfd, name: str):
    number = getattr(signal, name)
    before = [signal.getsignal(getattr(signal, each)) for each in NAMES]
    with Signals() as signals:
        assert signals.caught is None
        assert signal.getsignal(number) not in before  # or the next line ends the tests
        os.kill(os.getpid(), number)
        assert signals.caught == number
        with pytest.raises(SystemExit) as stopped:
            os.kill(os.getpid(), signal.SIGINT)
    assert stopped.value.code == 130
    assert [signal.getsignal(getattr(signal, each)) for each in NAMES] == before
    assert capfd.readouterr().err.count("once more stops at once") == 1


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_saves_and_the_resumed_run_is_the_one_that_was_not_stopped(name: str, code: int):
    process = spawn(f"{ENDLESS} --dropout 0.2 --lr_decay_iters 40 --log_interval 4 --out_dir 'stop ped'")
    signal_at_step(process, 8, getattr(signal, name))
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "Traceback" not in err
    stopped = int(re.search(r"^stopped at step (\d+) of 1000000, saved in stop ped$", out, re.M)[1])
    checkpoint.verify(folder := checkpoint.find(Path("stop ped"), "latest"))
    assert folder.name == f"step-{stopped:06d}"
    assert f"step {stopped}: stopped before an evaluation; saved {folder}" in err
    assert checkpoint.load_state(folder)["progress"]["val_loss"] is None
    assert "best val loss" not in out
    (command,) = re.findall(r"^go on:  python -m fastgpt\.train (.*)$", out, re.M)
    assert cli.run(train.main, [*shlex.split(command), "--max_iters", str(stopped + 3)]) == 0
    flags = "--dropout 0.2 --lr_decay_iters 40 --log_interval 4 --eval_interval 1000000"
    whole = run(f"{flags} --max_iters {stopped + 3}", "whole")
    resumed = tensors(Path("stop ped"))
    assert all(torch.equal(resumed[name], weight) for name, weight in tensors(whole).items())


def test_a_second_signal_ends_at_once_and_leaves_the_last_checkpoint():
    out = run()
    before = contents(out / "step-000006")
    process = spawn(f"{ENDLESS} --eval_iters 1000000 --init_from resume")  # the last evaluation would take hours
    signal_at_step(process, 9, signal.SIGTERM)
    os.kill(process.pid, signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    assert contents(out / "step-000006") == before or not (out / "step-000006").exists()
    checkpoint.verify(checkpoint.find(out, "latest"))


@pytest.mark.parametrize("moment", ["step", "evaluation"])
def test_a_signal_in_the_last_step_or_evaluation_finds_the_run_finished(capfd, monkeypatch, moment: str):
    def interrupting(call, at: int):
        count = 0

        def wrapped(*arguments, **named):
            nonlocal count
            count += 1
            if count == at:
                os.kill(os.getpid(), signal.SIGINT)
            return call(*arguments, **named)

        return wrapped

    if moment == "step":
        monkeypatch.setattr(train.Run, "_train_step", interrupting(train.Run._train_step, 6))
    else:
        monkeypatch.setattr(evaluate, "mean_loss", interrupting(evaluate.mean_loss, 2))
    out = run()
    captured = capfd.readouterr()
    assert "once more stops at once" in captured.err
    assert list(records(out, "val_loss")) == [3, 6]
    assert checkpoint.find(out, "latest").name == "step-000006"
    assert "--- sample after step 6" in captured.out
    assert "python -m fastgpt.generate" in captured.out
    assert "go on:" not in captured.out


def test_a_signal_before_the_end_is_in_the_summary(monkeypatch):
    config, _ = run_folder.load(run())
    step = train.Run._train_step

    def interrupted(self):
        if self.progress.step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self)

    monkeypatch.setattr(train.Run, "_train_step", interrupted)
    summary = train.train(TrainConfig(**vars(config) | {"out_dir": "other"}))
    assert (summary.steps, summary.finished, summary.stopped_by) == (4, False, signal.SIGINT)
    assert summary.val_loss == records(Path("other"), "val_loss")[3]
