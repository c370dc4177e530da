"""Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/): momentum, orthogonalized, on hidden matrices.

    M <- beta M + (1 - beta) G                        momentum
    W <- (1 - rate decay) W - rate ratio orthogonalize((1 - beta) G + beta M)

All other parameters (embeddings, an untied output layer, vectors) are AdamW's. The matrices that are packed in one
weight, as q, k and v, are orthogonalized apart. Matrices of one shape are one batch of products, tall ones transposed.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from fastgpt.training.adamw import AdamW
from fastgpt.training.orthogonalize import METHODS, Method, orthogonalize

# By name: the factor of the rate for a matrix of so many rows and columns, as `adjust_lr_fn` of `torch.optim.Muon`.
# The first is Jordan's; the second gives an update the size of AdamW's (Liu et al., 2025, arXiv:2502.16982).
RATIOS: dict[str, Callable[[int, int], float]] = {
    "original": lambda rows, columns: math.sqrt(max(1, rows / columns)),
    "match_rms_adamw": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
}


class Piece(NamedTuple):
    """A matrix: some rows of a weight.

    Attributes:
        weight: its place among the weights.
        ratio: the factor of its rate.
    """

    weight: int
    begin: int
    end: int
    ratio: float

    def of(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """These rows of the weight, or of a tensor of its shape; transposed if they are more than its columns."""
        rows = tensors[self.weight][self.begin : self.end]
        return rows.mT if rows.shape[0] > rows.shape[1] else rows


class Muon(AdamW):
    """Muon for `matrices`, and AdamW for the parameters in `groups`. Every parameter needs a gradient in every step.

    A step overwrites the gradients of the matrices.

    Args:
        matrices: the weights, each with the rows of the matrices that are packed in it.
        lr, weight_decay: of the matrices.
        groups, adam_lr, betas: of the other parameters, see `AdamW`.
        ratio: a name in RATIOS.
        dtype: of the products.
        compiled: whether the step is compiled.

    Attributes:
        matrix_group: the parameter group of the matrices; see `schedule.set_learning_rate` for its rate.
    """

    def __init__(
        self,
        matrices: Mapping[torch.nn.Parameter, Sequence[int]],
        lr: float,
        weight_decay: float = 0.0,
        *,
        groups: list[dict[str, Any]],
        adam_lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        momentum: float = 0.95,
        method: Method = METHODS["newton_schulz"],
        ratio: str = "original",
        dtype: torch.dtype = torch.float32,
        compiled: bool = False,
    ):
        super().__init__(groups, adam_lr, betas)
        self.adam_groups = tuple(self.param_groups)
        self.method, self.dtype = method, dtype
        settings = {"lr": lr, "peak": lr, "others": adam_lr, "momentum": momentum, "weight_decay": weight_decay}
        self.add_param_group({"params": [*matrices], **settings})
        self.matrix_group = self.param_groups[-1]
        for parameter in matrices:
            self.state[parameter] = {"momentum": torch.zeros_like(parameter)}
        self.batches = batches(matrices, RATIOS[ratio])
        self._update = torch.compile(self._eager_update, dynamic=False) if compiled else self._eager_update

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        super().step()
        group = self.matrix_group
        weights, device = group["params"], group["params"][0].device
        found = torch.zeros((), device=device) if self.found_inf is None else self.found_inf
        # Scalars on the device, so that compiled code takes any value; the gradients are other tensors in every step.
        settings = (torch.full((), group[name], device=device) for name in ("momentum", "lr", "weight_decay"))
        averages = [self.state[p]["momentum"] for p in weights]
        self._update(weights, [p.grad for p in weights], averages, found, *settings)

    def _eager_update(
        self,
        weights: Sequence[torch.Tensor],
        gradients: Sequence[torch.Tensor],
        averages: Sequence[torch.Tensor],
        found: torch.Tensor,
        momentum: torch.Tensor,
        rate: torch.Tensor,
        decay: torch.Tensor,
    ) -> None:
        taken, skipped = 1 - found, found > 0
        rate = rate.masked_fill(skipped, 0.0)  # also one that float32 cannot hold
        for gradient, average in zip(gradients, averages, strict=True):
            gradient.masked_fill_(skipped, 0.0)  # what is not finite would stay so in a product with 0
            average.lerp_(gradient, (1 - momentum) * taken)
            gradient.lerp_(average, momentum)
        for pieces in self.batches:
            x = torch.stack([piece.of(gradients) for piece in pieces])
            update = orthogonalize(x.to(self.dtype), self.method).to(x.dtype) * rate
            for piece, part in zip(pieces, update.unbind(), strict=True):
                piece.of(weights).mul_(1 - rate * decay).sub_(part, alpha=piece.ratio)


def batches(
    matrices: Mapping[torch.nn.Parameter, Sequence[int]], ratio: Callable[[int, int], float]
) -> list[list[Piece]]:
    """All matrices by their sizes, whichever of the two is rows and which columns."""
    found: dict[tuple[int, int], list[Piece]] = {}
    for number, (weight, parts) in enumerate(matrices.items()):
        columns, begin = weight.shape[1], 0
        for rows in parts:
            sizes = min(rows, columns), max(rows, columns)
            found.setdefault(sizes, []).append(Piece(number, begin, begin + rows, ratio(rows, columns)))
            begin += rows
    return [*found.values()]
