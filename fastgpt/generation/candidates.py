"""The candidates of each drawn token: probable tokens, before and after the settings of sampling.

`Candidates` computes nothing of its own: the likeliest tokens, and the weights from which a token was drawn, come from
the sampler.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

COUNT = 5  # likeliest tokens beside a drawn one


class Candidate(NamedTuple):
    """A token that could be drawn.

    Attributes:
        before: its probability under the model.
        after: the probability with which it is drawn, after penalties, temperature and filters.
    """

    token: int
    before: float
    after: float


@dataclass(frozen=True)
class Candidates:
    """Those of R draws, on the device: K likeliest tokens, and the drawn one as the last column."""

    ids: torch.Tensor  # int64 (R, K + 1)
    before: torch.Tensor  # float32 (R, K + 1)
    after: torch.Tensor  # float32 (R, K + 1)
    wanted: tuple[bool, ...]  # by the request of each row

    @classmethod
    def of(
        cls,
        tokens: torch.Tensor,
        likeliest: torch.Tensor,
        logits: torch.Tensor,
        weights: torch.Tensor | None,
        greedy: torch.Tensor,
        wanted: tuple[bool, ...],
    ) -> "Candidates":
        """
        Args:
            tokens: int64 (R,), those that were drawn.
            likeliest: int64 (R, K).
            logits: (R, V).
            weights: (R, V), from which the rows that are not greedy drew, not normalised; None where all are greedy.
            greedy: bool (R,).
        """
        ids = torch.cat([likeliest, tokens[:, None]], 1)
        after = (ids == tokens[:, None]).float()  # a greedy draw leaves nothing to chance
        if weights is not None:
            shares = weights.gather(1, ids) / weights.sum(-1, keepdim=True)
            after = after.where(greedy[:, None], shares)
        return cls(ids, logits.float().softmax(-1).gather(1, ids), after, wanted)

    def to_host(self) -> list[list[Candidate] | None]:
        """For each row the likeliest tokens in that order, then the drawn one where it is not among them."""
        columns = (self.ids.tolist(), self.before.tolist(), self.after.tolist())
        rows = [list(map(Candidate, *row)) for row in zip(*columns, strict=True)]
        return [_distinct(row) if wanted else None for row, wanted in zip(rows, self.wanted, strict=True)]


def _distinct(row: list[Candidate]) -> list[Candidate]:
    *likeliest, drawn = row
    return likeliest if drawn in likeliest else row
