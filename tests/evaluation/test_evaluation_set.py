"""The evaluation set belongs to the run: a resume reads the same windows, and what changes them begins best anew."""

import json
from pathlib import Path

import pytest

from fastgpt.checkpoint import run_folder, store
from fastgpt.checkpoint.store import STATE
from fastgpt.data.loader import Loader
from fastgpt.evaluation import loss
from fastgpt.loggers.curves import plot_loss
from tests.helpers import runs
from tests.helpers.verified import Verified

pytestmark = [pytest.mark.usefixtures("workplace")]
STILL = "--max_iters 9 --learning_rate 1e-30 --min_lr 0 --weight_decay 0"  # the weights stay as they are


def marks(out_dir: Path) -> list[dict]:
    found = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    return [record for record in found if "val_set" in record]


def told(capsys) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if "best begins anew" in line]


@pytest.mark.parametrize("eval_iters", [2, 0])
def test_other_batches_and_seeds_read_the_same_windows_to_the_bit(capsys, eval_iters: int):
    out = runs.run(f"--eval_iters {eval_iters}")
    before = runs.records(out, "val_loss")
    best = (out / "best").read_text()
    for iters, change in ((9, "--batch_size 2"), (12, "--seed 5 --gradient_accumulation_steps 1"), (15, "")):
        assert runs.resume(f"{STILL} --max_iters {iters} {change}") == 0
    losses = runs.records(out, "val_loss")
    assert {losses[step] for step in (6, 9, 12, 15)} == {before[6]}
    assert (out / "best").read_text() == best
    assert (told(capsys), marks(out)) == ([], [])
    assert run_folder.load(out)[1]["evaluation"] == {"windows": 4 * eval_iters, "batch_size": 4}


def test_another_number_of_windows_begins_best_anew_and_is_said_and_recorded_once(capsys, monkeypatch):
    losses = iter([1.0, 3.0, 4.0, 5.0])
    monkeypatch.setattr(loss, "mean_loss", lambda *rest, **named: next(losses))
    out = runs.run("--max_iters 3")
    capsys.readouterr()
    with monkeypatch.context() as patch:  # killed when the change is recorded, and no checkpoint yet knows of it
        patch.setattr(store, "save", lambda *rest: (_ for _ in ()).throw(SystemExit(9)))
        with pytest.raises(SystemExit):
            runs.resume("--max_iters 6 --eval_iters 3 --batch_size 2")
    (line,) = told(capsys)
    assert line.startswith("step 3: evaluations read 12 windows of 8 in ")
    assert "and before '8 windows of 8 in " in line
    assert len(marks(out)) == 1
    assert runs.resume("--max_iters 6 --eval_iters 3 --batch_size 2") == 0
    assert len(told(capsys)) == 1
    (mark,) = marks(out)
    assert mark["step"] == 3
    assert mark["val_set"].startswith("12 windows of 8 in ")
    assert (out / "best").read_text() == "step-000006\n"
    assert runs.resume("--max_iters 9") == 0  # which keeps those
    assert told(capsys) == []
    assert marks(out) == [mark]
    assert (out / "best").read_text() == "step-000006\n"


def test_going_back_to_a_step_before_the_change_takes_it_back(capsys):
    out = runs.run("--max_iters 3")
    assert runs.resume("--max_iters 6 --eval_iters 3") == 0
    assert len(marks(out)) == 1
    assert runs.resume("--max_iters 6 --eval_iters 2 --init_from out/step-000003") == 0
    assert marks(out) == []
    assert len(runs.records(out, "val_loss")) == 2


def as_older(out_dir: Path) -> None:
    """Make a run what a version left that did not record evaluation sets."""
    config, about = run_folder.load(out_dir)
    kept = {name: value for name, value in about.items() if name not in ("format", "config", "sha256", "evaluation")}
    run_folder.save(out_dir, config, run_folder.vocabulary(out_dir), kept)
    for folder in store.folders(out_dir):
        state = store.load_state(folder)
        del state["progress"]["val_set"]
        (folder / STATE).write_bytes(store.json_bytes(state))
        runs.forge_manifest(folder)


@pytest.mark.parametrize(("eval_iters", "changes"), [("2", 1), ("0", 0), ("none", 0)])
def test_a_run_of_an_older_version_changes_its_windows_once(capsys, eval_iters: str, changes: int):
    out = runs.run(f"--eval_iters {eval_iters}")
    as_older(out)
    capsys.readouterr()
    assert runs.resume("--max_iters 9 --batch_size 2") == 0
    lines = told(capsys)
    assert len(lines) == len(marks(out)) == changes
    assert all("before 'windows drawn at random'" in line for line in lines)
    assert runs.resume("--max_iters 12") == 0
    assert told(capsys) == []


def test_the_loss_does_not_depend_on_what_memory_allows_at_once(monkeypatch):
    whole = runs.run("--eval_iters 3 --batch_size 7", "whole")
    read = Loader.windows
    monkeypatch.setattr(Loader, "windows", lambda self, count, batch_size: read(self, count, 2))
    parted = runs.run("--eval_iters 3 --batch_size 7", "parted")
    assert runs.records(parted, "val_loss") == pytest.approx(runs.records(whole, "val_loss"), rel=1e-6)


def test_verify_says_which_losses_are_of_another_set(capsys):
    out = runs.run()
    assert runs.resume("--max_iters 9 --eval_iters 3") == 0
    found = Verified(capsys, str(out))
    assert found.code == 0
    assert ["evaluated on another set" in found.rows[step] for step in (3, 6, 9)] == [True, True, False]


def test_the_picture_marks_the_change(monkeypatch):
    from matplotlib.axes import Axes

    out = runs.run()
    assert runs.resume("--max_iters 9 --eval_iters 3") == 0
    lines, curves = [], []
    axvline, plot = Axes.axvline, Axes.plot
    monkeypatch.setattr(Axes, "axvline", lambda self, x, **named: lines.append(x) or axvline(self, x, **named))
    monkeypatch.setattr(Axes, "plot", lambda self, x, *rest, **named: curves.append(x) or plot(self, x, *rest, **named))
    plot_loss(out)
    assert lines == [6]
    assert curves[1:] == [(3, 6), (9,)]


@pytest.mark.parametrize("record", [{"windows": -1, "batch_size": 4}, {"windows": 2, "batch_size": "4"}, [2]])
def test_a_record_that_is_none_is_refused(capsys, record):
    out = runs.run("--max_iters 3")
    config, about = run_folder.load(out)
    kept = {name: value for name, value in about.items() if name not in ("format", "config", "sha256")}
    run_folder.save(out, config, run_folder.vocabulary(out), kept | {"evaluation": record})
    capsys.readouterr()
    assert runs.resume("--max_iters 9") == 2
    assert "config.json" in capsys.readouterr().err.splitlines()[-1]
