"""Measures attention heads: how spread their weights are, how far they reach, and on which tokens they lie.

Three patterns are scored by the mean weight that queries give to one kind of key:
- previous: the token before.
- first: the first token, by the queries after it. Heads that have nothing to do rest there.
- induction: the tokens that followed earlier occurrences of the query's token. The score is the "prefix matching" of
  "In-context Learning and Induction Heads" (Olsson et al., 2022), measured there on repeated random tokens and here
  on the text itself, in which frequent tokens have many such keys.
Where documents are packed, each is a text of its own.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

# A head is labelled by a pattern to whose keys it gives at least this share of its weight, and at least so many times
# the share that they would have if all keys were equal: in a short text, or one of few letters, that alone is much.
LABELLED, TIMES_EQUAL = 0.25, 2.0
FEWEST = 4  # queries that have such a key; of fewer a score says little
LABELS = {"previous": "previous token", "first": "first token", "induction": "induction"}


@dataclass(frozen=True)
class Head:
    """The measurements of a head on a text.

    Attributes:
        entropy: of its weights in nats, the mean over queries: 0 where one key has all, log n where n keys share.
        distance: from query to key in tokens, by weight, the mean over queries.
        scores: of each pattern in `LABELS`, in 0 .. 1; None where no query has such a key.
        labels: the patterns that it follows, by the texts of `LABELS`, with their scores; the highest first.
    """

    entropy: float
    distance: float
    scores: Mapping[str, float | None]
    labels: tuple[tuple[str, float], ...]


class Patterns:
    """The keys that each query of a text looks at by each pattern.

    Attributes:
        keys: bool (T, T), by the names of `LABELS`.
        least: the score from which on a head follows the pattern; infinite where too few queries have such a key.
    """

    def __init__(self, tokens: torch.Tensor, documents: torch.Tensor | None = None):
        """tokens, documents: int64 (T,)."""
        T = len(tokens)
        documents = torch.zeros_like(tokens) if documents is None else documents
        together = documents[:, None] == documents
        query, key = torch.arange(T)[:, None], torch.arange(T)
        starts = torch.ones(T, dtype=torch.bool)
        starts[1:] = documents[1:] != documents[:-1]
        followed = torch.zeros(T, T, dtype=torch.bool)
        followed[:, 1:] = (tokens[:, None] == tokens[:-1]) & together[:, :-1]  # before the key is the query's token
        earlier = (key < query) & together
        self.keys = {
            "previous": (key == query - 1) & together,
            "first": starts & earlier,
            "induction": followed & earlier,
        }
        seen = ((key <= query) & together).float()
        equal = (seen / seen.sum(-1, keepdim=True))[None]  # a head whose weights are all the same
        self.least = {name: _least(equal, mask) for name, mask in self}

    def __iter__(self):
        return iter(self.keys.items())


def measure(weights: torch.Tensor, patterns: Patterns) -> list[Head]:
    """Measure the heads of a layer by their weights (H, T, T)."""
    entropy = torch.special.entr(weights).sum(-1).mean(-1).tolist()  # (H,)
    position = torch.arange(weights.shape[-1], device=weights.device)
    distance = (weights * (position[:, None] - position)).sum(-1).mean(-1).tolist()
    scores = {name: _scores(weights, mask.to(weights.device)) for name, mask in patterns}
    heads = []
    for head in range(len(weights)):
        own = {name: of_heads[head] for name, of_heads in scores.items()}
        heads.append(Head(entropy[head], distance[head], own, _labels(own, patterns.least)))
    return heads


def _least(equal: torch.Tensor, mask: torch.Tensor) -> float:
    """The score at which a head is labelled, if a head with equal weights (1, T, T) has its own."""
    (score,) = _scores(equal, mask)
    return math.inf if score is None or mask.any(-1).sum() < FEWEST else max(LABELLED, TIMES_EQUAL * score)


def _labels(scores: Mapping[str, float | None], least: Mapping[str, float]) -> tuple[tuple[str, float], ...]:
    found = [(LABELS[name], score) for name, score in scores.items() if score is not None and score >= least[name]]
    return tuple(sorted(found, key=lambda label: -label[1]))


def _scores(weights: torch.Tensor, mask: torch.Tensor) -> list[float] | list[None]:
    """The weight of each head (H, T, T) on the keys of a mask (T, T), the mean over queries that have any."""
    queries = mask.any(-1)
    if not queries.any():
        return [None] * len(weights)
    return (weights * mask).sum(-1)[:, queries].mean(-1).tolist()
