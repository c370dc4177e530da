"""Weights that are not finite are named by all that reads them, and no file of a run holds what JSON lacks."""

import itertools
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastgpt import cli, generate, train
from fastgpt.checkpoint import store
from fastgpt.checkpoint.store import MODEL, OPTIMIZER
from fastgpt.errors import CorruptCheckpoint
from fastgpt.evaluation import loss as evaluation_loss
from fastgpt.system.finite import first_not_finite
from fastgpt.training.guard import Guard
from tests.helpers import runs
from tests.helpers.verified import Verified

WEIGHT = "h.0.mlp.c_fc.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A run of two checkpoints."""
    return runs.run_in(tmp_path_factory.mktemp("made"), "")


@pytest.fixture
def out(made: Path, workplace: Path) -> Path:
    """A copy of the run, at out, that a test may spoil."""
    return Path(shutil.copytree(made, "out"))


def spoil(step_dir: Path, file: str = MODEL, name: str = WEIGHT, value: float = math.nan) -> None:
    tensors = load_file(step_dir / file)
    tensors[name].view(-1)[3] = value
    save_file(tensors, step_dir / file, metadata={"format": "pt"})
    runs.forge_manifest(step_dir)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_first_tensor_that_is_not_finite_is_found(value: float, dtype: torch.dtype):
    tensors = {name: torch.full((3, 5), torch.finfo(dtype).max, dtype=dtype) for name in "abc"}  # a sum that overflows
    tensors["ids"] = torch.ones(3, dtype=torch.int64)
    assert first_not_finite(tensors) is None
    for name in "cb":
        tensors[name][2, 4] = value
        assert first_not_finite(tensors) == name


@pytest.mark.parametrize(("file", "name"), [(MODEL, WEIGHT), (OPTIMIZER, f"exp_avg_sq.{WEIGHT}")])
def test_verify_names_the_tensor(capsys, out: Path, file: str, name: str):
    spoil(out / "step-000006", file, name, math.inf)
    found = Verified(capsys, "out")
    assert found.code == 1
    (fault,) = found.faults
    assert fault.startswith(f"damaged: {out / 'step-000006' / file} is not finite: {name} holds a NaN or an infinity")
    assert [found.cells(step)[2] for step in (3, 6)] == ["yes", "no"]


def test_a_resume_goes_on_from_the_checkpoint_before_it(capsys, out: Path):
    spoil(out / "step-000006")
    assert runs.resume("--max_iters 9") == 0
    err = capsys.readouterr().err
    assert f"{MODEL} is not finite: {WEIGHT} holds a NaN" in err
    assert "going on from out/step-000003, the newest checkpoint that is whole" in err
    assert Verified(capsys, "out").code == 0


def test_a_step_that_is_named_and_a_generation_are_refused(capsys, out: Path):
    spoil(out / "step-000003")
    spoil(out / "step-000006")
    before = runs.contents(out)
    for main, arguments in (
        (train.main, ["--init_from", "out/step-000003", "--max_iters", "9"]),
        (train.main, ["--init_from", "resume", "--max_iters", "9"]),
        (generate.main, ["--prompt", "The "]),
    ):
        assert cli.run(main, arguments) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("error: ")
        assert f"is not finite: {WEIGHT} holds a NaN or an infinity; " in line
    assert runs.contents(out) == before


def test_weights_of_nanogpt_are_refused(capsys, out: Path, workplace: Path):
    config = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 8, "bias": True, "vocab_size": 29}
    weights = {f"transformer.{name}": tensor.clone() for name, tensor in runs.tensors(out).items()}
    weights[f"transformer.{WEIGHT}"][0, 0] = math.nan
    torch.save({"model": weights, "model_args": config}, "ckpt.pt")
    code = cli.run(
        train.main, ["--init_from", "ckpt.pt", "--dataset", "text.txt", "--out_dir", "new", "--device", "cpu"]
    )
    assert code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"ckpt.pt: its weights are not finite: {WEIGHT} holds a NaN or an infinity" in line
    assert not Path("new").exists()


def test_an_evaluation_of_weights_that_are_not_finite_is_never_the_best_and_not_saved(monkeypatch, capsys, workplace):
    """Their loss may be finite all the same: it may lie at a token that no text has."""
    losses = iter([3.0, 1.0, 2.0])
    finite = first_not_finite
    monkeypatch.setattr(evaluation_loss, "mean_loss", lambda *rest, **named: next(losses))
    answers = iter([None, "wte.weight", None])
    own = lambda tensors: next(answers) if "wpe.weight" in tensors else finite(tensors)  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr("fastgpt.system.finite.first_not_finite", own)
        out = runs.run("--max_iters 9")
    assert [folder.name for folder in store.folders(out)] == ["step-000003", "step-000009"]
    assert (out / "best").read_text() == "step-000009\n"
    told = [line for line in capsys.readouterr().err.splitlines() if "not finite" in line]
    assert told == ["warning: step 6: not saved, as its weights are not finite: wte.weight"]


def test_a_step_whose_weights_were_not_finite_is_saved_once_a_rollback_has_led_there_again(monkeypatch, workplace):
    """Weights that are not finite at step 6, then losses that are not, then the same steps with others."""
    finite, answers = first_not_finite, iter([None, "wte.weight"])
    own = lambda tensors: next(answers, None) if "wpe.weight" in tensors else finite(tensors)  # noqa: E731
    judge, judged = Guard.judge, itertools.count(1)

    def spoiled(self, loss, norm, scale=None):
        return judge(self, loss * math.nan if next(judged) in (7, 8) else loss, norm, scale)

    with monkeypatch.context() as patch:
        patch.setattr("fastgpt.system.finite.first_not_finite", own)
        patch.setattr(Guard, "judge", spoiled)
        out = runs.run("--max_iters 9 --rollback_after 2")
    assert runs.records(out, "rolled_back_from") == {3: 8}
    assert [folder.name for folder in store.folders(out)] == ["step-000003", "step-000006", "step-000009"]


def test_the_guards_state_is_always_json(workplace: Path):
    guard = Guard(torch.device("cpu"), patience=5, sigma=6.0)
    for loss in (1.0, 3e38, 2.0):
        guard.judge(torch.tensor(loss), torch.tensor(1.0))
    assert all(map(math.isfinite, guard.state_dict().values()))
    again = Guard(torch.device("cpu"), patience=5, sigma=6.0)
    again.load_state_dict(guard.state_dict() | {"variance": math.inf})  # of an older version
    assert again.state_dict() == guard.state_dict()


def test_what_json_lacks_is_no_content_of_a_runs_file():
    with pytest.raises(ValueError, match="not JSON compliant"):
        store.json_bytes({"loss": math.nan})


def test_a_checkpoint_may_be_asked_for_some_of_its_files(out: Path):
    spoil(out / "step-000006", OPTIMIZER, f"exp_avg.{WEIGHT}")
    store.verify(out / "step-000006", (MODEL,))
    with pytest.raises(CorruptCheckpoint, match="is not finite: exp_avg"):
        store.verify(out / "step-000006")
