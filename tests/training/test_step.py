"""An optimizer step in 16 bits, compiled or not, goes where a plain GPT in float32 goes."""

import numpy as np
import pytest
import torch

from fastgpt.config.training import TrainConfig
from fastgpt.data.loader import Loader
from fastgpt.model.gpt import GPT
from fastgpt.training.step import TrainStep
from peers import PlainGPT, plain_optimizer, plain_step

CPU = torch.device("cpu")
STEPS = 30


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_loss_at_equal_steps_is_that_of_a_plain_gpt_in_float32(compiled: bool):
    config = TrainConfig(
        **{"vocab_size": 20, "block_size": 16, "n_layer": 1, "n_head": 2, "n_embd": 32},
        **{"batch_size": 8, "gradient_accumulation_steps": 1, "compile": compiled},
        **{"learning_rate": 1e-2, "schedule": "constant", "warmup_iters": 0},
    )
    random = np.random.default_rng(0)
    tokens = np.where(random.random(2000) < 0.95, np.arange(2000) % 20, random.integers(20, size=2000))
    loader = Loader(tokens, 16, 20, seed=1, device=CPU, name="the text")
    batches = [loader.batch(number, 0, 1, 8) for number in range(STEPS)]
    torch.manual_seed(0)
    step = TrainStep(GPT(config), config, CPU, torch.bfloat16)
    plain = PlainGPT(20, 16, 1, 2, 32)
    plain.load(step.model.weights())
    peer = plain_step(plain, plain, plain_optimizer(plain, 1e-2, (config.beta1, config.beta2)), batches)
    losses = [step(number, [batch])[0].item() for number, batch in enumerate(batches)]
    plain_losses = [peer().item() for _ in batches]
    assert losses[0] == pytest.approx(plain_losses[0], abs=5e-3)
    assert plain_losses[-1] < plain_losses[0] - 0.5
    assert sum(losses[-10:]) / 10 == pytest.approx(sum(plain_losses[-10:]) / 10, abs=0.02)


def test_weights_of_another_gpt_are_refused_by_the_plain_one():
    plain = PlainGPT(20, 16, 2, 2, 32)
    weights = GPT(TrainConfig(vocab_size=20, block_size=16, n_layer=1, n_head=2, n_embd=32)).weights()
    with pytest.raises(ValueError, match=r"no weights for blocks\.1"):
        plain.load(weights)
