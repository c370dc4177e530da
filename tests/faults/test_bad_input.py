"""Bad input ends with exit code 2 and one line that names the flag, the value and the way out; never a traceback."""

import dataclasses
import io
import json
import os
import pickle
import random
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastgpt import cli, generate, train
from fastgpt.checkpoint import run_folder, store
from fastgpt.generation import load
from fastgpt.tokenizer import saved
from fastgpt_kernels import launch
from tests.helpers.covering import some
from tests.helpers.runs import PLAIN

WORDS = "The quick brown fox jumps over a lazy dog while nine wise cats watch from trees"
TEXT = " ".join(random.Random(0).choices(WORDS.split(" "), k=200))
FLAGS = shlex.split(
    PLAIN + "--dataset text.txt --device cpu --dtype float32 --n_layer 1 --n_head 2 --n_embd 16 --block_size 8 "
    "--batch_size 2 --max_iters 2 --eval_interval 2 --eval_iters 1 --sample_interval 0"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of two steps in a folder that also holds its text."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    places = [
        "--out_dir",
        str(folder / "out"),
        "--data_dir",
        str(folder / "data"),
        "--dataset",
        str(folder / "text.txt"),
    ]
    assert cli.run(train.main, [*FLAGS, *places]) == 0
    return folder / "out"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: text.txt, and files that are no text."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "short.txt").write_text("only a few words")
    (tmp_path / "latin.txt").write_bytes(TEXT.encode() + b" caf\xe9 " + TEXT.encode())
    (tmp_path / "one.txt").write_bytes(b"a")
    (tmp_path / "binary.txt").write_bytes(TEXT.encode() + b"\0" + TEXT.encode())
    (tmp_path / "utf16.txt").write_bytes(TEXT.encode("utf-16-le"))
    (tmp_path / "nothing").mkdir()
    for name in ("odd", "lacking", "beyond"):
        prepared(tmp_path / name)
    (tmp_path / "odd" / "val.bin").write_bytes(b"\1" * 201)
    (tmp_path / "lacking" / "val.bin").unlink()
    (tmp_path / "beyond" / "train.bin").write_bytes(bytes(2 * 999) + b"\3\0")
    return tmp_path


def prepared(folder: Path) -> None:
    """A folder as nanoGPT prepares one, of three characters."""
    folder.mkdir()
    (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 3, "itos": {0: "a", 1: "b", 2: "c"}}))
    for file in ("train.bin", "val.bin"):
        (folder / file).write_bytes(bytes(2 * 1000))


@pytest.fixture
def out(run: Path, folder: Path) -> Path:
    """A copy of the run that a test may damage, at out."""
    shutil.copytree(run, folder / "out")
    return Path("out")


