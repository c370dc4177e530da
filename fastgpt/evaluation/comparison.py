"""Two models with one vocabulary on one text: their losses, and how their next-token distributions differ."""

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from fastgpt.data import packing
from fastgpt.data.loader import IGNORED
from fastgpt.data.prepared import Tokens
from fastgpt.errors import RunFailed
from fastgpt.evaluation.sliding_window import Windows
from fastgpt.evaluation.token_scores import chunks
from fastgpt.model.gpt import GPT
from fastgpt.system import out_of_memory
from fastgpt.system.bars import Advance

MOST_DIFFERENT = 20
SMALLER = 4  # times fewer tokens in a part than for losses alone: some ten tensors of their logits' size are held


class Guess(NamedTuple):
    """A model's likeliest next token, and its probability."""

    token: int
    probability: float


class Difference(NamedTuple):
    """A predicted token, at `position` of the text (from 0), by the KL of the two distributions there."""

    kl: float
    position: int
    token: int
    a: Guess
    b: Guess


@dataclass(frozen=True)
class Comparison:
    """Two models, A and B, on the same tokens.

    Attributes:
        nats_a, nats_b: sums of the losses over all predicted tokens.
        kl_ab, kl_ba: means of KL(A || B) and KL(B || A), in nats a token.
        equal_argmax: the share of predicted tokens for which both have the same likeliest token.
        differences: the tokens with the largest KL(A || B), from the largest down.
    """

    nats_a: float
    nats_b: float
    kl_ab: float
    kl_ba: float
    equal_argmax: float
    differences: Sequence[Difference]
    tokens: int
    seconds: float
    block_size: int
    stride: int


class _Part(NamedTuple):
    """Sums over some consecutive tokens, and those with the largest KL among them, at their positions in the part."""

    tokens: int
    sums: torch.Tensor  # float64 (5,): the losses of A and of B, both KLs, and the tokens with an equal argmax
    differences: list[Difference]


@torch.no_grad()
def compare(
    a: GPT,
    b: GPT,
    tokens: Tokens,
    *,
    stride: int | None = None,
    batch_size: int | None = None,
    end_token: int | None = None,
    advance: Advance = lambda done: None,
) -> Comparison:
    """Compare two models whose vocabularies are equal, on tokens (N,), N at least 2.

    Windows have the smaller block_size of the two. The logits of both are computed for some tokens at a time.

    Raises:
        UsageError: a stride above that block_size.
        RunFailed: a loss is not a number.
    """
    size = min(a.config.block_size, b.config.block_size)
    windows = Windows(tokens, size, stride or size)
    a.eval()
    b.eval()
    began, done = time.perf_counter(), 0
    sums, worst = torch.zeros(5, dtype=torch.float64), []

    def compute(x: torch.Tensor, y: torch.Tensor) -> list[_Part]:
        counted, doc_ids = y != IGNORED, packing.document_ids(x, end_token)
        hidden_a, hidden_b, targets = a.hidden(x, doc_ids)[counted], b.hidden(x, doc_ids)[counted], y[counted]
        return [
            _part(a.logits(hidden_a[rows]), b.logits(hidden_b[rows]), targets[rows])
            for rows in chunks(len(targets), SMALLER * a.config.known_vocab)
        ]

    for x, y in windows.batches(batch_size, a.device):
        for part in itertools.chain.from_iterable(out_of_memory.in_halves(compute, x, y)):
            # Tokens are predicted in their order, each once, and the first one of the text is not.
            found = [one._replace(position=1 + done + one.position) for one in part.differences]
            worst = sorted([*worst, *found], key=lambda one: (-one.kl, one.position))[:MOST_DIFFERENT]
            sums += part.sums
            done += part.tokens
            advance(part.tokens)
    if not sums.isfinite().all():
        raise RunFailed("the models' losses are not finite numbers; try `dtype` float32")
    nats_a, nats_b, kl_ab, kl_ba, equal = sums.tolist()
    means = (kl_ab / done, kl_ba / done, equal / done)
    return Comparison(nats_a, nats_b, *means, worst, done, time.perf_counter() - began, size, windows.stride)


def _part(logits_a: torch.Tensor, logits_b: torch.Tensor, targets: torch.Tensor) -> _Part:
    """Compare two models by their logits (n, V) of targets (n,)."""
    wide = torch.float32 if logits_a.device.type == "mps" else torch.float64  # or a KL near zero would be noise
    log_a, log_b = (logits.to(wide).log_softmax(-1) for logits in (logits_a, logits_b))
    p_a, p_b, difference = log_a.exp(), log_b.exp(), log_a - log_b
    kl_ab, kl_ba = (p_a * difference).sum(-1), -(p_b * difference).sum(-1)  # (n,)
    (top_a, guess_a), (top_b, guess_b) = p_a.max(-1), p_b.max(-1)
    losses = [-log.gather(-1, targets[:, None])[:, 0] for log in (log_a, log_b)]
    columns = (*losses, kl_ab, kl_ba, (guess_a == guess_b).to(wide))
    sums = torch.stack([column.sum() for column in columns]).cpu().double()
    largest, rows = kl_ab.topk(min(MOST_DIFFERENT, len(targets)))
    found = zip(
        largest.tolist(),
        rows.tolist(),
        targets[rows].tolist(),
        map(Guess, guess_a[rows].tolist(), top_a[rows].tolist()),
        map(Guess, guess_b[rows].tolist(), top_b[rows].tolist()),
        strict=True,
    )
    return _Part(len(targets), sums, [Difference(*one) for one in found])
