"""The loss of a model on text that it does not train on."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch

from fastgpt.config import TrainConfig
from fastgpt.device import is_out_of_memory
from fastgpt.loader import IGNORED, Counted, Loader
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
    """The mean loss in nats over all targets that count, or None where `stopping`, asked at each batch, says so.

    A batch that does not fit into the memory is evaluated in halves.
    """
    total, count = 0.0, 0
    model.eval()
    with arithmetic:
        for x, y, counted in batches:
            if stopping():
                break
            total += _loss(model, x, y) * counted
            count += counted
        else:
            model.train()
            return total / count
    model.train()
    return None


def _loss(model: GPT, x: torch.Tensor, y: torch.Tensor) -> float:
    """The mean loss of a batch, (B, T) each, in nats over the targets that count."""
    try:
        return model(x, y).item()
    except (RuntimeError, MemoryError) as error:
        if len(x) == 1 or not is_out_of_memory(error):
            raise
    # Not in the except block, where the exception would keep what the batch took.
    middle = len(x) // 2
    halves = [(x[part], y[part]) for part in (slice(middle), slice(middle, None))]
    counts = [int((targets != IGNORED).sum()) for _, targets in halves]
    losses = [_loss(model, *half) if count else 0.0 for half, count in zip(halves, counts, strict=True)]
    return sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