def error_of(capsys, main, flags: list[str]) -> str:
    """The one error line of a command that is refused; nothing goes to stdout."""
    capsys.readouterr()
    assert cli.run(main, flags) == 2
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert [line for line in lines if "error" in line.lower() or "Traceback" in line] == lines[-1:]
    assert lines[-1].startswith("error: ")
    assert captured.out == ""
    return lines[-1]


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--dataset nowhere.txt", ["--dataset 'nowhere.txt'", "no file or folder", "pydocs"]),
        ("--dataset shakespere", ["--dataset 'shakespere'", "did you mean shakespeare"]),
        ("--dataset empty.txt", ["--dataset 'empty.txt' is empty", "at least 2 characters"]),
        ("--dataset nothing", ["--dataset nothing"]),
        (
            "--dataset short.txt",
            ["--block_size 8", "9 tokens in each split", "14 to train on and 2 to", "try --block_size 1,"],
        ),
        ("--block_size 400", ["--block_size 400", "401 tokens in each", "100 to validate", "try --block_size 99,"]),
        (
            "--dataset latin.txt",
            ["latin.txt", "UTF-8", f"{len(TEXT.encode()) + 4:,}"],
        ),
        ("--dataset one.txt", ["--dataset 'one.txt'", "1 character", "at least 2 characters"]),
        (
            "--dataset binary.txt",
            ["binary.txt is not text", f"byte {len(TEXT):,} (line 1) is NUL", "leave it out, or convert it", "iconv"],
        ),
        ("--dataset utf16.txt", ["utf16.txt is not text", "byte 1 (line 1) is NUL", "UTF-16"]),
        ("--dataset odd", ["odd/val.bin has 201 bytes", "no whole number of uint16 tokens", "prepare"]),
        ("--dataset lacking", ["lacking has no val.bin", "--dataset PATH"]),
        ("--dataset beyond", ["beyond/train.bin holds token 3", "its vocabulary has 3 tokens", "prepare"]),
        ("--learning_rte 1", ["unknown flag --learning_rte", "did you mean --learning_rate?"]),
        ("--n-layr 1", ["unknown flag --n_layr", "did you mean --n_layer?"]),
        ("--n_head 3", ["--n_head 3", "--n_embd 16", "try --n_head 2"]),
        ("--n_kv_head 3 --n_head 4", ["--n_kv_head 3", "--n_head 4", "try --n_kv_head 2"]),
        ("--n_embd -16", ["--n_embd -16", "at least 1"]),
        ("--n_layer 0", ["--n_layer 0", "at least 1"]),
        ("--n_layer two", ["--n_layer 'two'", "whole number"]),
        ("--n_layer 1.5", ["--n_layer '1.5'", "whole number"]),
        ("--n_layer 1e3", ["--n_layer '1e3'", "whole number"]),
        ("--batch_size", ["--batch_size", "needs a value"]),
        ("--learning_rate nan", ["--learning_rate nan", "finite"]),
        ("--learning_rate inf", ["--learning_rate inf", "finite"]),
        ("--learning_rate 0", ["--learning_rate 0", "above 0"]),
        ("--dropout 1", ["--dropout 1", "below 1"]),
        ("--max_minutes -1", ["--max_minutes -1", "above 0"]),
        ("--min_lr 1", ["--min_lr 1", "above --learning_rate", "lower it"]),
        ("--seed -1", ["--seed -1", "at least 0"]),
        ("--device tpu", ["--device 'tpu'", "auto, cpu, mps, cuda"]),
        ("--dtype int8", ["--dtype 'int8'", "auto, float32, bfloat16, float16"]),
        ("--schedule sine", ["--schedule 'sine'", "cosine, linear, constant, wsd", "did you mean cosine?"]),
        ("--device cdua", ["--device 'cdua'", "did you mean cuda?"]),
        ("--init_from resum", ["--init_from 'resum'", "scratch, resume", "did you mean resume?"]),
        ("--kernels cuda", ["--kernels 'cuda'", "auto, torch, reference, triton"]),
        ("--kernels triton --device cpu", ["--kernels triton needs a CUDA GPU, found cpu; use --kernels auto"]),
        ("--compile maybe", ["'maybe'"]),
        ("--preset huge", ["--preset 'huge'", "mini"]),
        ("--preset bbay", ["--preset 'bbay'", "did you mean baby?"]),
        ("--n_layer 1000000000", ["--n_layer 1000000000", "GiB of memory", "GiB free"]),
        ("--n_embd 65536 --n_layer 1000", ["--n_layer 1000", "--n_embd 65536", "GiB of memory", "GiB free"]),
        (f"--batch_size {10**12}", [f"--batch_size {10**12}", "GiB of memory", "GiB free"]),
        (
            f"--gradient_accumulation_steps {10**12}",
            [f"--gradient_accumulation_steps {10**12}", "GiB of memory", "GiB free"],
        ),
        (f"--max_iters {10**30}", [f"--max_iters {10**30}", "at most 9223372036854775807"]),
        (f"--log_interval {10**400}", ["--log_interval 1000", "at most 9223372036854775807"]),
        (f"--tokenizer bpe --vocab_size {10**12}", [f"--vocab_size {10**12}", "at most 1048576"]),
        ("--out_dir ''", ["--out_dir ''", "is empty"]),
        ("--data_dir ''", ["--data_dir ''", "is empty"]),
        ("--dataset ''", ["--dataset ''", "is empty"]),
        (f"--out_dir {'x' * 300}", ["--out_dir 'xxx", "name too long", "name another"]),
        (f"--data_dir {'x/' * 5000}", ["--data_dir 'x/x", "name too long", "name another"]),
        ("--config nowhere.toml", ["--config nowhere.toml", "cannot be read"]),
        ("--out_dir text.txt", ["--out_dir text.txt is a file", "name a folder"]),
        ("--out_dir text.txt/out", ["--out_dir text.txt/out", "cannot be written"]),
        ("--tokenizer bpe --vocab_size 9", ["--vocab_size 9", "at least 257"]),
        ("--overwrite --init_from resume --out_dir nothing", ["nothing"]),
    ],
)
def test_training_refuses(capsys, monkeypatch, flags: str, words: list[str]):
    monkeypatch.setattr(launch, "INTERPRETED", False)
    line = error_of(capsys, train.main, [*FLAGS, *shlex.split(flags)])
    assert [word for word in words if word not in line] == [], line
    assert not Path("out").exists()


