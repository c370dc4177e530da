"""From typing the command to the first training step done, in a fresh process."""

import subprocess
import sys


def test_first_step(benchmark, tmp_path):
    runs = iter(range(100))

    def start() -> None:
        out = tmp_path / f"out-{next(runs)}"
        command = [sys.executable, "-m", "fastgpt.train", "--preset", "cpu", "--max_iters", "1"]
        where = ["--out_dir", str(out), "--data_dir", str(tmp_path / "data")]
        subprocess.run([*command, *where], check=True, capture_output=True)

    benchmark.pedantic(start, rounds=3)
    benchmark.extra_info["aim_seconds"] = 10
