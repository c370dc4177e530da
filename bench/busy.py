"""Times training and generation beside other programs, by how OpenMP's threads wait at barriers.

    python bench/busy.py                                  # every workload; several minutes
    python bench/busy.py --workloads train-cpu --loads idle one

Each policy is a process of its own, as its variables are read once, and all take short turns in the same minutes. The
first half second of a turn is not counted. `auto` is what the commands do: `system.contention` chooses while it runs.
"""

import argparse
import dataclasses
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, where modules are named bench.*

from bench.tools import command_line

LEAD = 0.5  # seconds of a turn that are not counted
AIM = 0.9  # of the best policy's speed
BABY_BATCH = 2  # of the preset's 64 sequences, so that a turn holds several steps
NEW_TOKENS = 30

# The variables that a user would set, and the number of threads; None: one for each core.
POLICIES: dict[str, tuple[dict[str, str], int | None]] = {
    "as PyTorch comes": ({}, None),
    "GOMP_SPINCOUNT=60000": ({"GOMP_SPINCOUNT": "60000"}, None),
    "GOMP_SPINCOUNT=5000": ({"GOMP_SPINCOUNT": "5000"}, None),
    "OMP_WAIT_POLICY=passive": ({"OMP_WAIT_POLICY": "passive"}, None),
    "one thread": ({}, 1),
    "auto": ({}, None),
}
# What else runs: so many programs that compute without a pause, another training, or one that comes and goes.
LOADS = {
    "idle": "idle",
    "one": "1 busy core",
    "two": "2 busy cores",
    "training": "a training",
    "comes": "comes and goes",
}
COMES, GOES = 2.0, 2.0  # seconds
PYTHON = "import time\nwhile True: pass"
IN_TURNS = f"""import time
while True:
    end = time.monotonic() + {COMES}
    while time.monotonic() < end: pass
    time.sleep({GOES})"""


class Turn(NamedTuple):
    """Of one policy: what it did in a second, and the part of its turn in which its threads slept at barriers."""

    speed: float
    slept: float


def main(argv: Sequence[str] | None = None) -> int:
    parser = command_line.Parser(
        prog="python bench/busy.py", description="Speed beside other programs, by waiting policy."
    )
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--loads", nargs="+", choices=LOADS, default=list(LOADS))
    parser.add_argument("--seconds", type=command_line.positive, default=0.8, help="of a turn, that are counted")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.child:
        serve(*options.child)
        return 0
    print(machine(), flush=True)
    for workload in options.workloads:
        with ExitStack() as stack:
            runners = {policy: stack.enter_context(Runner(workload, policy)) for policy in POLICIES}
            for runner in runners.values():
                runner.wait()
            columns = {}
            for load in options.loads:
                seconds = COMES + GOES - LEAD if load == "comes" else options.seconds
                with running(load) as others:
                    columns[load] = measure(runners, options.rounds, seconds)
                    assert all(other.poll() is None for other in others), "a program that was to be the load has ended"
        print(table(workload, columns, options), flush=True)
    return 0


def measure(runners: "dict[str, Runner]", rounds: int, seconds: float) -> dict[str, list[Turn]]:
    taken: dict[str, list[Turn]] = {policy: [] for policy in runners}
    for _ in range(rounds):
        for policy, runner in runners.items():
            taken[policy].append(runner.turn(seconds))
    return taken


@contextmanager
def running(load: str) -> Iterator[list[subprocess.Popen]]:
    """The programs of a load, which end with the block."""
    if load == "training":
        with Runner("train-cpu", "auto") as runner:
            runner.wait()
            runner.say(3600)
            yield [runner.process]
        return
    code, count = (IN_TURNS, 1) if load == "comes" else (PYTHON, {"idle": 0, "one": 1, "two": 2}[load])
    others = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(count)]
    try:
        time.sleep(0.3)  # they start
        yield others
    finally:
        for other in others:
            other.kill()
            other.wait()


class Runner:
    """A process that does a workload under a policy, when it is told to."""

    def __init__(self, workload: str, policy: str):
        ours = ("OMP_", "GOMP_", "KMP_", "MKL_")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        command = [sys.executable, __file__, "--child", workload, policy]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env=environment | POLICIES[policy][0], **pipes)

    def __enter__(self) -> "Runner":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def wait(self) -> None:
        """Until it is ready for its first turn."""
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n", "a workload failed"

    def say(self, seconds: float) -> None:
        """Let it begin a turn of so many seconds."""
        assert self.process.stdin is not None
        print(seconds, file=self.process.stdin, flush=True)

    def turn(self, seconds: float) -> Turn:
        assert self.process.stdout is not None
        self.say(seconds)
        return Turn(*map(float, self.process.stdout.readline().split()))


