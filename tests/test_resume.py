"""A run that stops and goes on is bit for bit the run that never stopped, wherever its folder lies."""

import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastgpt import checkpoint, cli, generate, train

WORDS = "The quick brown fox jumps over a lazy dog while nine wise cats watch from trees"
TEXT = " ".join(random.Random(0).choices(WORDS.split(" "), k=600))
FLAGS = shlex.split(
    "--dataset text.txt --device cpu --dtype float32 --n_layer 2 --n_head 2 --n_embd 16 --block_size 8 --dropout 0.2 "
    "--batch_size 2 --gradient_accumulation_steps 3 --learning_rate 1e-2 --warmup_iters 5 --lr_decay_iters 40 "
    "--eval_interval 10 --eval_iters 2 --log_interval 4 --sample_interval 0"
)


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "SAMPLE_TOKENS", 20)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path


def start(flags: str, out_dir: str = "out") -> Path:
    assert cli.run(train.main, [*FLAGS, "--out_dir", out_dir, *shlex.split(flags)]) == 0
    return Path(out_dir)


def resume(flags: str = "", out_dir: str = "out") -> int:
    return cli.run(train.main, ["--init_from", "resume", "--out_dir", out_dir, *shlex.split(flags)])


def state_of(out_dir: Path) -> tuple:
    """Everything a run is, to the bit: weights, moments, state, and the losses of metrics.jsonl."""
    folder = checkpoint.find(out_dir, "latest")
    files = [(folder / name).read_bytes() for name in (checkpoint.MODEL, checkpoint.OPTIMIZER, checkpoint.STATE)]
    lines = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    values = [
        (r["step"], key, r[key].hex()) for r in lines for key in ("loss", "grad_norm", "lr", "val_loss") if key in r
    ]
    return folder.name, files, values


@pytest.mark.parametrize(
    "setting",
    ["--dtype float32", "--dtype bfloat16", "--dtype float16", "--kernels reference", "--position rotary --no-bias"],
)
def test_twenty_steps_and_twenty_more_are_forty(setting: str):
    whole = start(f"--max_iters 40 {setting}", "whole")
    parted = start(f"--max_iters 20 {setting}", "parted")
    assert resume("--max_iters 40", "parted") == 0
    assert checkpoint.find(whole, "latest").name == "step-000040"
    assert state_of(parted) == state_of(whole)


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
    (crashed / ".tmp-step-000040-1").mkdir()
    (crashed / ".tmp-step-000040-1" / "model.safetensors").write_bytes(b"half")
    assert resume("--max_iters 40", "crashed") == 0
    # The first part ended at step 30, which is not in the log interval; everything else agrees.
    folder, files, values = state_of(crashed)
    assert (folder, files, [v for v in values if v[0] != 30 or v[1] == "val_loss"]) == state_of(whole)
    assert not list(crashed.glob(".tmp-*"))


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


def test_a_resume_keeps_the_runs_columns_unless_others_are_asked_for(capsys):
    out = start("--max_iters 2 --kernels reference")
    for flags, column in [("--kernels auto --max_iters 4", "reference"), ("--kernels torch --max_iters 6", "torch")]:
        assert resume(flags) == 0
        assert set(json.loads((out / "config.json").read_text())["columns"].values()) == {column}
    assert re.search(r"^kernels +reference \(as this run began\)", capsys.readouterr().err, re.M)


def test_a_resume_may_change_what_is_not_the_models_shape():
    start("--max_iters 4")
    assert resume("--max_iters 6 --learning_rate 5e-3 --batch_size 3 --dropout 0.1 --grad_clip 0.5") == 0
    config, _ = checkpoint.load_run(Path("out"))
    assert (config.learning_rate, config.batch_size, config.dropout, config.n_embd) == (5e-3, 3, 0.1, 16)


