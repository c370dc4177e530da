"""A resume with a text that changed: refused, unless --allow_data_change says so."""

import json
from pathlib import Path

import numpy as np
import pytest

from fastgpt import cli, train
from fastgpt.checkpoint import run_folder, store
from fastgpt.data import corpus, prepared
from fastgpt.evaluation import loss
from fastgpt.tokenizer import saved
from tests.helpers import runs

pytestmark = pytest.mark.usefixtures("workplace")
SHORTER = runs.TEXT[: len(runs.TEXT) // 2].replace("ä", "a")  # lacks a character that the run knows
CHANGE = "--max_iters 6 --allow_data_change"


@pytest.fixture
def out(workplace: Path) -> Path:
    """A run of two steps of text.txt."""
    return runs.run("--max_iters 2")


def write(text: str) -> None:
    Path("text.txt").write_text(text, encoding="utf-8")


def refusal(capsys, flags: str) -> str:
    capsys.readouterr()
    assert runs.resume(flags) == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("text", [runs.TEXT + " fox", SHORTER], ids=["same vocabulary", "smaller vocabulary"])
def test_a_refusal_names_the_way_on(text: str, out: Path, capsys):
    write(text)
    before = runs.contents(out)
    line = refusal(capsys, "--max_iters 6")
    assert line.startswith(f"error: --dataset {Path('text.txt').absolute()}")
    assert "go on with it by --allow_data_change" in line
    assert runs.contents(out) == before


def test_the_run_goes_on_with_its_own_vocabulary_and_says_so(out: Path, capsys):
    vocabulary = (out / "tokenizer.json").read_bytes()
    before = json.loads((out / "config.json").read_text())["corpus"]["source_sha256"]
    write(SHORTER)
    capsys.readouterr()
    assert runs.resume(CHANGE) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "text that changed" in line]
    assert len(told) == 1
    assert "going on with a text that changed since the run began" in told[0]
    assert before[:8] in told[0]
    assert (out / "tokenizer.json").read_bytes() == vocabulary
    config, about = run_folder.load(out)
    assert about["corpus"]["source_sha256"] not in (before, None)
    assert not config.allow_data_change
    assert store.find(out, "latest").name == "step-000006"
    assert sorted(runs.records(out)) == [1, 2, 3, 4, 5, 6]


def test_the_new_text_is_what_it_then_learns(out: Path):
    write("The fox " * 300)
    assert runs.resume(CHANGE) == 0
    folder = next(Path("data").glob("text-char-of-*"))
    loaded = prepared.load(folder)
    assert loaded.tokenizer == saved.load(out / "tokenizer.json")
    assert loaded.tokenizer.decode(np.asarray(loaded.train()[:16])) == "The fox The fox "


@pytest.mark.parametrize("text", [runs.TEXT + " fox", SHORTER], ids=["same vocabulary", "smaller vocabulary"])
def test_the_new_text_is_the_runs_own_from_then_on(text: str, out: Path, capsys):
    write(text)
    assert runs.resume("--max_iters 4 --allow_data_change") == 0
    capsys.readouterr()
    assert runs.resume("--max_iters 6") == 0
    assert "text that changed" not in capsys.readouterr().err
    write(runs.TEXT + " dog")
    assert "text changed" in refusal(capsys, "--max_iters 8")


def test_which_checkpoint_is_best_begins_anew(monkeypatch, capsys):
    """The loss of one text says nothing about that of another."""
    losses = iter([1.0, 3.0, 4.0])
    monkeypatch.setattr(loss, "mean_loss", lambda *rest, **named: next(losses))
    out = runs.run("--max_iters 2", "changing")
    write(SHORTER)
    capsys.readouterr()
    with monkeypatch.context() as patch:  # killed when config.json knows the new text, and no checkpoint yet does
        patch.setattr(store, "save", lambda *rest: (_ for _ in ()).throw(SystemExit(9)))
        with pytest.raises(SystemExit):
            runs.resume("--max_iters 4 --eval_interval 4 --allow_data_change", "changing")
    assert "which checkpoint is best begins anew" in capsys.readouterr().err
    assert runs.resume("--max_iters 4 --eval_interval 4", "changing") == 0
    assert (out / "best").read_text() == "step-000004\n"


def test_an_unchanged_text_changes_nothing_with_it(out: Path, capsys):
    assert cli.run(train.main, [*runs.FLAGS, "--out_dir", "straight"]) == 0
    capsys.readouterr()
    assert runs.resume(CHANGE) == 0
    assert "text that changed" not in capsys.readouterr().err
    straight, resumed = runs.tensors(Path("straight")), runs.tensors(out)
    assert all(straight[name].equal(resumed[name]) for name in straight)


def test_a_character_that_the_run_does_not_know_is_named(out: Path, capsys):
    write(runs.TEXT + "?")
    before = runs.contents(out)
    line = refusal(capsys, CHANGE)
    assert "lacks '?' (U+003F)" in line
    assert runs.contents(out) == before


def test_a_prepared_folder_of_another_vocabulary_stays_refused(out: Path, capsys):
    write("a b c " * 300)
    other = corpus.prepare("text.txt", quiet=True)
    line = refusal(capsys, f"{CHANGE} --dataset {other.path}")
    assert "its vocabulary is not that of the run" in line
    assert "allow_data_change" not in line