def serve(workload: str, policy: str) -> None:
    """The process of a `Runner`: a line with seconds comes in, one with the speed and the share of sleep goes out."""
    from fastgpt.system import contention, threads

    count = threads.use(POLICIES[policy][1])
    unit = WORKLOADS[workload]()
    for _ in range(2):
        unit()
    with contention.watching(count if policy == "auto" else 1) as watcher:
        print("ready", flush=True)
        for line in sys.stdin:
            done_by(time.perf_counter() + LEAD, unit)
            began, slept = time.perf_counter(), watcher.slept if watcher else 0.0
            done = done_by(began + float(line), unit)
            spent = time.perf_counter() - began
            slept = (watcher.slept if watcher else 0.0) - slept
            print(done / spent, slept / spent, flush=True)


def done_by(end: float, unit: Callable[[], int]) -> int:
    """Tokens of the calls that begin before the end; the last one may last longer."""
    done = unit()
    while time.perf_counter() < end:
        done += unit()
    return done


def make_training(preset: str, **settings: int) -> Callable[[], int]:
    """A training step; returns its tokens."""
    import torch

    from bench.bench_train import calls, configured, engine_step, make_loader
    from fastgpt.system.device import resolve_dtype

    device = torch.device("cpu")
    config = dataclasses.replace(configured(preset, dropout=0.0), **settings)
    step = engine_step(config, device, resolve_dtype("auto", device))
    call = calls(step, make_loader(config, device), config.batch_size)

    def take() -> int:
        call()
        step.guard.read()
        return config.tokens_per_step

    return take


def make_generation() -> Callable[[], int]:
    """A greedy continuation of the baby shape with random weights, on the dense cache; returns its tokens."""
    import torch

    from fastgpt.config.training import PRESETS
    from fastgpt.generation.generator import TextGenerator
    from fastgpt.model.gpt import GPT
    from fastgpt.ops.table import resolve
    from fastgpt.tokenizer.byte import ByteTokenizer

    tokenizer = ByteTokenizer()
    config = dataclasses.replace(PRESETS["baby"], vocab_size=tokenizer.vocab_size).architecture()
    torch.manual_seed(0)
    model = GPT(config, resolve("auto", torch.device("cpu"))).eval()
    generator = TextGenerator(model, tokenizer)

    def write() -> int:
        generator.generate("a", max_new_tokens=NEW_TOKENS, temperature=0.0)
        return NEW_TOKENS

    return write


WORKLOADS: dict[str, Callable[[], Callable[[], int]]] = {
    "train-cpu": lambda: make_training("cpu"),
    "train-baby": lambda: make_training("baby", batch_size=BABY_BATCH),
    "generate-baby": make_generation,
}


def machine() -> str:
    """Date, commit and machine, in a line."""
    import platform

    import cpuinfo
    import torch

    from bench.tools.machine import cpu_instructions

    ask = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(ask, cwd=command_line.ROOT, capture_output=True, text=True).stdout.strip()
    return (
        f"{time.strftime('%Y-%m-%d')}, commit {commit}: {cpuinfo.get_cpu_info()['brand_raw']}, {cpu_instructions()}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, Python {platform.python_version()}"
    )


def table(workload: str, columns: dict[str, dict[str, list[Turn]]], options: argparse.Namespace) -> str:
    """Medians of tokens/s with the least and the most, and auto against the best of each column."""
    batch = f", {BABY_BATCH} sequences a step" if workload == "train-baby" else ""
    lines = [f"\n{workload}{batch}: tokens/s, {options.rounds} turns of {options.seconds:g} s"]
    lines.append(f"{'':<24}" + "".join(f"{LOADS[load]:>20}" for load in columns))
    medians = {
        load: {policy: statistics.median(turn.speed for turn in turns) for policy, turns in column.items()}
        for load, column in columns.items()
    }
    for policy in POLICIES:
        cells = []
        for load, column in columns.items():
            speeds = sorted(turn.speed for turn in column[policy])
            cells.append(f"{medians[load][policy]:,.0f} ({speeds[0]:,.0f}-{speeds[-1]:,.0f})")
        lines.append(f"{policy:<24}" + "".join(f"{cell:>20}" for cell in cells))
    ratios, slept = [], []
    for load, column in columns.items():
        ratio = medians[load]["auto"] / max(medians[load].values())
        ratios.append(f"{ratio:.2f} {'met' if ratio >= AIM else 'missed'}")
        slept.append(f"{statistics.median(turn.slept for turn in column['auto']):.0%}")
    lines.append(f"{f'auto of the best (>= {AIM})':<24}" + "".join(f"{cell:>20}" for cell in ratios))
    lines.append(f"{'auto slept at barriers':<24}" + "".join(f"{cell:>20}" for cell in slept))
    return "\n".join(lines)


if __name__ == "__main__":
    from fastgpt import cli

    raise SystemExit(cli.run(main))
