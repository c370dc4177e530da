"""A process that is killed at any moment leaves a run that goes on: SIGKILL, for real."""

import itertools
import os
import random
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastgpt import cli, train
from fastgpt.checkpoint import store
from fastgpt.checkpoint.store import capture
from fastgpt.checkpoint.writer import BackgroundWriter, Writer
from fastgpt.config.training import TrainConfig
from fastgpt.evaluation import loss
from fastgpt.model.gpt import GPT
from fastgpt.system import files
from fastgpt.training.optimizer import make_optimizer
from tests.helpers.covering import some
from tests.helpers.killed import DISK, is_killed_at, start
from tests.helpers.runs import FLAGS, at_call, records, resume

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
CONFIG = TrainConfig(vocab_size=11, block_size=8, n_layer=1, n_head=2, n_embd=8)
TINY = [  # at this rate the best checkpoint is step 2, still so after step 4, and then step 6
    *FLAGS,
    *shlex.split("--eval_interval 2 --keep_last 1 --dropout 0.1 --lr_decay_iters 6 --learning_rate 0.3 --min_lr 0.3"),
]
Parts = tuple[GPT, torch.optim.Optimizer]


@pytest.fixture(scope="module")
def parts() -> Parts:
    model = GPT(CONFIG)
    return model, make_optimizer(model, CONFIG)


def changes_the_run(event: str, arguments: tuple) -> bool:
    """Whether a step that reaches the disk changes something in `out`, the rest being no concern of a resume."""
    if event not in DISK or (event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR)):
        return False
    # rmtree names what it deletes without its folder, which is open.
    return event in ("os.remove", "os.rmdir") or str(arguments[0]).partition("/")[0] == "out"


def whole(run: Path) -> Path:
    """The newest checkpoint after the next start's cleaning; every checkpoint there is must be whole."""
    files.recover(run)
    assert not list(run.glob(".fastgpt-tmp-*"))
    for folder in store.folders(run):
        store.verify(folder)
    for name in ("latest", "best"):
        store.verify(store.find(run, name))
    return store.find(run, "latest")


@pytest.mark.parametrize("every", some(1, [3, 1]))
def test_killed_at_every_step_that_reaches_the_disk(tmp_path: Path, parts: Parts, every: int):
    seen = set()
    for survived in itertools.count(step=every):
        run = tmp_path / str(survived)
        for step in (1, 2, 3):
            store.save(run, capture(step, *parts, {}), best_step=1)

        def save(run: Path = run) -> None:
            Writer(run, 2).save(capture(4, *parts, {}), 4, lambda: None)

        killed = is_killed_at(survived, save)
        seen.add(whole(run).name)
        assert (run / "step-000003").is_dir()  # what was the latest
        save()  # what the resumed run does
        assert whole(run) == store.find(run, "best") == run / "step-000004"
        assert [folder.name for folder in store.folders(run)] == ["step-000003", "step-000004"]
        if not killed:
            break
    assert survived > 30
    assert seen == {"step-000003", "step-000004"}


@pytest.mark.slow
def test_killed_while_a_checkpoint_is_written_anew(tmp_path: Path, parts: Parts):
    seen = set()
    for survived in itertools.count():
        run = tmp_path / str(survived)
        store.save(run, capture(1, *parts, {"written": "first"}), best_step=1)
        killed = is_killed_at(
            survived, lambda run=run: store.save(run, capture(1, *parts, {"written": "again"}), best_step=1)
        )
        seen.add(store.load_state(whole(run))["written"])
        if not killed:
            break
    assert seen == {"first", "again"}


@pytest.mark.parametrize("every", some(1, [2, 1]))
def test_killed_before_there_is_any_checkpoint(tmp_path: Path, parts: Parts, every: int):
    for survived in itertools.count(step=every):
        run = tmp_path / str(survived)
        run.mkdir()
        killed = is_killed_at(survived, lambda run=run: store.save(run, capture(1, *parts, {})))
        files.recover(run)
        assert not list(run.glob(".fastgpt-tmp-*"))
        if store.folders(run):  # though `latest` may not name it yet
            told = []
            assert store.newest_intact(run, told.append) == run / "step-000001"
            assert bool(told) != (run / "latest").exists()
        if not killed:
            break
    assert survived > 10


