"""The loss of a model on text that it does not train on."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch

from fastgpt.config import TrainConfig
from fastgpt.loader import Counted, Loader
from fastgpt.model import GPT

WHOLE_SPLIT_LIMIT = 1_000_000  # tokens, where --eval_iters does not say
FIXED_BATCHES = 200
BATCH_TOKENS = 8192  # in a batch of the whole split, at least: there is no backward pass to hold memory for


def plan(config: TrainConfig, val_tokens: int) -> int:
    """How many fixed batches an evaluation takes, or 0 for the whole val split."""
    if config.eval_iters is not None:
        return config.eval_iters
    return 0 if val_tokens <= WHOLE_SPLIT_LIMIT else FIXED_BATCHES


def batches(loader: Loader, config: TrainConfig) -> Iterator[Counted]:
    """The batches of an evaluation, the same every time."""
    if count := plan(config, len(loader.tokens)):
        return loader.fixed(count, config.batch_size)
    return loader.whole(max(config.batch_size, BATCH_TOKENS // config.block_size))


@torch.no_grad()
def mean_loss(
    model: GPT,
    batches: Iterator[Counted],
    arithmetic: AbstractContextManager,
    stopping: Callable[[], bool] = lambda: False,
) -> float | None:
    """The mean loss in nats over all targets that count, or None where `stopping` cut it short."""
    total, count = 0.0, 0
    model.eval()
    with arithmetic:
        for x, y, counted in batches:
            if stopping():
                break
            total += model(x, y).item() * counted
            count += counted
        else:
            model.train()
            return total / count
    model.train()
    return None
