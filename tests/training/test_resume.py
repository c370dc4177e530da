"""A run that stops and goes on is bit for bit the run that never stopped, wherever its folder lies."""

import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest

from fastgpt import cli, generate, train
from fastgpt.checkpoint import run_folder, store
from fastgpt.config.training import OPTIMIZERS
from tests.helpers.covering import some
from tests.helpers.resumes import refused, start, state_of
from tests.helpers.runs import TEXT, forge_manifest, resume

pytestmark = pytest.mark.usefixtures("workplace")


@pytest.mark.parametrize(
    "setting",
    some(
        2,
        [
            "--n_layer 2",
            "--dtype bfloat16",
            "--kernels reference",
            "--position rotary --no-bias",
            "--dtype float16",
            "--norm rmsnorm --no-norm_gain --mlp relu2 --head_size 6 --attention_bias --no-bias --dtype bfloat16",
            "--norm rmsnorm --qk_norm --mlp swiglu --no-tie --zero_init --logit_softcap 9 --position rotary",
        ],
    ),
)
def test_twenty_steps_and_twenty_more_are_forty(setting: str):
    whole = start(f"--max_iters 40 {setting}", "whole")
    parted = start(f"--max_iters 20 {setting}", "parted")
    assert resume("--max_iters 40", "parted") == 0
    assert store.find(whole, "latest").name == "step-000040"
    assert state_of(parted) == state_of(whole)


def test_a_run_with_muon_goes_on_to_the_bit():
    flags = "--optimizer muon --muon_momentum_warmup 30 --n_kv_head 1 --async_save --log_stats"
    whole = start(f"--max_iters 40 {flags}", "whole")
    parted = start(f"--max_iters 20 {flags}", "parted")
    assert resume("--max_iters 40", "parted") == 0
    assert state_of(parted) == state_of(whole)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_compiled_run_goes_on_to_the_bit(optimizer: str):
    whole = start(f"--compile --max_iters 12 --optimizer {optimizer}", "whole")
    parted = start(f"--compile --max_iters 6 --lr_decay_iters 40 --optimizer {optimizer}", "parted")
    assert resume("--max_iters 12", "parted") == 0
    parts, at_end = state_of(parted), state_of(whole)
    assert parts[1] == at_end[1]
    own = [value for value in at_end[2] if value[0] not in (6,)]  # where the parted run was evaluated as well
    assert [value for value in parts[2] if value[0] not in (6,)] == own


@pytest.mark.slow
def test_compiled_runs_of_two_threads_have_the_same_bits():
    """PyTorch's compiler would let the threads add an embedding's gradients in any order."""
    flags = "--compile --threads 2 --batch_size 12 --block_size 64 --n_embd 64 --max_iters 4"
    assert state_of(start(flags, "one")) == state_of(start(flags, "two"))


@pytest.mark.slow
def test_a_run_cut_into_many_parts_is_the_same_run():
    whole = start("--max_iters 24 --log_interval 1 --eval_interval 1", "whole")
    parted = start("--max_iters 1 --log_interval 1 --eval_interval 1", "parted")
    for end in (2, 7, 8, 24):
        assert resume(f"--max_iters {end}", "parted") == 0
    assert state_of(parted) == state_of(whole)


def test_what_a_crash_left_behind_is_done_again_and_not_twice():
    whole = start("--max_iters 40", "whole")
    # As if the power failed in step 33: the checkpoint is of step 30, the metrics are beyond it, a save is half done.
    crashed = start("--max_iters 30", "crashed")
    with (crashed / "metrics.jsonl").open("a") as file:
        file.write('{"step": 32, "tokens": 1536, "loss": 99.0}\n{"step": 36, "tok')
    (crashed / ".fastgpt-tmp-step-000040-1").mkdir()
    (crashed / ".fastgpt-tmp-step-000040-1" / "model.safetensors").write_bytes(b"half")
    assert resume("--max_iters 40", "crashed") == 0
    assert state_of(crashed) == state_of(whole)
    assert not list(crashed.glob(".fastgpt-tmp-*"))


