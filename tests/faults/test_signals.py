"""Signals: the first is noted and loses nothing, the second ends at once."""

import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from fastgpt import cli, train
from fastgpt.checkpoint import run_folder, store
from fastgpt.config.training import TrainConfig
from fastgpt.evaluation import loss as evaluation_loss
from fastgpt.generation.generator import TextGenerator
from fastgpt.system import files
from fastgpt.system.signals import Signals
from fastgpt.training import run as run_module
from fastgpt.training.run import Run
from fastgpt.training.step import TrainStep
from tests.helpers import runs
from tests.helpers.covering import some
from tests.helpers.runs import ENDLESS, FLAGS, at_call, contents, records, resume, run, signal_at_step, spawn, tensors

pytestmark = [
    pytest.mark.usefixtures("workplace"),
    pytest.mark.skipif(os.name == "nt", reason="Windows sends no such signals"),
]
NAMES = ("SIGINT", "SIGTERM", "SIGHUP")
# Seconds in which a signal is answered on the busiest machine; one that is not heard takes hours.
PATIENCE = 60


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
@pytest.mark.slow
def test_a_signal_saves_and_the_resumed_run_is_the_one_that_was_not_stopped(name: str, code: int):
    process = spawn(f"{ENDLESS} --dropout 0.2 --lr_decay_iters 40 --log_interval 4 --out_dir 'stop ped'")
    signal_at_step(process, 8, getattr(signal, name))
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == code, err
    assert "Traceback" not in err
    stopped = int(re.search(r"^stopped at step (\d+) of 1000000, saved in stop ped$", out, re.M)[1])
    store.verify(folder := store.find(Path("stop ped"), "latest"))
    assert folder.name == f"step-{stopped:06d}"
    assert f"step {stopped}: not evaluated; saved {folder}" in err
    assert store.load_state(folder)["progress"]["val_loss"] is None
    assert "best val loss" not in out
    (command,) = re.findall(r"^go on:  python -m fastgpt\.train (.*)$", out, re.M)
    assert cli.run(train.main, [*shlex.split(command), "--max_iters", str(stopped + 3)]) == 0
    flags = "--dropout 0.2 --lr_decay_iters 40 --log_interval 4 --eval_interval 1000000"
    whole = run(f"{flags} --max_iters {stopped + 3}", "whole")
    resumed = tensors(Path("stop ped"))
    assert all(torch.equal(resumed[name], weight) for name, weight in tensors(whole).items())


@pytest.mark.slow
def test_a_second_signal_ends_at_once_and_leaves_the_last_checkpoint():
    out = run()
    before = contents(out / "step-000006")
    # A step of seconds. The first signal alone would be heard after a micro-batch, and save.
    process = spawn(f"{ENDLESS} --gradient_accumulation_steps 300 --batch_size 1 --init_from resume")
    signal_at_step(process, 7, 0)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)  # two of a kind might become one
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode in (130, 143), err
    assert "once more stops at once" in err
    assert "saved" not in err
    assert store.find(out, "latest").name == "step-000006"
    assert contents(out / "step-000006") == before


MOMENTS = {  # each at step 6
    "step": (TrainStep, "_loss", 12),  # in its last micro-batch
    "first micro-batch": (TrainStep, "_loss", 11),
    "evaluation": (evaluation_loss, "_loss", 3),  # in a batch
    "saving": (store, "save", 2),
}
STEPS = "--max_iters 12 --eval_interval 3 --dropout 0.1"


def resumes_as(whole: Path) -> None:
    """Go on with the run in `out`, which then must be the one that was not stopped, and nothing besides."""
    assert resume() == 0
    assert {name: tensor.tolist() for name, tensor in tensors(Path("out")).items()} == {
        name: tensor.tolist() for name, tensor in tensors(whole).items()
    }
    for key in ("loss", "val_loss"):  # those that a signal cut short as well
        assert records(Path("out"), key) == records(whole, key)
    assert not list(Path("out").glob(".fastgpt-tmp-*"))


