"""Shared by the tests of training runs: a small run in the folder of the fixture `workplace`, and its files."""

import hashlib
import itertools
import json
import os
import random
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fastgpt import cli
from fastgpt import train as command
from fastgpt.checkpoint import run_folder, store
from fastgpt.config.training import TrainConfig
from fastgpt.data.loader import Loader
from fastgpt.generation import load
from fastgpt.generation.sample import sample
from fastgpt.model.gpt import GPT
from fastgpt.tokenizer import saved
from fastgpt.training import run as training
from fastgpt.training.report import RunSummary

WORDS = "The quick brown fox jumps over a lazy dog while nine wise cats watch from häuser and trees"
TEXT = " ".join(random.Random(0).choices(WORDS.split(" "), k=900)) + " the end"
# The settings of the first run that differ from nanoGPT's, set back. A resume takes them too, unlike a preset.
PLAIN = (
    "--tokenizer char --optimizer adamw --schedule cosine --min_lr none --beta2 0.99 --position learned --no-qk_norm "
    "--norm layernorm --mlp gelu --n_inner none --bias --tie --no-zero_init --logit_softcap none "
    "--attention_dropout none --weight_decay 0.1 --no-preview "
)
FLAGS = shlex.split(
    PLAIN + "--dataset text.txt --device cpu --dtype float32 --n_layer 1 --n_head 2 --n_embd 16 --block_size 8 "
    "--dropout 0 "
    "--batch_size 4 --gradient_accumulation_steps 2 --learning_rate 1e-2 --warmup_iters 2 --max_iters 6 "
    "--eval_interval 3 --eval_iters 2 --log_interval 1 --sample_interval 0"
)
ENDLESS = "--max_iters 1000000 --eval_interval 1000000"
SPAWNED: list[subprocess.Popen] = []


def run(flags: str = "", out_dir: str = "out") -> Path:
    """Train with the usual flags, changed by some; the run's folder."""
    assert cli.run(command.main, [*FLAGS, "--out_dir", out_dir, *shlex.split(flags)]) == 0
    return Path(out_dir)


def train(config: TrainConfig) -> RunSummary:
    """Train the run of a configuration, with samples as the command shows them."""
    return training.train(config, sample)


def run_in(folder: Path, flags: str) -> Path:
    """Train in a folder that becomes the working folder for that time, with the text in it; the run's folder."""
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    before = Path.cwd()
    os.chdir(folder)
    try:
        return run(flags).resolve()
    finally:
        os.chdir(before)


def resume(flags: str = "", out_dir: str = "out") -> int:
    """The exit code of going on with a run."""
    return cli.run(command.main, ["--init_from", "resume", "--out_dir", out_dir, *shlex.split(flags)])


def spawn(flags: str = "", **options) -> subprocess.Popen:
    """The same training as `run`, in a process of its own with pipes; the fixture `workplace` ends it."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, "-m", "fastgpt.train", *FLAGS, *shlex.split(flags)]
    SPAWNED.append(process := subprocess.Popen(command, **pipes | options))
    return process


def signal_at_step(process: subprocess.Popen, step: int, number: int) -> None:
    """Wait until the process has shown a step, and send it a signal."""
    for line in process.stderr:
        if line.startswith(f"step {step}/"):
            os.kill(process.pid, number)
            return
    raise AssertionError(f"the process ended before step {step}")


def at_call(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, call: int, action: Callable[[], None]) -> None:
    """Let an action happen in the n-th call of a function, before the function's own work."""
    function, calls = getattr(owner, name), itertools.count(1)

    def wrapped(*arguments, **named):
        if next(calls) == call:
            action()
        return function(*arguments, **named)

    monkeypatch.setattr(owner, name, wrapped)


def records(out_dir: Path, key: str = "loss") -> dict[int, float]:
    """{step: value} of metrics.jsonl, every line of which must be whole and strict JSON."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    lines = (out_dir / "metrics.jsonl").read_text().split("\n")
    assert lines.pop() == ""
    found = [(r["step"], r[key]) for line in lines if key in (r := json.loads(line, parse_constant=refuse))]
    assert len(dict(found)) == len(found), "a step stands there twice"
    return dict(found)


def tensors(out_dir: Path, file: str = store.MODEL, name: str = "latest") -> dict[str, torch.Tensor]:
    return load_file(store.find(out_dir, name) / file)


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file's bytes and time of change, the lock's aside."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def forge_manifest(step_dir: Path) -> None:
    """Make the manifest of an altered checkpoint fit its files, as somebody hostile would."""
    files = {
        name: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name in store.FILES
        if (content := (step_dir / name).read_bytes())
    }
    (step_dir / store.MANIFEST).write_text(json.dumps({"format": 1, "files": files}, indent=1) + "\n")


def parts(out_dir: Path, name: str) -> tuple[GPT, Loader, Loader]:
    """The model of a checkpoint, and loaders over the two splits made anew from the text."""
    config, _ = run_folder.load(out_dir)
    tokenizer, cut = saved.load(out_dir / "tokenizer.json"), int(0.9 * len(TEXT))
    generator = load.load(out_dir, checkpoint_name=name, device="cpu")
    loaders = [
        Loader(
            tokenizer.encode(text).astype(np.uint16),
            config.block_size,
            tokenizer.vocab_size,
            seed=config.seed,
            device=torch.device("cpu"),
            name="the text",
        )
        for text in (TEXT[:cut], TEXT[cut:])
    ]
    return generator.model, *loaders