def test_a_moved_and_renamed_run_resumes_and_generates(capsys):
    whole, parted = start("--max_iters 40", "whole"), start("--max_iters 20", "parted")
    moved = Path("elsewhere") / "my run"
    moved.parent.mkdir()
    parted.rename(moved)
    assert resume("--max_iters 40", str(moved)) == 0
    assert state_of(moved) == state_of(whole)
    assert not parted.exists()
    capsys.readouterr()
    assert cli.run(generate.main, ["--out_dir", str(moved), "--prompt", "The ", "--max_new_tokens", "5"]) == 0
    assert capsys.readouterr().out.startswith("The ")


def test_a_resume_keeps_the_runs_backends_unless_others_are_asked_for(capsys):
    out = start("--max_iters 2 --kernels reference")
    for flags, column in [("--kernels auto --max_iters 4", "reference"), ("--kernels torch --max_iters 6", "torch")]:
        assert resume(flags) == 0
        assert set(json.loads((out / "config.json").read_text())["columns"].values()) == {column}
    assert re.search(r"^kernels +reference \(as this run began\)", capsys.readouterr().err, re.M)


def test_a_resume_may_change_what_is_not_the_models_shape():
    start("--max_iters 4")
    assert resume("--max_iters 6 --learning_rate 5e-3 --batch_size 3 --dropout 0.1 --grad_clip 0.5") == 0
    config, _ = run_folder.load(Path("out"))
    assert (config.learning_rate, config.batch_size, config.dropout, config.n_embd) == (5e-3, 3, 0.1, 16)


@pytest.mark.parametrize(
    ("flag", "value"),
    some(
        4,
        [
            ("n_layer", "2"),
            ("n_head", "4"),
            ("n_kv_head", "1"),
            ("n_embd", "32"),
            ("block_size", "4"),
            ("bias", "false"),
            ("position", "rotary"),
            ("tokenizer", "byte"),
            ("optimizer", "muon"),
        ],
    ),
)
def test_another_shape_is_refused_by_name(capsys, flag: str, value: str):
    start("--max_iters 2")
    refused(
        capsys, f"--max_iters 9 --{flag}={value}", f"--{flag} {value.title() if flag == 'bias' else value}", "out has"
    )


def test_the_runs_own_shape_may_be_given_again():
    start("--max_iters 2")
    assert resume("--max_iters 3 --n_layer 1 --n_head 2 --n_embd 16 --block_size 8 --bias --tokenizer char") == 0


def test_a_run_that_is_done_names_a_larger_max_iters(capsys):
    start("--max_iters 2")
    refused(capsys, "", "--max_iters 2", "already at step 2", "--max_iters 4")


def test_a_run_beyond_max_iters_is_refused_though_its_evaluation_is_owed(capsys):
    folder = store.find(start("--max_iters 4 --eval_interval 2"), "latest")
    state = json.loads((folder / store.STATE).read_text())
    state["progress"]["evaluated_step"] = 2  # as a signal leaves it
    (folder / store.STATE).write_text(json.dumps(state))
    forge_manifest(folder)
    refused(capsys, "--max_iters 3", "--max_iters 3", "already at step 4")


def test_a_changed_text_is_refused(capsys):
    start("--max_iters 2")
    Path("text.txt").write_text(TEXT + " fox", encoding="utf-8")
    refused(capsys, "--max_iters 9", f"--dataset {Path('text.txt').absolute()}", "text changed", "sha256")


def test_another_vocabulary_is_refused(capsys):
    start("--max_iters 2")
    Path("text.txt").write_text(TEXT + "?", encoding="utf-8")
    refused(capsys, "--max_iters 9", f"--dataset {Path('text.txt').absolute()}", "vocabulary")


def test_a_run_goes_on_from_the_step_that_is_named(capsys):
    whole, undone = start("--max_iters 40", "whole"), start("--max_iters 30", "undone")
    assert cli.run(train.main, ["--init_from", "undone/step-000010", "--max_iters", "40"]) == 0
    assert state_of(undone) == state_of(whole)