@pytest.mark.parametrize("flags", ["", "--async_save"])
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
@pytest.mark.covering_array(1)
def test_a_signal_at_any_moment_saves_and_loses_nothing(monkeypatch, moment: str, flags: str, name: str, code: int):
    whole, sent = run(STEPS, "whole"), []

    def send() -> None:
        sent.append(time.monotonic())
        os.kill(os.getpid(), getattr(signal, name))

    with monkeypatch.context() as patch:
        at_call(patch, *MOMENTS[moment], send)
        assert cli.run(train.main, [*FLAGS, *shlex.split(f"{STEPS} {flags}")]) == code
    assert time.monotonic() - sent[0] < 10
    folder = store.find(Path("out"), "latest")
    store.verify(folder)
    if (moment, flags) != ("saving", "--async_save"):  # where training is some steps further by then
        assert folder.name == ("step-000005" if moment == "first micro-batch" else "step-000006")
    resumes_as(whole)


IN_A_SAVE = {  # of step 6: which call of files.sync
    "weights written": 1,
    "moments written": 2,
    "renamed": 5,
    "best written": 7,
}


@pytest.mark.parametrize(
    ("moment", "flags"),
    some(4, [(m, "") for m in [*MOMENTS, *IN_A_SAVE]] + [(m, "--async_save") for m in ("step", "evaluation")]),
)
def test_a_second_signal_at_any_moment_ends_at_once_and_loses_no_checkpoint(monkeypatch, moment: str, flags: str):
    whole = run(STEPS, "whole")

    def twice() -> None:
        wait_for(Path("out/latest"))  # another thread may be writing it
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("went on")

    with monkeypatch.context() as patch:
        if moment in MOMENTS:
            at_call(patch, *MOMENTS[moment], twice)
        else:
            at_call(patch, *MOMENTS["saving"], lambda: at_call(patch, files, "sync", IN_A_SAVE[moment], twice))
        with pytest.raises(SystemExit) as stopped:
            raise SystemExit(cli.run(train.main, [*FLAGS, *shlex.split(f"{STEPS} {flags}")]))
    assert stopped.value.code == 143
    assert store.find(Path("out"), "latest").name == "step-000003"
    store.verify("out/step-000003")
    resumes_as(whole)


@pytest.mark.parametrize(("call", "step"), [(9, 4), (10, 5)])  # in the first and in the last micro-batch of step 5
def test_sigusr1_in_a_step_that_is_not_evaluated_saves_before_the_next_micro_batch(monkeypatch, call: int, step: int):
    whole = run(STEPS, "whole")
    saved, save = [], store.save
    monkeypatch.setattr(store, "save", lambda *rest: saved.append(rest[1].step) or save(*rest))
    at_call(monkeypatch, TrainStep, "_loss", call, lambda: os.kill(os.getpid(), signal.SIGUSR1))
    out = run(STEPS)
    assert saved == [3, step, 6, 9, 12]
    assert all(torch.equal(tensor, tensors(whole)[name]) for name, tensor in tensors(out).items())
    assert records(out) == records(whole)


def test_sigusr1_leads_back_where_the_steps_before_it_were_bad(monkeypatch):
    """The verdicts of steps that were not logged are read before a checkpoint of them is written."""
    loss, calls = TrainStep._loss, itertools.count(1)

    def bad(self, x, y):
        call = next(calls)
        if call == 15:  # the first micro-batch of step 8; steps 6 and 7 were skipped
            os.kill(os.getpid(), signal.SIGUSR1)
        return loss(self, x, y) + (math.nan if 11 <= call <= 14 else 0)

    monkeypatch.setattr(TrainStep, "_loss", bad)
    flags = "--max_iters 10 --eval_interval 4 --log_interval 100 --rollback_after 2"
    out = run(flags)
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    (back,) = [record for record in found if "rolled_back_from" in record]
    assert (back["step"], back["rolled_back_from"]) == (4, 7)
    assert next(calls) == 1 + 15 + 2 * 6  # the micro-batch, and six steps


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_in_a_sample_is_heard_between_its_tokens(monkeypatch, name: str):
    def pieces(*rest, **named):
        if (Path("out") / "latest").exists():  # the last sample
            return
        for number in range(10):
            if number == 3:
                os.kill(os.getpid(), getattr(signal, name))
            yield str(number)
        assert name == "SIGUSR1"  # the other one ends the sample
        assert store.find(Path("out"), "latest").name == "step-000002"

    monkeypatch.setattr(TextGenerator, "stream", pieces)
    code = cli.run(train.main, [*FLAGS, "--sample_interval", "2", "--max_iters", "3"])
    assert code == (143 if name == "SIGTERM" else 0)
    assert store.find(Path("out"), "latest").name == ("step-000002" if name == "SIGTERM" else "step-000003")


