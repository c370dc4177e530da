"""The model's judgement of single tokens, from hidden states and without all logits at once.

The logits of a batch in GPT-2's vocabulary would take gigabytes, so they are computed for some rows at a time. They
come from `GPT.logits`, and so from any output layer, int8 ones included.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

from fastgpt.model.gpt import GPT

LOGITS = 1 << 24  # numbers that are held at once: 64 MiB in float32


class TokenScores(NamedTuple):
    """Of n tokens, on the host.

    Attributes:
        losses: float64 (n,), the negative log-probabilities in nats.
        greedy: bool (n,), true where the token is the likeliest one.
    """

    losses: torch.Tensor
    greedy: torch.Tensor


def chunks(rows: int, vocab_size: int) -> Iterator[slice]:
    """Consecutive slices of so many rows, the logits of each of which are at most `LOGITS` numbers."""
    step = max(1, LOGITS // vocab_size)
    return (slice(first, min(first + step, rows)) for first in range(0, rows, step))


def token_losses(model: GPT, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The losses of targets, int64 (n,), n at least 1, by the hidden states (n, C) before them; as in `TokenScores`."""
    parts = [F.cross_entropy(*part, reduction="none") for part in _logits(model, hidden, targets)]
    return torch.cat(parts).cpu().double()


def token_scores(model: GPT, hidden: torch.Tensor, targets: torch.Tensor) -> TokenScores:
    """The scores of targets, int64 (n,), n at least 1, by the hidden states (n, C) before them."""
    losses, greedy = [], []
    for logits, wanted in _logits(model, hidden, targets):
        losses.append(F.cross_entropy(logits, wanted, reduction="none"))
        greedy.append(logits.argmax(-1) == wanted)
    return TokenScores(torch.cat(losses).cpu().double(), torch.cat(greedy).cpu())


def _logits(model: GPT, hidden: torch.Tensor, targets: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The logits of some rows at a time, with their targets."""
    for part in chunks(len(targets), model.config.known_vocab):
        yield model.logits(hidden[part]), targets[part]