@pytest.mark.parametrize(
    ("init_from", "flags", "words"),
    [
        ("out/step-000099", "", ["--init_from 'out/step-000099'", "is not one of scratch, resume", "path of a step"]),
        ("out", "", ["--out_dir out already holds a run; continue it with --init_from resume"]),
        ("other/step-000002", "--out_dir out", ["--out_dir out already holds a run"]),
        ("out/plots", "--out_dir new", ["out/plots holds no run"]),
        ("resum", "", ["--init_from 'resum'", "did you mean resume?"]),
        ("out/step-000002", "--preset mini", ["--preset mini", "keeps the run's own settings"]),
        ("out/step-000002", "--overwrite", ["--overwrite deletes the run that --init_from out/step-000002"]),
    ],
)
def test_a_start_from_what_is_no_step_of_the_run_is_refused(capsys, init_from: str, flags: str, words: list[str]):
    start("--max_iters 2")
    start("--max_iters 2", "other")
    (Path("out") / "plots").mkdir(exist_ok=True)
    capsys.readouterr()
    assert cli.run(train.main, ["--init_from", init_from, "--max_iters", "9", *flags.split()]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert [word for word in words if word not in line] == [], line


def test_no_run_there_is_refused_with_the_command_that_makes_one(capsys):
    refused(capsys, "", "--out_dir out", "no run", "python -m fastgpt.train --out_dir out")
    Path("out").mkdir()
    refused(capsys, "", "--out_dir out", "no run")


def test_a_resume_deletes_nothing_where_no_run_is(capsys):
    """A misspelled --init_from has the working folder for its run's."""
    Path(".fastgpt-tmp-precious").touch()
    for flags in ("--init_from resum", "--init_from ./model.ptx", "--init_from resume --out_dir ."):
        assert cli.run(train.main, flags.split()) == 2
    assert sorted(path.name for path in Path().iterdir()) == [".fastgpt-tmp-precious", "text.txt"]


def test_a_run_begun_with_overwrite_is_resumed_and_not_overwritten():
    start("--max_iters 4")
    out = start("--max_iters 2 --overwrite")
    content = json.loads((out / "config.json").read_text())["config"]
    assert not {"overwrite", "init_from"} & content.keys()
    assert resume("--max_iters 4") == 0
    assert resume("--max_iters 6") == 0  # after a resume as well
    assert store.find(out, "latest").name == "step-000006"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_float32_run_goes_on_in_another_arithmetic(dtype: str):
    out = start("--max_iters 4")
    assert resume(f"--max_iters 8 --dtype {dtype}") == 0
    assert json.loads((out / "config.json").read_text())["dtype"] == dtype
    assert bool(store.load_state(store.find(out, "latest"))["scaler"]) == (dtype == "float16")
    assert resume("--max_iters 12 --dtype float32") == 0


def test_a_resume_under_auto_keeps_the_runs_arithmetic(capsys):
    out = start("--max_iters 2 --dtype float16")
    assert resume("--max_iters 4 --dtype auto") == 0
    about = json.loads((out / "config.json").read_text())
    assert (about["dtype"], about["config"]["dtype"]) == ("float16", "auto")
    assert re.search(r"^machine .*float16$", capsys.readouterr().err.split("resume:")[1], re.M)


def test_a_vocabulary_that_was_swapped_is_refused(capsys):
    out = start("--max_iters 2")
    path = out / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    swapped = content | {"chars": content["chars"][::-1]}  # of the same size
    path.write_text(json.dumps(swapped), encoding="utf-8")
    refused(capsys, "--max_iters 9", "vocabulary")


def test_a_checkpoint_of_another_vocabulary_is_refused_though_the_run_folder_agrees(capsys):
    start("--max_iters 2")
    folder = store.find(Path("out"), "latest")
    state = json.loads((folder / store.STATE).read_text())
    (folder / store.STATE).write_text(json.dumps(state | {"vocabulary": "0" * 64}))
    forge_manifest(folder)
    refused(capsys, "--max_iters 9", "trained with another vocabulary")


@pytest.mark.parametrize("file", ["train.bin", "val.bin"])
def test_changed_tokens_of_a_nanogpt_folder_are_refused(capsys, file: str):
    folder = Path("data") / "foreign"
    folder.mkdir(parents=True)
    chars = sorted(set(TEXT))
    tokens = np.array([chars.index(char) for char in TEXT], dtype=np.uint16)
    tokens[:-200].tofile(folder / "train.bin")
    tokens[-200:].tofile(folder / "val.bin")
    (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": len(chars), "itos": dict(enumerate(chars))}))
    start("--max_iters 2 --dataset foreign")
    assert resume("--max_iters 4") == 0
    content = bytearray((folder / file).read_bytes())
    content[6] ^= 1
    (folder / file).write_bytes(content)
    refused(capsys, "--max_iters 9", f"--dataset {folder.absolute()}", "text changed", "sha256")
