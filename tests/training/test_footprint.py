"""The estimate of a step's memory is what is counted in a real step, by kind, by layer and by phase."""

import dataclasses

import pytest
import torch

from fastgpt.config.training import OPTIMIZERS, PRESETS, TrainConfig
from fastgpt.model.footprint import Layers, total
from fastgpt.model.gpt import GPT
from fastgpt.ops import table
from fastgpt.system.live_bytes import LiveBytes
from fastgpt.training import footprint
from fastgpt.training.measurement import random_batch
from fastgpt.training.step import TrainStep

CPU = torch.device("cpu")
VOCABULARY = 96
SMALL = TrainConfig(
    vocab_size=131, n_layer=3, n_head=2, n_embd=16, block_size=8, batch_size=5, gradient_accumulation_steps=1
)


def estimate(
    config: TrainConfig, kernels: str = "torch", dtype: torch.dtype = torch.float32
) -> footprint.StepFootprint:
    return footprint.estimate(config, table.resolve(kernels, CPU), CPU, dtype)


def peak_of_second_step(config: TrainConfig, kernels: str, dtype: torch.dtype) -> int:
    """Counted from outside, without the hooks and the labels of the estimate."""
    model = GPT(config, table.resolve(kernels, CPU))
    step = TrainStep(model, config, CPU, dtype, end_token=0 if config.pack else None)
    batches = [random_batch(config, config.batch_size, CPU) for _ in range(config.gradient_accumulation_steps)]
    step(0, batches)
    with LiveBytes(CPU) as memory:
        memory.hold((*model.parameters(), *model.buffers(), *(t for batch in batches for t in batch)))
        memory.hold(value for state in step.optimizer.state.values() for value in state.values())
        step(1, batches)
    return memory.peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernels", ["reference", "torch"])
@pytest.mark.parametrize("preset", ["mini", "cpu", pytest.param("baby", marks=pytest.mark.slow)])
def test_is_what_a_real_step_holds(preset: str, kernels: str, dtype: torch.dtype):
    config = dataclasses.replace(PRESETS[preset], vocab_size=VOCABULARY)
    assert estimate(config, kernels, dtype).peak == pytest.approx(peak_of_second_step(config, kernels, dtype), rel=1e-3)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dropout": 0.2, "gradient_accumulation_steps": 2, "n_layer": 1},
        {"pack": True, "position": "rotary", "n_kv_head": 1, "bias": False},
        {"position": "sinusoidal", "mlp": "relu", "grad_clip": 0.0, "skip_loss_sigma": 5.0, "n_layer": 2},
        {
            "norm": "rmsnorm",
            "mlp": "swiglu",
            "qk_norm": True,
            "tie": False,
            "position": "rotary",
            "logit_softcap": 15.0,
        },
        {"norm": "rmsnorm", "norm_gain": False, "mlp": "relu2", "n_kv_head": 2, "head_size": 6, "bias": False},
        {"batch_size": 1, "n_embd": 64, "n_layer": 6},
        {"batch_size": 1, "n_embd": 64, "n_layer": 7, "log_stats": True, "log_interval": 2},
        {"optimizer": "muon"},
        {
            "optimizer": "muon",
            "batch_size": 1,
            "n_embd": 64,
            "n_layer": 7,
            "n_kv_head": 1,
            "log_stats": True,
            "log_interval": 2,
        },
    ],
    ids=str,
)
def test_is_what_a_real_step_holds_with_other_settings(changes: dict):
    config = dataclasses.replace(SMALL, **changes)
    # A small model has few bytes beside the scalars of the update.
    assert estimate(config).peak == pytest.approx(peak_of_second_step(config, "torch", torch.float32), rel=0.02)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"batch_size": 1, "n_embd": 64, "gradient_accumulation_steps": 3},
        {"batch_size": 1, "n_embd": 64, "optimizer": "muon"},
    ],
    ids=["activations", "weights", "muon"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_of_many_layers_is_counted_with_few(changes: dict, dtype: torch.dtype):
    """Each kind and layer at each phase's peak, as in a real step of all layers; but for scalars of the update."""
    config = dataclasses.replace(SMALL, n_layer=9, dropout=0.1, **changes)
    found, real = estimate(config, dtype=dtype), footprint.measure(config, table.resolve("torch", CPU), CPU, dtype)
    assert found.phase == real.phase
    assert found.kept.keys() == real.kept.keys()
    for phase in ("forward", "backward"):
        assert found.peaks[phase] == real.peaks[phase]
        assert found.bytes[phase] == real.bytes[phase]
    assert found.bytes["update"] == pytest.approx(real.bytes["update"], abs=512 * config.n_layer)


def test_kinds_by_hand():
    config = dataclasses.replace(SMALL, n_layer=6, bias=False)
    found, C = estimate(config), config.n_embd
    block = 4 * (12 * C * C + 2 * C)
    table_bytes = 4 * C * (256 + 8)  # the vocabulary is padded to 256
    weights = found.peaks["update"]["weights"]
    assert weights == Layers(table_bytes, ((6, block),), 4 * C)
    assert found.whole["gradients"] == weights.total
    assert found.peaks["update"]["moments"].total == 2 * weights.total + 4 * (2 + 6 * 6 + 1)  # a counter for each
    assert found.kept["logits"].head > 5 * 8 * 131 * 4
    assert found.kept["tokens"].head == pytest.approx(2 * 5 * 8 * 8, abs=16)
    for phase in footprint.PHASES:
        assert total(found.peaks[phase]) == found.bytes[phase]
    assert "gradients" not in found.peaks["forward"]


def test_muon_keeps_one_number_for_each_weight_of_a_matrix():
    config = dataclasses.replace(SMALL, n_layer=6, bias=False)
    adamw, muon = (estimate(dataclasses.replace(config, optimizer=name)).whole for name in ("adamw", "muon"))
    matrices = 6 * 12 * config.n_embd**2
    assert adamw["moments"] - muon["moments"] == 4 * (matrices + 6 * 4)  # and no counters
    assert adamw["weights"] == muon["weights"]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_model_of_a_billion_layers_is_estimated_too(optimizer: str):
    config = dataclasses.replace(SMALL, optimizer=optimizer)
    one, two = (estimate(dataclasses.replace(config, n_layer=count)).peak for count in (10**9, 2 * 10**9))
    assert two == pytest.approx(2 * one, rel=1e-4)