@pytest.mark.parametrize("kind", [Writer, BackgroundWriter])
@pytest.mark.parametrize("moments", [6, pytest.param(25, marks=pytest.mark.slow)])
def test_killed_at_random_moments(tmp_path: Path, parts: Parts, kind: type[Writer], moments: int):
    draw = random.Random(kind is BackgroundWriter)
    lost = []
    for number in range(moments):
        run = tmp_path / str(number)
        reading, writing = os.pipe()

        def endless(run: Path = run, writing: int = writing) -> None:
            writer = kind(run, 2)
            for step in range(1, 10**6):
                writer.save(capture(step, *parts, {}), step - step % 3 or 1, lambda: None)
                assert writer.wait().saved
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


def trained(*flags: str) -> None:
    assert cli.run(train.main, [*TINY, *flags]) == 0


def continued() -> None:
    assert resume("--max_iters 6") == 0


def changes_by(action: Callable[[], None]) -> list[str]:
    """The steps in which an action changes `out`, in order, where nothing kills it."""

    def watched() -> None:
        seen = []

        def hook(event: str, arguments: tuple) -> None:
            if changes_the_run(event, arguments):
                seen.append(f"{event} {arguments[0]}")

        sys.addaudithook(hook)
        action()
        Path("changes").write_text("\n".join(seen))

    assert os.waitstatus_to_exitcode(os.waitpid(start(watched), 0)[1]) == 0
    return Path("changes").read_text().split("\n")


def finish(begun: bool) -> int:
    """Do what a user does after a kill: resume the run, or start it anew if it had not come to a checkpoint."""
    if begun or store.folders(Path("out")):
        return resume("--max_iters 6")
    return cli.run(train.main, [*TINY, *["--overwrite"] * store.holds_run(Path("out"))])


def end_of(out_dir: Path) -> dict[str, object]:
    """What a run ends with: its losses, where its pointers lead, its last checkpoint, and nothing half done."""
    return {
        "losses": records(out_dir),
        "val losses": records(out_dir, "val_loss"),
        "pointers": [(out_dir / name).read_text() for name in ("latest", "best")],
        "hashes": {path.name: files.sha256(path) for path in store.find(out_dir, "latest").iterdir()},
        "half done": list(out_dir.glob(".fastgpt-tmp-*")),
    }


@pytest.fixture(params=["nothing", "a finished run", "a run whose evaluation was cut short"])
def start_from(request: pytest.FixtureRequest, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path | None:
    """The folder that a run is resumed in, of which step 2 is the only checkpoint; None where it starts anew."""
    if request.param == "nothing":
        return None
    if request.param == "a finished run":
        trained("--out_dir", "before", "--max_iters", "2")
    else:  # which is saved before it, and after it again
        with monkeypatch.context() as patch:
            at_call(patch, loss, "_loss", 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
            assert cli.run(train.main, [*TINY, "--out_dir", "before"]) == 128 + signal.SIGTERM
    return workplace / "before"


@pytest.mark.usefixtures("workplace")
@pytest.mark.parametrize("samples", [2, pytest.param(None, marks=pytest.mark.slow, id="all")])
def test_killed_at_any_step_of_a_run_it_ends_as_the_run_that_was_not(
    capfd, start_from: Path | None, samples: int | None
):
    def set_out() -> None:
        shutil.rmtree("out", ignore_errors=True)
        if start_from:
            shutil.copytree(start_from, "out")

    action = continued if start_from else trained
    trained("--out_dir", "whole")
    whole, val_losses = end_of(Path("whole")), records(Path("whole"), "val_loss")
    assert val_losses[6] < val_losses[2] < val_losses[4]
    set_out()
    changes = changes_by(action)
    assert end_of(Path("out")) == whole
    places = range(len(changes)) if samples is None else [len(changes) * i // samples for i in range(samples)]
    for place in places:
        set_out()
        assert is_killed_at(place, action, changes_the_run)
        try:
            # It may have been finished, and the process died while it deleted what was old.
            assert finish(begun=start_from is not None) == 0 or "out is already at step 6" in capfd.readouterr().err
            assert end_of(Path("out")) == whole
        except Exception as error:
            error.add_note(f"killed before step {place} of {len(changes)}, which is {changes[place]}")
            raise
