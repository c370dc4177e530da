"""A training step against the plain eager float32 GPT, at the same shape and batch: pytest bench/ --benchmark-only."""

import dataclasses
from collections.abc import Callable

import pytest
import torch

from fastgpt.config import PRESETS, TrainConfig
from fastgpt.device import autocast
from fastgpt.model import GPT
from fastgpt.optim import make_optimizer
from peers import PlainGPT, plain_optimizer

VOCABULARY = 65  # tiny Shakespeare's characters
VARIANTS = {
    "eager float32": (torch.float32, False),
    "eager bfloat16": (torch.bfloat16, False),
    "compiled bfloat16": (torch.bfloat16, True),
}
# preset, dropout, variant, ratio aimed at
CASES = [
    ("cpu", 0.0, "eager float32", 1.0),
    ("cpu", 0.0, "eager bfloat16", None),
    ("cpu", 0.0, "compiled bfloat16", 2.0),
    ("baby", 0.0, "eager float32", 1.0),
    ("baby", 0.0, "eager bfloat16", 2.2),
    ("baby", 0.0, "compiled bfloat16", 2.6),
    ("baby", 0.2, "eager bfloat16", 2.2),
    ("baby", 0.2, "compiled bfloat16", 2.6),
]
ROUNDS = {"cpu": 100, "baby": 3}


@pytest.mark.parametrize(("preset", "dropout", "variant", "aim"), CASES)
def test_training_step(against, preset: str, dropout: float, variant: str, aim: float | None):
    config = dataclasses.replace(PRESETS[preset], vocab_size=VOCABULARY, dropout=dropout)
    dtype, compiled = VARIANTS[variant]
    against(
        engine_step(config, dtype, compiled),
        plain_step(config),
        rounds=ROUNDS[preset],
        units=config.batch_size * config.block_size,
        peer_name="plain eager float32",
        aim=aim or "none",
        batch=config.batch_size,
        dropout=dropout,
    )


def engine_step(config: TrainConfig, dtype: torch.dtype, compiled: bool) -> Callable[[], float]:
    """The engine's model, optimizer and arithmetic, as `fastgpt.train` puts them together."""
    torch.manual_seed(0)
    model = GPT(config)
    optimizer = make_optimizer(model, config)
    forward = torch.compile(model, options={"fallback_random": True}) if compiled else model
    x, y = random_batch(config)

    def step() -> float:
        with autocast(torch.device("cpu"), dtype):
            loss = forward(x, y)
            loss.backward()
        return finish(model, optimizer, loss)

    return step


def plain_step(config: TrainConfig) -> Callable[[], float]:
    torch.manual_seed(0)
    model = PlainGPT(VOCABULARY, config.block_size, config.n_layer, config.n_head, config.n_embd, config.dropout)
    optimizer = plain_optimizer(model, config.learning_rate, (config.beta1, config.beta2))
    x, y = random_batch(config)

    def step() -> float:
        loss = model(x, y)
        loss.backward()
        return finish(model, optimizer, loss)

    return step


def random_batch(config: TrainConfig) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (config.batch_size, config.block_size)
    return torch.randint(VOCABULARY, shape), torch.randint(VOCABULARY, shape)


def finish(model: torch.nn.Module, optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> float:
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()
