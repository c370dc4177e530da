"""On a GPU: whether `--kernels auto` chooses well, operation by operation, and how long choosing takes."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bench.tools.timing import Clock
from fastgpt.config.training import PRESETS
from fastgpt.model import workloads
from fastgpt.ops.autotune import Chosen, choose, repeats_for
from fastgpt.ops.gpu_clock import GpuClock
from fastgpt.ops.table import TABLE, implementation
from fastgpt.ops.timed_choices import CANDIDATES
from fastgpt.ops.workload import Workload, timed_case

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU; elsewhere auto takes torch")

AIM = 1 / 1.03  # within 3% of the best backend
AIM_SECONDS = 5
ROUNDS = 15

# preset, and what is changed of it
TRAINING = {
    "cpu": {"vocab_size": 65},
    "baby": {"vocab_size": 65},
    "gpt2": {},
    "gpt2-compiled": {"compile": True},
    "gpt2-dropout": {"dropout": 0.1},
    "gpt2-T4096": {"block_size": 4096, "batch_size": 4},
    "gpt2-T16384": {"block_size": 16384, "batch_size": 1},
    "gpt2-D128": {"n_head": 6},
    "gpt2-medium": {},
    "gpt2-large": {},
    "gpt2-xl": {},
}
BATCHES, CONTEXTS = (1, 8, 64), (128, 1024, 32768)


def training(name: str) -> Workload:
    preset = name if name in PRESETS else "gpt2"
    return workloads.training(dataclasses.replace(PRESETS[preset], **TRAINING[name]), torch.bfloat16)


def generating(B: int, context: int, *, int8: bool = False) -> Workload:
    config = dataclasses.replace(PRESETS["gpt2"], block_size=context)
    return workloads.generation(config, torch.bfloat16, B, int8=int8)


WORKLOADS = {f"training-{name}": training(name) for name in TRAINING} | {
    f"generating-gpt2-B{B}-context{context}": generating(B, context) for B in BATCHES for context in CONTEXTS
}
INT8 = {f"generating-gpt2-int8-B{B}": generating(B, 1024, int8=True) for B in BATCHES}
CASES = [(name, op) for name in WORKLOADS for op in TABLE if op != "linear_int8"]
CASES += [(name, "linear_int8") for name in INT8]  # the other operations' are those of the same sizes
WORKLOADS |= INT8
# A process of its own has nothing compiled and nothing imported.
CHOOSING = """
import json, sys, time, torch
from bench.bench_auto import WORKLOADS
from fastgpt.model import workloads
from fastgpt.ops.autotune import choose
torch.cuda.init()
began = time.perf_counter()
chosen = choose(WORKLOADS[sys.argv[1]], torch.device("cuda"))
print(json.dumps({"seconds": time.perf_counter() - began, "reason": chosen.reason, "backends": chosen.backends}))
"""


@pytest.mark.parametrize("name", ["training-gpt2", "generating-gpt2-B1-context1024"])
@pytest.mark.parametrize("when", ["nothing compiled", "kernels compiled", "known"])
def test_choosing(clock: Clock, benchmark, tmp_path: Path, name: str, when: str):
    """From a start without any cache; after the kernels were compiled once; and after the choice was made once."""

    def start(choices: str) -> dict:
        caches = {"FASTGPT_CACHE": str(tmp_path / choices), "TRITON_CACHE_DIR": str(tmp_path / "triton")}
        paths = os.pathsep.join(path for path in sys.path if path)
        command = [sys.executable, "-c", CHOOSING, name]
        run = subprocess.run(command, env=os.environ | caches | {"PYTHONPATH": paths}, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        return json.loads(run.stdout)

    if when != "nothing compiled":
        start("first")

    def timed() -> None:
        found = start("first" if when == "known" else "second")
        clock.elapsed += found.pop("seconds")
        benchmark.extra_info |= found

    benchmark.pedantic(timed, rounds=1)
    benchmark.extra_info["aim_seconds"] = AIM_SECONDS


@pytest.fixture(scope="module")
def chosen(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Chosen]:
    """The choice of auto for a workload, timed in this run."""
    folder = tmp_path_factory.mktemp("choices")
    return lambda name: choose(WORKLOADS[name], torch.device("cuda"), folder=folder)


@pytest.mark.parametrize(("name", "op"), CASES)
def test_choice(against, benchmark, chosen: Callable[[str], Chosen], name: str, op: str):
    """The chosen backend against the others that run, in turns; what auto found is in `auto_seconds`."""
    workload = WORKLOADS[name]
    if op not in workload.ops:
        pytest.skip("not used")
    choice = chosen(name).choices[op]
    case = timed_case(op, workload, torch.device("cuda"))

    def call(backend: str) -> Callable[[], object]:
        function = implementation(op, backend)
        return functools.partial(case.call, case.compiled(function) if workload.compile else function)

    chosen_call = call(choice.backend)
    chosen_call()  # compiles
    others = [backend for backend in CANDIDATES if backend in choice.seconds and backend != choice.backend]
    benchmark.group = f"auto {op}"
    against(
        chosen_call,
        {backend: call(backend) for backend in others},
        rounds=ROUNDS,
        in_a_row=repeats_for(GpuClock().seconds(chosen_call)),
        units=1,
        unit="calls",
        launching=False,
        aim=AIM if others else None,
        backend=choice.backend,
        auto_seconds=dict(choice.seconds),
        left_out=dict(choice.left_out),
    )
    torch.cuda.empty_cache()
