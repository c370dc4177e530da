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
from fastgpt.training.orthogonalize import NEWTON_SCHULZ, Coefficients, orthogonalize

# By name: the factor of the rate for a matrix of so many rows and columns, as `adjust_lr_fn` of `torch.optim.Muon`.
# The first is Jordan's; the second gives an update the size of AdamW's (Liu et al., 2025, arXiv:2502.16982).
RATIOS: dict[str, Callable[[int, int], float]] = {
    "original": lambda rows, columns: math.sqrt(max(1, rows / columns)),
    "match_rms_adamw": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
}


class Piece(NamedTuple):
    """A matrix: some rows of a weight."""

    parameter: torch.nn.Parameter
    begin: int
    end: int

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """These rows of a tensor of the weight's shape, transposed if they are more than its columns."""
        rows = tensor[self.begin : self.end]
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
        matrix_group: the parameter group of the matrices. Its `share` is their rate in units of that of the others.
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
        coefficients: Sequence[Coefficients] = NEWTON_SCHULZ,
        ratio: str = "original",
        dtype: torch.dtype = torch.float32,
        compiled: bool = False,
    ):
        super().__init__(groups, adam_lr, betas)
        self.adam_groups = tuple(self.param_groups)
        self.coefficients, self.dtype = coefficients, dtype
        settings = {"lr": lr, "share": lr / adam_lr, "momentum": momentum, "weight_decay": weight_decay}
        self.add_param_group({"params": [*matrices], **settings})
        self.matrix_group = self.param_groups[-1]
        for parameter in matrices:
            self.state[parameter] = {"momentum": torch.zeros_like(parameter)}
        self.batches = [(pieces, ratios(pieces, ratio)) for pieces in batches(matrices)]
        self._update = torch.compile(self._eager_update, dynamic=False) if compiled else self._eager_update

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        super().step()
        parameters, group = self.matrix_group["params"], self.matrix_group
        device = parameters[0].device
        found = torch.zeros((), device=device) if self.found_inf is None else self.found_inf
        settings = (group[name] for name in ("momentum", "lr", "weight_decay"))
        self._update(found, *(torch.full((), value, device=device) for value in settings))

    def _eager_update(
        self, found: torch.Tensor, momentum: torch.Tensor, rate: torch.Tensor, decay: torch.Tensor
    ) -> None:
        """The step of the matrices. All arguments are scalars on the device, so that compiled code takes any value."""
        taken, skipped = 1 - found, found > 0
        rate = rate * taken
        for parameter in self.matrix_group["params"]:
            gradient, average = _gradient(parameter), self.state[parameter]["momentum"]
            gradient.masked_fill_(skipped, 0.0)  # what is not finite would stay so in a product with 0
            average.lerp_(gradient, (1 - momentum) * taken)
            gradient.lerp_(average, momentum)
            parameter.mul_(1 - rate * decay)
        for pieces, ratio in self.batches:
            x = torch.stack([piece.of(_gradient(piece.parameter)) for piece in pieces])
            update = orthogonalize(x.to(self.dtype), self.coefficients) * (ratio * rate)
            for piece, part in zip(pieces, update.unbind(), strict=True):
                piece.of(piece.parameter).sub_(part)


def _gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    assert parameter.grad is not None, "every parameter needs a gradient"
    return parameter.grad


def batches(matrices: Mapping[torch.nn.Parameter, Sequence[int]]) -> list[list[Piece]]:
    """All matrices by their sizes, whichever of the two is rows and which columns."""
    found: dict[tuple[int, int], list[Piece]] = {}
    for parameter, parts in matrices.items():
        begin = 0
        for rows in parts:
            columns = parameter.shape[1]
            sizes = min(rows, columns), max(rows, columns)
            found.setdefault(sizes, []).append(Piece(parameter, begin, begin + rows))
            begin += rows
    return [*found.values()]


def ratios(pieces: Sequence[Piece], name: str) -> torch.Tensor:
    """The factor of each matrix's rate, (N, 1, 1)."""
    parameter = pieces[0].parameter
    values = [RATIOS[name](piece.end - piece.begin, piece.parameter.shape[1]) for piece in pieces]
    return torch.tensor(values, device=parameter.device).view(-1, 1, 1)
