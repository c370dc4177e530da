"""A training step of `fastgpt.train` with Muon against the same step with AdamW, and the operations of an update.

Muon needs fewer steps for a loss; this is the price of each. Both take their steps in turns in one run.
"""

from collections.abc import Sequence

import pytest
import torch

from bench.bench_train import CPU_STEPS, GPU_ROUNDS, GPU_STEPS, ON_GPU, calls, configured, engine_step, make_loader
from fastgpt.model.gpt import GPT
from fastgpt.model.matrices import hidden_matrices
from fastgpt.system.device import matrix_dtype, resolve_dtype
from fastgpt.training.muon import RATIOS, batches
from fastgpt.training.orthogonalize import METHODS, orthogonalize, product_flops

ADAMW = "adamw"
CPU_ROUNDS = {"cpu": 8, "baby": 3}
AIMS = {("cpu", True): 1 / 1.5, ("baby", True): 1 / 1.12}  # of AdamW's speed, by preset and compilation


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("preset", ["cpu", "baby"])
def test_step(against, benchmark, device: torch.device, preset: str, compiled: bool, method: str):
    benchmark.group = f"a step with Muon, preset {preset}"
    arithmetic = resolve_dtype("auto", device)
    config = configured(preset, compile=compiled, optimizer="muon", muon_method=method)
    ours = engine_step(config, device, arithmetic)
    peer = engine_step(configured(preset, compile=compiled), device, arithmetic, ours.model.ops)
    against(
        calls(ours, make_loader(config, device), config.batch_size),
        {ADAMW: calls(peer, make_loader(config, device), config.batch_size)},
        rounds=(GPU_ROUNDS if ON_GPU else CPU_ROUNDS)[preset],
        in_a_row=(GPU_STEPS if ON_GPU else CPU_STEPS)[preset],
        units=config.tokens_per_step,
        aim=AIMS.get((preset, compiled)),
        products=str(matrix_dtype(device)).removeprefix("torch."),
        gflop=operations(sizes(ours.model), method, device) / 1e9,
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("preset", ["cpu", "baby"])
def test_products(against, benchmark, device: torch.device, preset: str, method: str):
    """The products of an update by themselves, against the same in bfloat16, matrix by matrix, as PyTorch's Muon."""
    benchmark.group = f"the products of Muon, preset {preset}"
    shapes = sizes(GPT(configured(preset)))
    inputs = [torch.randn(shape, device=device) for shape in shapes]
    dtype = matrix_dtype(device)

    def ours() -> None:
        for x in inputs:
            orthogonalize(x.to(dtype), METHODS[method])

    def one_by_one() -> None:
        for x in inputs:
            for matrix in x.bfloat16():
                orthogonalize(matrix[None], METHODS["newton_schulz"])

    flops = operations(shapes, method, device)
    against(
        ours,
        {"bfloat16, one by one": one_by_one},
        rounds=20 if ON_GPU or preset == "cpu" else 3,
        units=1,
        unit="updates",
        flops=flops,
        arithmetic=dtype,
        gflop=flops / 1e9,
    )


def sizes(model: GPT) -> list[tuple[int, int, int]]:
    """The batches of matrices (N, m, n)."""
    matrices = hidden_matrices(model)
    weights = [*matrices]
    found = []
    for pieces in batches(matrices, RATIOS["original"]):
        rows, columns = sorted((pieces[0].end - pieces[0].begin, weights[pieces[0].weight].shape[1]))
        found.append((len(pieces), rows, columns))
    return found


def operations(shapes: Sequence[tuple[int, int, int]], method: str, device: torch.device) -> int:
    """Those of the matrix products."""
    size = matrix_dtype(device).itemsize
    return sum(count * product_flops(m, n, METHODS[method], size) for count, m, n in shapes)
