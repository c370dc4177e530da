"""The estimate of a generation's memory is near what the engine holds while it fills the contexts."""

import dataclasses

import pytest
import torch

from fastgpt.config.training import PRESETS
from fastgpt.generation import footprint
from fastgpt.model.facts import count_parameters
from fastgpt.model.footprint import Layers, total
from fastgpt.ops import table

CPU = torch.device("cpu")


@pytest.mark.parametrize("max_batch", [1, 6])
@pytest.mark.parametrize("kernels", ["reference", "torch"])
@pytest.mark.parametrize("preset", ["mini", "cpu", pytest.param("baby", marks=pytest.mark.slow)])
def test_is_what_the_engine_holds(preset: str, kernels: str, max_batch: int):
    config, ops = dataclasses.replace(PRESETS[preset], vocab_size=96), table.resolve(kernels, CPU)
    found = footprint.estimate(config, ops, CPU, torch.float32, max_batch)
    assert found.peak == pytest.approx(footprint.measure(config, ops, CPU, torch.float32, max_batch), rel=0.1)


def test_kinds_by_hand():
    config = dataclasses.replace(PRESETS["mini"], vocab_size=128, n_layer=9, position="rotary", n_kv_head=2)
    B, T, D = 40, config.block_size, config.head_dim
    found = footprint.estimate(config, table.resolve("torch", CPU), CPU, torch.bfloat16, B)
    for phase in footprint.PHASES:
        held = found.peaks[phase]
        assert held["weights"].total == 2 * count_parameters(config) + 4 * T * D  # positions stay float32
        assert held["cache"] == Layers(blocks=((9, 2 * 2 * B * T * 2 * D),))
        assert total(held) == found.bytes[phase]
    assert found.phase == "prefill"