@pytest.mark.usefixtures("folder")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU here")
@pytest.mark.parametrize("main", [train.main, generate.main])
def test_a_gpu_that_is_not_there_is_refused(capsys, out: Path, main):
    line = error_of(capsys, main, ["--device", "cuda", "--out_dir", "new" if main is train.main else str(out)])
    assert line == "error: --device cuda: PyTorch finds no CUDA GPU here; use --device auto or cpu"


@pytest.mark.usefixtures("out")
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--prompt 'The ¿ and #'", ["vocabulary", "'¿' (U+00BF)", "'#' (U+0023)", "--tokenizer byte"]),
        ("--prompt FILE:nowhere.txt", ["--prompt 'FILE:nowhere.txt' cannot be read", "No such file"]),
        ("--prompt FILE:nothing", ["--prompt 'FILE:nothing' cannot be read"]),
        ("--prompt FILE:latin.txt", ["--prompt", "latin.txt is not UTF-8", f"byte {len(TEXT.encode()) + 4} is 0xe9"]),
        ("--prompt -", ["--prompt", "stdin is not UTF-8", "byte 1 is 0xff"]),
        ("--out_dir nowhere", ["--out_dir nowhere", "no run", "python -m fastgpt.train --out_dir nowhere"]),
        ("--out_dir nothing", ["--out_dir nothing", "no run"]),
        ("--out_dir text.txt", ["text.txt is no model", "folder"]),
        ("--checkpoint step-000009", ["--checkpoint 'step-000009'", "latest, best, step-000002"]),
        ("--temperature -1", ["--temperature -1", "at least 0"]),
        ("--temperature nan", ["--temperature nan", "finite"]),
        ("--top_p 0", ["--top_p 0", "above 0"]),
        ("--top_p 1.5", ["--top_p 1.5", "at most 1"]),
        ("--top_k -1", ["--top_k -1", "at least 0"]),
        ("--min_p 2", ["--min_p 2", "at most 1"]),
        ("--repetition_penalty 0", ["--repetition_penalty 0", "above 0"]),
        ("--max_new_tokens -5", ["--max_new_tokens -5", "at least 0"]),
        ("--num_samples 0", ["--num_samples 0", "at least 1"]),
        ("--temprature 1", ["unknown flag --temprature", "did you mean --temperature?"]),
        ("--device cpu:x", ["--device 'cpu:x'", "auto, cpu, mps, cuda"]),
        ("--dtype half", ["--dtype 'half'", "auto, float32, bfloat16, float16"]),
        ("--cache pages", ["--cache 'pages'", "none, dense, paged, auto"]),
        ("--cache dense --kv_memory 1GB", ["--kv_memory needs the paged cache, not --cache dense"]),
        ("--kv_memory lots", ["--kv_memory 'lots'", "2GiB, 500MB or 30%"]),
        ("--kv_memory 999TB", ["--kv_memory", "is above", "ask for less"]),
        ("--kernels triton --device cpu", ["--kernels triton needs a CUDA GPU, found cpu; use --kernels auto"]),
        ("The", ["'The' is not a flag"]),
    ],
)
def test_generation_refuses(capsys, monkeypatch, flags: str, words: list[str]):
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\xff")))
    line = error_of(capsys, generate.main, shlex.split(flags))
    assert [word for word in words if word not in line] == [], line