def refused(capsys, flags: str = "--max_iters 9", *words: str) -> None:
    """A resume exits 2 with one line that has the words, and leaves the folder as it was."""
    before = {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
    capsys.readouterr()
    assert resume(flags) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("error: ") == 1
    last = captured.err.splitlines()[-1]
    assert last.startswith("error: ")
    assert "Traceback" not in captured.err
    assert [word for word in words if word not in last] == [], last
    assert {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("n_layer", "1"),
        ("n_head", "4"),
        ("n_kv_head", "1"),
        ("n_embd", "32"),
        ("block_size", "4"),
        ("bias", "false"),
        ("position", "rotary"),
        ("tokenizer", "byte"),
    ],
)
def test_another_shape_is_refused_by_name(capsys, flag: str, value: str):
    start("--max_iters 2")
    refused(
        capsys, f"--max_iters 9 --{flag}={value}", f"--{flag} {value.title() if flag == 'bias' else value}", "out has"
    )


def test_the_runs_own_shape_may_be_given_again():
    start("--max_iters 2")
    assert resume("--max_iters 3 --n_layer 2 --n_head 2 --n_embd 16 --block_size 8 --bias --tokenizer char") == 0


def test_a_run_that_is_done_names_a_larger_max_iters(capsys):
    start("--max_iters 2")
    refused(capsys, "", "--max_iters 2", "already at step 2", "--max_iters 4")


def test_a_changed_text_is_refused(capsys):
    start("--max_iters 2")
    Path("text.txt").write_text(TEXT + " fox", encoding="utf-8")
    refused(capsys, "--max_iters 9", "--dataset text.txt", "text changed", "sha256")


def test_another_vocabulary_is_refused(capsys):
    start("--max_iters 2")
    Path("text.txt").write_text(TEXT + "?", encoding="utf-8")
    refused(capsys, "--max_iters 9", "--dataset text.txt", "vocabulary")


@pytest.mark.parametrize("file", ["model.safetensors", "optim.safetensors", "state.json", "manifest.json"])
def test_a_corrupt_checkpoint_is_refused_by_name(capsys, file: str):
    path = checkpoint.find(start("--max_iters 2"), "latest") / file
    path.write_bytes(path.read_bytes()[:-5])
    refused(capsys, "--max_iters 9", str(path))


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "latest"])
@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\x00", None])
def test_a_damaged_run_file_is_refused_by_name(capsys, file: str, content: bytes | None):
    path = start("--max_iters 2") / file
    path.unlink() if content is None else path.write_bytes(content)
    refused(capsys, "--max_iters 9", "out" if (file, content) == ("latest", None) else str(path))


def test_no_run_there_is_refused_with_the_command_that_makes_one(capsys):
    refused(capsys, "", "--out_dir out", "no run", "python -m fastgpt.train --out_dir out")
    Path("out").mkdir()
    refused(capsys, "", "--out_dir out", "no run")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_the_resumed_run_is_the_one_that_was_not_stopped(number: int, code: int):
    flags = [*FLAGS, "--max_iters", "1000000", "--eval_interval", "1000000", "--out_dir", "stop ped"]
    command = [sys.executable, "-m", "fastgpt.train", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if line.startswith("step 8/"):
            os.kill(process.pid, number)
            break
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "Traceback" not in err
    stopped = int(re.search(r"^stopped at step (\d+), saved in stop ped$", out, re.M)[1])
    checkpoint.verify(folder := checkpoint.find(Path("stop ped"), "latest"))
    assert folder.name == f"step-{stopped:06d}"
    assert f"step {stopped}: " in err
    assert " inf" not in err
    assert "Infinity" not in (folder / "state.json").read_text()
    (command,) = re.findall(r"^next:  python -m fastgpt\.train (.*)$", out, re.M)
    assert cli.run(train.main, [*shlex.split(command), "--max_iters", str(stopped + 3)]) == 0
    whole = start(f"--max_iters {stopped + 3} --eval_interval 1000000", "whole")
    resumed = load_file(checkpoint.find(Path("stop ped"), "latest") / checkpoint.MODEL)
    for name, weight in load_file(checkpoint.find(whole, "latest") / checkpoint.MODEL).items():
        assert torch.equal(resumed[name], weight)