@pytest.mark.slow
def test_a_step_of_many_micro_batches_is_dropped_and_repeated_to_the_bit():
    """In a process of its own, as a user would: one step would take an hour."""
    flags = "--max_iters 3 --eval_interval 1 --dropout 0.2"
    whole = run(flags, "whole")
    run(f"{flags} --max_iters 2 --lr_decay_iters 3")
    process = spawn(f"{ENDLESS} --gradient_accumulation_steps 1000000 --batch_size 1 --init_from resume")
    for line in process.stderr:
        if line.startswith("run "):
            break
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 143, err
    assert "stopped at step 2 of 1000000, saved in out" in out
    assert resume("--max_iters 3 --gradient_accumulation_steps 2 --batch_size 4 --eval_interval 1 --dropout 0.2") == 0
    assert all(torch.equal(tensor, tensors(whole)[name]) for name, tensor in tensors(Path("out")).items())


@pytest.mark.parametrize("moment", some(2, [*MOMENTS]))
def test_sigusr1_saves_and_goes_on(monkeypatch, capfd, moment: str):
    whole = run(STEPS, "whole")
    saved = []
    save = store.save
    monkeypatch.setattr(store, "save", lambda *rest: saved.append(rest[1].step) or save(*rest))
    at_call(monkeypatch, *MOMENTS[moment], lambda: os.kill(os.getpid(), signal.SIGUSR1))
    out = run(STEPS)
    assert "saving, then going on" in capfd.readouterr().err
    # It is saved at once, though an evaluation comes first, and after that as ever.
    at_once = {"saving": [], "first micro-batch": [5]}.get(moment, [6])
    assert saved == [3, *at_once, 6, 9, 12]
    assert all(torch.equal(tensor, tensors(whole)[name]) for name, tensor in tensors(out).items())
    assert records(out, "val_loss") == records(whole, "val_loss")


def test_a_checkpoint_of_the_middle_of_an_evaluation_resumes_with_that_evaluation(monkeypatch):
    whole = run(STEPS, "whole")
    with monkeypatch.context() as patch:
        at_call(patch, evaluation_loss, "_loss", 4, lambda: os.kill(os.getpid(), signal.SIGUSR1))
        at_call(patch, Run, "take_step", 8, lambda: os._exit(9))
        patch.setattr(store, "prune", lambda *rest: None)
        if (child := os.fork()) == 0:
            cli.run(train.main, [*FLAGS, *shlex.split(STEPS)])
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    shutil.rmtree("out/step-000006")  # which was saved once more after the evaluation
    assert cli.run(train.main, ["--init_from", "resume"]) == 0
    assert records(Path("out"), "val_loss") == records(whole, "val_loss")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
@pytest.mark.slow
def test_a_signal_in_a_long_evaluation_is_heard_within_seconds(name: str):
    process = spawn(f"{ENDLESS} --eval_interval 3 --eval_iters 1000000")  # an evaluation would take hours
    signal_at_step(process, 3, 0)
    time.sleep(0.3)
    process.send_signal(getattr(signal, name))
    if name == "SIGUSR1":
        wait_for(Path("out/latest"))
        process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == (130 if name == "SIGINT" else 143), err
    store.verify(store.find(Path("out"), "latest"))
    assert store.find(Path("out"), "latest").name == "step-000003"


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path} after {PATIENCE} seconds"
        time.sleep(0.01)


