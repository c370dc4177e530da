"""Shared by the tests of packed runs: the plain way, one document at a time."""

import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from fastgpt.model.gpt import GPT


def documents(window: list[int], end_token: int) -> Iterator[slice]:
    """The parts of a window: one up to the first end of a document, and one from each end to the next."""
    starts = [0, *(i for i, token in enumerate(window) if token == end_token and i > 0), len(window)]
    for start, stop in itertools.pairwise(starts):
        yield slice(start, stop)


def logits_alone(model: GPT, tokens: torch.Tensor, end_token: int) -> torch.Tensor:
    """The logits (B, T, V) of windows (B, T), each document of which the model sees as a batch of its own."""
    rows = [torch.cat([model(row[part][None])[0] for part in documents(row.tolist(), end_token)]) for row in tokens]
    return torch.stack(rows)


def loss_alone(model: GPT, tokens: torch.Tensor, targets: torch.Tensor, end_token: int) -> torch.Tensor:
    """The mean loss over all targets that are not -100, from `logits_alone`."""
    return F.cross_entropy(logits_alone(model, tokens, end_token).flatten(0, 1), targets.flatten())