@pytest.mark.parametrize("file", ["model.safetensors", "optim.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_generation_refuses_a_damaged_checkpoint_by_name(capsys, out: Path, file: str, damage: str):
    path = store.find(out, "best") / file
    path.write_bytes(path.read_bytes()[:-9]) if damage == "truncated" else path.unlink()
    flags = ["--prompt", "The ", "--max_new_tokens", "3"]
    if file == "optim.safetensors":  # which only training reads
        assert cli.run(generate.main, flags) == 0
        assert capsys.readouterr().out.startswith("The ")
    else:
        assert str(path) in error_of(capsys, generate.main, flags)


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"{}", b"\xff"])
def test_generation_refuses_a_damaged_run_file_by_name(capsys, out: Path, file: str, content: bytes | None):
    (out / file).unlink() if content is None else (out / file).write_bytes(content)
    assert str(out / file) in error_of(capsys, generate.main, ["--prompt", "The "])


@pytest.mark.parametrize("change", [{"n_layer": "two"}, {"n_layer": -1}, {"n_head": 3}, {"new_flag": 1}], ids=str)
def test_generation_refuses_an_altered_configuration(capsys, out: Path, change: dict):
    content = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(content | {"config": content["config"] | change}))
    line = error_of(capsys, generate.main, ["--prompt", "The "])
    assert next(iter(change)) in line or str(out / "config.json") in line


@pytest.mark.parametrize(
    "change", [{"n_layer": 10**9}, {"block_size": 10**9}, {"n_embd": 65_536}, {"bias": False}], ids=str
)
def test_generation_builds_no_model_of_another_size_than_its_weights(capsys, monkeypatch, out: Path, change: dict):
    config, about = run_folder.load(out)
    about = {name: value for name, value in about.items() if name not in ("format", "config", "sha256")}
    run_folder.save(out, dataclasses.replace(config, **change), saved.load(out / "tokenizer.json"), about)
    monkeypatch.setattr(load, "GPT", None)
    line = error_of(capsys, generate.main, ["--prompt", "The "])
    assert f"{out / 'config.json'} describes" in line
    assert "step-000002/model.safetensors holds" in line


@pytest.mark.parametrize(
    "vocabulary", ["The quick", "\n" + "".join(sorted(set(TEXT))), "".join(sorted(set(TEXT), reverse=True))]
)
def test_generation_refuses_a_checkpoint_of_another_vocabulary(capsys, out: Path, vocabulary: str):
    chars = "".join(dict.fromkeys(vocabulary))
    (out / "tokenizer.json").write_text(json.dumps({"kind": "char", "chars": chars}))
    line = error_of(capsys, generate.main, ["--prompt", "The"])
    assert "out/step-000002 was trained with another vocabulary than out/tokenizer.json holds" in line


def test_a_line_of_ten_megabytes_is_no_bad_input(capsys, folder: Path):
    (folder / "line.txt").write_text("The quick brown fox " * 500_000)
    assert cli.run(train.main, [*FLAGS, "--dataset", "line.txt"]) == 0
    assert store.find(Path("out"), "latest").name == "step-000002"


def test_a_folder_that_may_not_be_entered_is_refused(capsys, monkeypatch, folder: Path):
    real = os.stat

    def denied(path, *rest, **named):
        if str(path).startswith("locked"):
            raise PermissionError(13, "Permission denied")
        return real(path, *rest, **named)

    monkeypatch.setattr(os, "stat", denied)
    for main in (train.main, generate.main):
        line = error_of(capsys, main, ["--out_dir", "locked"])
        assert line == "error: --out_dir 'locked' cannot be looked up: Permission denied; name another"


def test_a_pointer_to_a_missing_checkpoint_is_refused(capsys, out: Path):
    shutil.rmtree(out / "step-000002")
    (out / "step-000001").mkdir()
    assert "'step-000002', which is missing" in error_of(capsys, generate.main, [])


@pytest.mark.parametrize(
    ("module", "flags"),
    some(1, [("fastgpt.train", "--n_embd 15 --n_head 2"), ("fastgpt.generate", "--out_dir nowhere")]),
)
def test_the_commands_themselves_exit_with_2_and_one_line(folder: Path, module: str, flags: str):
    command = [sys.executable, "-m", module, *flags.split()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert done.stderr.startswith("error: --")
