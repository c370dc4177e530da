"""The logit lens: what the model would predict if it ended after each block.

"interpreting GPT: the logit lens" (nostalgebraist, 2020): the residual stream after a block goes through the last norm
and the output layer as if it were the last. Logits are computed for some rows at a time: those of all layers in
GPT-2's vocabulary would take gigabytes.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from fastgpt.evaluation.token_scores import chunks
from fastgpt.model.gpt import GPT, add_norm

MOST_TOKENS = 10  # that are shown at each place


class Predictions(NamedTuple):
    """The likeliest next tokens, on the host, the likeliest first; of K = `MOST_TOKENS`, or of a smaller vocabulary.

    Attributes:
        ids: int32 (..., K).
        probabilities: float32 (..., K).
    """

    ids: torch.Tensor
    probabilities: torch.Tensor


class Outcome(NamedTuple):
    """Losses and ranks of the tokens after the first, each (T - 1,) on the host.

    Attributes:
        losses: float64, in nats.
        ranks: int64, from 1, the likeliest.
    """

    losses: torch.Tensor
    ranks: torch.Tensor


def row_names(layers: int) -> list[str]:
    """The names of the rows of `lens` for a model of so many layers."""
    return ["embedding", *(f"layer {layer}" for layer in range(layers - 1)), f"layer {layers - 1}: output"]


@torch.no_grad()
def lens(model: GPT, streams: torch.Tensor) -> Predictions:
    """The predictions of each stream (L + 1, T, C) at each position, (L + 1, T, K); the last row is the output."""
    hidden = add_norm(model.ops, streams, None, model.ln_f)[1].flatten(0, 1)
    vocab_size = model.config.known_vocab
    found = [
        model.logits(hidden[part]).softmax(-1).topk(min(MOST_TOKENS, vocab_size))
        for part in chunks(len(hidden), vocab_size)
    ]
    size = *streams.shape[:2], -1
    ids, probabilities = (torch.cat(parts).cpu().view(size) for parts in zip(*((i, p) for p, i in found), strict=True))
    return Predictions(ids.int(), probabilities.float())


@torch.no_grad()
def outcome(model: GPT, hidden: torch.Tensor, tokens: torch.Tensor) -> Outcome:
    """The losses and ranks of the tokens (T,) after the first, by the model's last states (T, C)."""
    losses, ranks = [torch.empty(0, dtype=torch.float64)], [torch.empty(0, dtype=torch.int64)]
    before, targets = hidden[:-1], tokens[1:].to(hidden.device)
    for part in chunks(len(targets), model.config.known_vocab):
        logits, wanted = model.logits(before[part]), targets[part]
        losses.append(F.cross_entropy(logits, wanted, reduction="none").cpu().double())
        ranks.append(1 + (logits > logits.gather(-1, wanted[:, None])).sum(-1).cpu())
    return Outcome(torch.cat(losses), torch.cat(ranks))
