"""What float32 scores and logits cost a training step in bfloat16 on a CPU, against the same step with 16-bit ones.

Only a CPU that multiplies bfloat16 in hardware can show a cost: on others float32 is many times faster.
"""

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from bench_train import calls, configured, engine_step, make_loader
from fastgpt.ops import table
from fastgpt.system.device import cpu_has_bfloat16
from fastgpt_kernels import reference, stock

IN_16_BITS = "in 16 bits"
AIM = 0.95  # at most 5% of the step

# preset, sequences, rounds, steps in a round
STEPS = [("cpu", 12, 4, 2), ("baby", 2, 2, 1)]


def attention_in_16_bits(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **_arguments) -> torch.Tensor:
    """Products whose scores are rounded to the inputs' dtype before the softmax."""
    (B, T, H, D), device = q.shape, q.device
    q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (q, k, v))
    bias = torch.zeros(T, T, dtype=q.dtype).masked_fill(~reference.visible(T, T, None, device), -math.inf)
    weights = torch.baddbmm(bias, q, k.mT, alpha=D**-0.5).softmax(-1)
    return torch.bmm(weights, v).unflatten(0, (B, H)).transpose(1, 2)


def loss_in_16_bits(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, *, valid_vocab: int) -> torch.Tensor:
    """The mean loss of logits that are rounded to 16 bits."""
    logits = F.linear(x, weight[:valid_vocab])
    return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten())


VARIANTS = {"scores": {"causal_attention": attention_in_16_bits}, "logits": {"linear_cross_entropy": loss_in_16_bits}}


@pytest.mark.parametrize("what", VARIANTS)
@pytest.mark.parametrize(("preset", "sequences", "rounds", "in_a_row"), STEPS)
def test_step(against, device: torch.device, preset: str, sequences: int, rounds: int, in_a_row: int, what: str):
    if device.type != "cpu":
        pytest.skip("on a GPU products into float32 are cuBLAS's own")
    config = configured(preset, batch_size=sequences, dtype="bfloat16", dropout=0.0)
    ops = table.resolve("torch")

    def step(ops: table.Ops) -> Callable[[], torch.Tensor]:
        made = engine_step(config, device, torch.bfloat16, ops)
        return calls(made, make_loader(config, device), config.batch_size)

    against(
        step(ops),
        {IN_16_BITS: step(dataclasses.replace(ops, **VARIANTS[what]))},
        rounds=rounds,
        in_a_row=in_a_row,
        units=config.tokens_per_step,
        aim=AIM,
        bfloat16_in_hardware=cpu_has_bfloat16(),
    )


@pytest.mark.parametrize("rows", [1, 64])
def test_output_layer_of_gpt2(against, device: torch.device, rows: int):
    """What is generated or evaluated: logits alone, without a gradient."""
    if device.type != "cpu":
        pytest.skip("on a GPU products into float32 are cuBLAS's own")
    x, weight = torch.randn(rows, 768).bfloat16(), torch.randn(50304, 768).bfloat16()

    @torch.inference_mode()
    def wide() -> None:
        stock.float32_product(x, weight)

    @torch.inference_mode()
    def narrow() -> None:
        F.linear(x, weight)

    against(wide, {IN_16_BITS: narrow}, rounds=5, units=rows, unit="rows")
