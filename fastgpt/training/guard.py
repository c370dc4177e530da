"""Keeps bad steps out of the weights. The checks run on the device without synchronizing.

A step whose loss or gradient is not finite changes neither the weights nor the statistics. With `skip_loss_sigma` the
same holds for a loss far above those before it. After several skipped steps in a row every further step is skipped,
until the training loop reads the verdicts (when it logs) and goes back to an earlier checkpoint.

Skipping the update where a statistic of the loss or the gradient is an outlier is done by OLMo (OLMo et al., 2024,
section 3.4) and by llm.c; going back and leaving out the data is what PaLM did (Chowdhery et al., 2022, section 5.1).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from fastgpt.system.units import counted

MEMORY = 0.02  # weight of a new loss in the running mean and variance, which so cover about 50 steps
WARMUP = 50  # good steps before the first loss that can be too high
MOST = torch.finfo(torch.float32).max
COUNTS = ("in_row", "good")
STATE = (*COUNTS, "mean", "variance")


@dataclass(frozen=True)
class Verdict:
    """The verdict on a step.

    Attributes:
        loss, norm: its mean loss and its gradient's norm.
        skipped: why it changed nothing, or None.
        scaling: it was skipped because float16's loss scale was too high, which is no defect of the step.
        in_row: skipped steps in a row, this one included; above the guard's patience the step was not judged itself.
    """

    loss: float
    norm: float
    skipped: str | None = None
    scaling: bool = False
    in_row: int = 0


class Guard:
    """Judges the steps of one model.

    Args:
        patience: skipped steps in a row after which all further steps are skipped.
        sigma: skip a step whose loss is this many standard deviations above the running mean; 0: none.
    """

    def __init__(self, device: torch.device, patience: int, sigma: float = 0.0):
        self.patience, self.sigma = patience, sigma
        self.unread: list[torch.Tensor] = []
        self.in_row, self.good, self.mean, self.variance = (torch.zeros((), device=device) for _ in range(4))

    def judge(self, loss: torch.Tensor, norm: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        """Judge a step. Returns a float32 scalar for the optimizer: 1 if the step must change nothing, otherwise 0.

        Args:
            loss, norm: of the step, float32 scalars on the device.
            scale: the loss scale of float16; at a scale above 1 the scaler handles gradients that are not finite.
        """
        overflow = ~torch.isfinite(norm)
        bad = ~torch.isfinite(loss) | (overflow if scale is None else overflow & (scale <= 1))
        if self.sigma:
            bad |= (self.good >= WARMUP) & (loss > self.mean + self.sigma * self.variance.sqrt())
        bad |= self.in_row >= self.patience
        skip = bad | overflow
        self.in_row = (self.in_row + bad) * skip  # a step that only the scaler skips leaves the count as it is
        if self.sigma:
            self._learn(loss, skip)
        found = skip.float()
        self.unread.append(torch.stack((loss, norm, found, bad.float(), self.in_row)))
        return found

    def _learn(self, loss: torch.Tensor, skip: torch.Tensor) -> None:
        """Running mean and variance with exponential weights (Finch, 2009, "Incremental calculation", section 9)."""
        weight = (1 / (self.good + 1)).clamp(min=MEMORY)
        difference = torch.where(skip, 0.0, loss - self.mean)
        share = torch.where(skip, 0.0, weight)
        self.mean = self.mean + share * difference
        self.variance = ((1 - share) * (self.variance + share * difference**2)).clamp(max=MOST)  # JSON has no infinity
        self.good = self.good + ~skip

    def read(self) -> list[Verdict]:
        """The verdicts since the last reading, the oldest first; waits for the device."""
        rows = torch.stack(self.unread).tolist() if self.unread else []
        self.unread.clear()
        return [self._verdict(*row) for row in rows]

    def _verdict(self, loss: float, norm: float, skip: float, bad: float, in_row: float) -> Verdict:
        if not skip:
            return Verdict(loss, norm)
        if not bad:
            return Verdict(loss, norm, "float16's loss scale was too high", scaling=True)
        if in_row > self.patience:
            why = f"{counted(int(in_row) - 1, 'step')} before it {'was' if in_row == 2 else 'were'}"
        elif not math.isfinite(loss):
            why = f"its loss is {loss}"
        elif not math.isfinite(norm):
            why = f"its gradient's norm is {norm}"
        else:
            why = f"its loss {loss:.4f} is {self.sigma:g} standard deviations above those before it"
        return Verdict(loss, norm, why, in_row=int(in_row))

    def open(self) -> None:
        """Forget the row of skipped steps, after a rollback."""
        self.in_row = torch.zeros_like(self.in_row)

    def state_dict(self) -> dict[str, float]:
        """The state that a resumed run needs, exact in JSON; waits for the device."""
        return dict(zip(STATE, torch.stack([getattr(self, name) for name in STATE]).tolist(), strict=True))

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restore what `state_dict` gave; an empty one is that of a new run.

        Raises:
            TypeError, ValueError: it was not made by `state_dict`.
        """
        for name in STATE:
            value = float(state.get(name, 0.0))
            value = MOST if value == math.inf else value  # older versions saved an infinite variance
            if not abs(value) <= MOST or (name in COUNTS and not 0 <= value < 2**31):
                raise ValueError(f"the guard's {name} is {value}")
            setattr(self, name, torch.full_like(self.in_row, value))
        self.unread.clear()
