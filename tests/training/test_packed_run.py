"""A packed run: its losses are those of one document at a time, and a resume goes on as it began."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

from fastgpt import cli, train
from fastgpt.checkpoint import run_folder, store
from fastgpt.data.prepared import Corpus
from fastgpt.generation import load
from fastgpt.model.gpt import GPT
from fastgpt.training import setup
from fastgpt.training.step import TrainStep
from tests.helpers import runs
from tests.helpers.packed import loss_alone
from tests.helpers.resumes import HARDER, refused, state_of

END = 256  # of the byte vocabulary
FLAGS = "--dataset texts --tokenizer byte --block_size 24"
STILL = "--learning_rate 1e-30 --min_lr 0 --weight_decay 0"  # the weights stay as they are
IDENTITY = r"\d+ windows of 24 in \d+ val tokens of text [0-9a-f]{16}"


@pytest.fixture(autouse=True)
def texts(workplace: Path) -> Path:
    """Documents shorter and longer than a window, and an end of each."""
    (workplace / "texts").mkdir()
    for i in range(12):
        (workplace / "texts" / f"{i:02}.txt").write_text(runs.TEXT[i * 50 : i * 50 + 10 + 5 * i], encoding="utf-8")
    return workplace / "texts"


def run(flags: str = "", out_dir: str = "out") -> Path:
    return runs.run(f"{FLAGS} {flags}", out_dir)


def resolved(out_dir: Path) -> object:
    return json.loads((out_dir / "config.json").read_text())["pack"]


def val_set(out_dir: Path) -> str:
    return store.load_state(store.find(out_dir, "latest"))["progress"]["val_set"]


@pytest.mark.parametrize("position", ["learned", "rotary"])
@pytest.mark.parametrize("eval_iters", [2, 0])
@pytest.mark.covering_array(1)
def test_its_losses_are_those_of_one_document_at_a_time(position: str, eval_iters: int, monkeypatch):
    seen: list[list] = []
    accumulate = TrainStep.accumulate
    monkeypatch.setattr(
        TrainStep, "accumulate", lambda self, n, batches, *rest: seen.append([*batches]) or accumulate(self, n, batches)
    )
    out = run(f"--pack {STILL} --max_iters 1 --eval_iters {eval_iters} --position {position}")
    model = load.load(out, device="cpu").model
    with torch.no_grad():
        losses = [loss_alone(model, x, y, END).item() for x, y in seen[0]]
        assert runs.records(out) == {1: pytest.approx(sum(losses) / len(losses), rel=1e-5)}
        (folder,) = Path("data").iterdir()
        tokens = torch.frombuffer(bytearray((folder / "val.bin").read_bytes()), dtype=torch.uint16).long()
        count = 2 * 4
        starts = [number * (len(tokens) - 25) // (count - 1) for number in range(count)]
        if not eval_iters:
            starts = list(range(0, len(tokens) - 1, 24))
        windows = [tokens[start : start + 25] for start in starts]
        total = sum(loss_alone(model, w[None, :-1], w[None, 1:], END).item() * (len(w) - 1) for w in windows)
    assert any((window == END).any() for window in windows)
    assert runs.records(out, "val_loss") == {1: pytest.approx(total / sum(len(w) - 1 for w in windows), rel=1e-5)}


def test_a_run_of_a_folder_of_files_says_that_it_is_packed_and_learns(capsys):
    out = run("--pack --max_iters 40 --eval_interval 20")
    told = capsys.readouterr().err
    assert re.search(r"^packing +attention stays within documents, and positions restart at each$", told, re.M)
    losses = runs.records(out)
    assert losses[40] < losses[1] - 0.5
    assert resolved(out) is True
    assert re.fullmatch(f"{IDENTITY}, packed", val_set(out))


def test_without_it_nothing_changes_and_nothing_is_said(capsys):
    plain, unpacked, packed = run("", "plain"), run("--no-pack", "unpacked"), run("--pack", "packed")
    assert capsys.readouterr().err.count("packing") == 1
    assert runs.records(plain) == runs.records(unpacked) != runs.records(packed)
    assert (resolved(plain), resolved(unpacked)) == (False, False)
    assert re.fullmatch(IDENTITY, val_set(plain))


def test_a_corpus_of_document_shards_is_packed_unless_told_otherwise(monkeypatch):
    prepare = setup.corpus.prepare

    def shards(*arguments, **named) -> Corpus:
        return dataclasses.replace(prepare(*arguments, **named), documents=True)

    monkeypatch.setattr(setup.corpus, "prepare", shards)
    assert resolved(run("", "auto")) is True
    assert resolved(run("--no-pack", "unpacked")) is False
    assert runs.resume("--max_iters 7", "auto") == 0


def test_a_resumed_run_is_the_one_that_never_stopped():
    flags = f"{HARDER} --pack --position rotary"
    whole, parted = run(f"{flags} --max_iters 20", "whole"), run(f"{flags} --max_iters 10", "parted")
    assert runs.resume("--max_iters 20", "parted") == 0
    assert state_of(parted) == state_of(whole)
    assert resolved(parted) is True


@pytest.mark.parametrize(
    ("began", "asked", "words"),
    [("--pack", "--no-pack", ["--pack False", "out has True"]), ("", "--pack", ["--pack True", "out has False"])],
)
def test_a_resume_keeps_the_choice(capsys, began: str, asked: str, words: list[str]):
    run(f"{began} --max_iters 2")
    refused(capsys, f"--max_iters 9 {asked}", *words, "a resume keeps it")
    assert runs.resume(f"--max_iters 3 {began} --no-async_save") == 0
    assert resolved(Path("out")) is bool(began)


def rewrite(out_dir: Path, **changes) -> None:
    """Change what config.json records beside the settings; None takes an entry away."""
    content = json.loads((out_dir / "config.json").read_text()) | changes
    content = {name: value for name, value in content.items() if value is not None}
    content["sha256"] = run_folder.content_hash(content)
    (out_dir / "config.json").write_text(json.dumps(content))


def test_a_run_of_an_older_version_goes_on_unpacked():
    whole, older = run("--max_iters 9", "whole"), run("--max_iters 6 --lr_decay_iters 9", "older")
    settings = json.loads((older / "config.json").read_text())["config"]
    rewrite(older, pack=None, config={name: value for name, value in settings.items() if name != "pack"})
    assert runs.resume("--max_iters 9", "older") == 0
    assert runs.records(older) == runs.records(whole)
    assert resolved(older) is False


@pytest.mark.parametrize("pack", ["yes", 1, []])
def test_a_record_that_is_none_is_refused(capsys, pack: object):
    rewrite(run("--max_iters 2"), pack=pack)
    refused(capsys, "--max_iters 9", "config.json is not the configuration of a run")


def test_batches_that_do_not_fit_are_divided_with_their_documents(monkeypatch, capsys):
    whole = run("--pack", "whole")
    forward = GPT.forward

    def limited(self, tokens, *rest, **named):
        if len(tokens) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(self, tokens, *rest, **named)

    monkeypatch.setattr(GPT, "forward", limited)
    parted = run("--pack", "parted")
    assert "going on with --batch_size 2" in capsys.readouterr().err
    assert runs.records(parted) == pytest.approx(runs.records(whole), rel=1e-5)
    assert runs.records(parted, "val_loss") == pytest.approx(runs.records(whole, "val_loss"), rel=1e-5)


@pytest.mark.slow
def test_a_compiled_run_has_the_same_losses():
    eager, compiled = run("--pack", "eager"), run("--pack --compile", "compiled")
    assert runs.records(compiled) == pytest.approx(runs.records(eager), abs=1e-4)


@pytest.mark.slow
def test_our_own_kernels_have_the_same_losses():
    toy = "--pack --block_size 8 --batch_size 2 --gradient_accumulation_steps 1 --max_iters 3 --eval_iters 1"
    ours, theirs = (run(f"{toy} --kernels {backend}", backend) for backend in ("triton", "torch"))
    assert runs.records(ours) == pytest.approx(runs.records(theirs), abs=1e-4)
    assert runs.records(ours, "val_loss") == pytest.approx(runs.records(theirs, "val_loss"), abs=1e-4)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--dataset texts --pack", "and the char vocabulary of texts has none"),
        ("--dataset text.txt --tokenizer byte --pack", "and the byte vocabulary of text has none"),
    ],
)
def test_a_corpus_without_ends_is_refused_before_anything_is_written(flags: str, words: str, capsys):
    assert cli.run(train.main, [*runs.FLAGS, *flags.split()]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: --pack tells documents apart by end-of-text tokens, ")
    assert words in last
    assert last.endswith("or leave --pack out")
    assert not Path("out").exists()