def test_a_second_signal_does_not_wait_for_a_save_in_the_background(monkeypatch):
    run("--max_iters 3")
    before = contents(Path("out/step-000003"))
    asleep = threading.Event()

    def sleepy(path: Path) -> None:
        if threading.current_thread() is not threading.main_thread():
            asleep.set()
            time.sleep(60)

    monkeypatch.setattr(files, "sync", sleepy)
    at_call(monkeypatch, Run, "take_step", 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    at_call(
        monkeypatch,
        Run,
        "save_the_rest",
        1,
        lambda: asleep.wait(10) and os.kill(os.getpid(), signal.SIGTERM),
    )
    began = time.monotonic()
    flags = f"--init_from resume --async_save {ENDLESS} --eval_interval 4"
    with pytest.raises(SystemExit) as stopped:
        cli.run(train.main, [*FLAGS, *shlex.split(flags)])
    assert stopped.value.code == 143
    assert asleep.is_set()
    assert time.monotonic() - began < 10
    assert contents(Path("out/step-000003")) == before


def test_a_signal_after_the_last_evaluation_finds_the_run_finished(monkeypatch, capfd):
    at_call(monkeypatch, store, "save", 2, lambda: os.kill(os.getpid(), signal.SIGINT))
    out = run()
    captured = capfd.readouterr()
    assert "once more stops at once" in captured.err
    assert store.find(out, "latest").name == "step-000006"
    assert "--- sample after step 6" in captured.out
    assert "go on:" not in captured.out


def test_what_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with Signals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.caught is None
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGUSR1", 0)])
def test_a_signal_before_training_begins_stops_at_once_or_is_kept(monkeypatch, name: str, code: int):
    at_call(monkeypatch, run_module, "prepare", 1, lambda: os.kill(os.getpid(), getattr(signal, name)))
    with pytest.raises(SystemExit) as ended:
        raise SystemExit(cli.run(train.main, FLAGS))
    assert ended.value.code == code
    assert store.holds_run(Path("out")) == (code == 0)


def test_sigusr1_kills_nobody_before_a_run_or_after_it(monkeypatch):
    for flags, code in (("--n_layer 0", 2), ("", 0)):  # the first is refused before there is a run
        assert cli.run(train.main, [*FLAGS, *shlex.split(flags)]) == code
        os.kill(os.getpid(), signal.SIGUSR1)
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)


def test_a_signal_before_the_first_step_leaves_nothing_to_resume(monkeypatch, capfd):
    at_call(monkeypatch, Run, "take_steps", 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert cli.run(train.main, FLAGS) == 143
    assert "stopped before the first step" in capfd.readouterr().out
    assert not store.holds_run(Path("out"))
    run()


def test_a_run_that_was_stopped_in_its_last_evaluation_is_resumed_for_that_alone(monkeypatch, capfd):
    whole = run("", "whole")
    with monkeypatch.context() as patch:
        at_call(patch, evaluation_loss, "_loss", 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert cli.run(train.main, FLAGS) == 143
    assert "stopped at step 6 of 6" in capfd.readouterr().out
    assert list(records(Path("out"), "val_loss")) == [3]
    assert cli.run(train.main, ["--init_from", "resume"]) == 0
    assert records(Path("out"), "val_loss") == records(whole, "val_loss")
    assert cli.run(train.main, ["--init_from", "resume"]) == 2  # nothing is left to do


def test_a_signal_before_the_end_is_in_the_summary(monkeypatch):
    config, _ = run_folder.load(run())
    step = Run.take_step

    def interrupted(self):
        if self.state.progress.step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self)

    monkeypatch.setattr(Run, "take_step", interrupted)
    summary = runs.train(TrainConfig(**vars(config) | {"out_dir": "other"}))
    # Heard after the first of its two micro-batches, so that the fourth step is dropped.
    assert (summary.steps, summary.finished, summary.stopped_by) == (3, False, signal.SIGINT)
    assert summary.val_loss == records(Path("other"), "val_loss")[3]
