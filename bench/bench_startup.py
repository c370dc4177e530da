"""From typing the command to what one waits for, in a fresh process on a warm disk, the corpus prepared before.

Training: to its first step done. Generation: to its first token, from a small checkpoint.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from fastgpt import cli, train

ROUNDS = 3
PROMPT = "\n"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two steps."""
    folder = tmp_path_factory.mktemp("startup")
    short = ["--max_iters", "2", "--eval_interval", "2", "--eval_iters", "1", "--sample_interval", "0"]
    where = ["--out_dir", str(folder / "out"), "--data_dir", str(folder / "data")]
    assert cli.run(train.main, ["--preset", "mini", *short, *where]) == 0
    return folder / "out"


def test_first_step(benchmark, tmp_path: Path):
    runs = iter(range(100))

    def start() -> None:
        out = tmp_path / f"out-{next(runs)}"
        command = [sys.executable, "-m", "fastgpt.train", "--preset", "cpu", "--log_interval", "1"]
        where = ["--out_dir", str(out), "--data_dir", str(tmp_path / "data")]
        with subprocess.Popen([*command, *where], stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            assert any(line.startswith("step 1/") for line in process.stderr), "training ended before its first step"
            process.kill()

    benchmark.pedantic(start, rounds=ROUNDS, warmup_rounds=1)
    benchmark.extra_info["aim_seconds"] = 10


def test_first_token(benchmark, out: Path):
    command = [sys.executable, "-m", "fastgpt.generate", "--out_dir", str(out), "--prompt", PROMPT]

    def start() -> None:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0) as process:
            assert process.stdout is not None
            text = process.stdout.read(len(PROMPT))  # which comes with the first token, or before it
            text += process.stdout.read(1)
            assert len(text) == len(PROMPT) + 1, "generation ended before its first token"
            process.kill()

    benchmark.pedantic(start, rounds=ROUNDS, warmup_rounds=1)
    benchmark.extra_info["aim_seconds"] = 4
