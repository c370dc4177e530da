"""A long run that is killed again and again, against the same run left alone: equal to the last bit, or exit code 1.

    python bench/soak.py                                      # 2,000 steps, kill -9 every 5 to 20 seconds
    python bench/soak.py --async_save --steps 10000           # every other flag is the training's own

What it says is a record to keep: the machine, each kill with the step that it hit and the step that the run went on
from, and the hashes of both ends.
"""

# isort: off
import tool  # finds the engine

# isort: on
import json
import platform
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import cpuinfo
import torch

from fastgpt import cli
from fastgpt.checkpoint import store
from fastgpt.loggers.jsonl import read_metrics
from fastgpt.system.files import sha256
from fastgpt.system.units import counted

TRAINING = (
    "--preset cpu --dropout 0.1 --gradient_accumulation_steps 2 --log_interval 1 --eval_interval 50 --eval_iters 2 "
    "--sample_interval 0"
)
SOONEST, LATEST = 5.0, 20.0  # seconds from a start to its kill


def command(out_dir: Path, steps: int, flags: Sequence[str], resume: bool = False) -> list[str]:
    where = ["--out_dir", str(out_dir), "--data_dir", str(out_dir.parent / "data")]
    start = (
        ["--init_from", "resume"] if resume else ["--overwrite", *TRAINING.split(), "--max_iters", str(steps), *flags]
    )
    return [sys.executable, "-m", "fastgpt.train", *start, *where]


def last_step(out_dir: Path) -> int:
    """The last step that the run has logged; 0 for none."""
    records = read_metrics(out_dir / "metrics.jsonl")
    return records[-1]["step"] if records else 0


def saved_step(out_dir: Path) -> int:
    """The step that a resume goes on from; 0 for none."""
    return int(store.newest_intact(out_dir, print).name[5:]) if store.folders(out_dir) else 0


def train_with_kills(out_dir: Path, steps: int, flags: Sequence[str], draw: random.Random) -> int:
    """Start the run, kill it, start it again, until it ends by itself; how often it was killed."""
    kills = 0
    while saved_step(out_dir) < steps:
        again = command(out_dir, steps, flags, resume=saved_step(out_dir) > 0)
        process = subprocess.Popen(again, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        seconds = draw.uniform(SOONEST, LATEST)
        timer = threading.Timer(seconds, process.kill)
        timer.start()
        _, err = process.communicate()
        timer.cancel()
        if process.returncode not in (0, -signal.SIGKILL):
            raise SystemExit(f"it failed with code {process.returncode}: {err.strip().splitlines()[-1]}")
        if process.returncode == 0:
            break
        kills += 1
        print(
            f"kill {kills}: after {seconds:4.1f} s, step {last_step(out_dir)}; on from {saved_step(out_dir)}",
            flush=True,
        )
    return kills


def result(out_dir: Path) -> dict[str, str]:
    """The hashes of the last checkpoint's files, and of all losses with their steps."""
    folder = store.find(out_dir, "latest")
    found = {name: sha256(folder / name) for name in store.FILES}
    records = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    losses = [(r["step"], key, r[key].hex()) for r in records for key in ("loss", "val_loss") if key in r]
    assert len({(step, key) for step, key, _ in losses}) == len(losses), "a step stands in metrics.jsonl twice"
    (out_dir / "losses.json").write_text(json.dumps(losses))
    return found | {"losses": sha256(out_dir / "losses.json")}


def main(argv: Sequence[str] | None = None) -> int:
    parser = tool.Parser(prog="python bench/soak.py", description="Kill a run again and again, and compare.")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    options, flags = parser.parse_known_args(argv)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=tool.ROOT, capture_output=True, text=True
    ).stdout
    print(f"{time.strftime('%Y-%m-%d')}, commit {commit.strip()}: {cpuinfo.get_cpu_info()['brand_raw']}, ", end="")
    print(
        f"{counted(torch.get_num_threads(), 'thread')}, torch {torch.__version__}, Python {platform.python_version()}"
    )
    print(f"training: {TRAINING} --max_iters {options.steps} {' '.join(flags)}".rstrip(), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        alone, killed = Path(folder) / "alone", Path(folder) / "killed"
        began = time.monotonic()
        subprocess.run(
            command(alone, options.steps, flags), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        print(f"left alone: {time.monotonic() - began:.0f} s", flush=True)
        began = time.monotonic()
        kills = train_with_kills(killed, options.steps, flags, random.Random(options.seed))
        print(f"killed {counted(kills, 'time')}: {time.monotonic() - began:.0f} s")
        expected, found = result(alone), result(killed)
    for name, digest in expected.items():
        print(f"{name:<20} {digest[:16]} {found[name][:16]} {'equal' if found[name] == digest else 'DIFFERENT'}")
    if not kills:
        print("the run ended before its first kill, so this proves nothing; take more --steps")
    return 0 if found == expected and kills else 1


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
