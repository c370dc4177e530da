"""From typing the command to the first training step done, in a fresh process, the corpus prepared before."""

import subprocess
import sys


def test_first_step(benchmark, tmp_path):
    runs = iter(range(100))

    def start() -> None:
        out = tmp_path / f"out-{next(runs)}"
        command = [sys.executable, "-m", "fastgpt.train", "--preset", "cpu", "--log_interval", "1"]
        where = ["--out_dir", str(out), "--data_dir", str(tmp_path / "data")]
        with subprocess.Popen([*command, *where], stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            assert any(line.startswith("step 1/") for line in process.stderr), "training ended before its first step"
            process.kill()

    benchmark.pedantic(start, rounds=5, warmup_rounds=1)
    benchmark.extra_info["aim_seconds"] = 10
