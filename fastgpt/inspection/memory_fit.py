"""Finds what fits into an amount of memory: the largest batch, and what to change where the asked one does not fit."""

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fastgpt.errors import UsageError
from fastgpt.inspection.memory_work import Work
from fastgpt.ops import table
from fastgpt.training.footprint import StepFootprint

MOST = 1 << 24  # sequences
MOST_GENERATED = 65_536  # sequences: `max_batch` takes no more
SHORTEST = 16  # tokens


@dataclass(frozen=True)
class Change:
    """Settings, and the bytes at the peak with them."""

    settings: Mapping[str, Any]
    bytes: int


@dataclass(frozen=True)
class Fit:
    """The largest batches that fit into `budget` bytes, and changes with which the asked one fits.

    Attributes:
        fits: whether the step that was asked for does.
        largest: the largest `batch_size`; None where not even one sequence fits.
        same_tokens: the largest `batch_size` with which some number of micro-batches has as many sequences in a step.
        changes: what makes the asked step fit, each by itself; the most effective first.
        together: the fewest of all changes, in the order of their price, that fit together, where none does alone.
        generation: the largest `max_batch`; None where not even one sequence fits.
    """

    budget: int
    fits: bool
    largest: Change | None
    same_tokens: Change | None
    changes: tuple[Change, ...]
    together: Change | None
    generation: Change | None


def find(work: Work, budget: int, asked: StepFootprint) -> Fit:
    """Search by estimates.

    Args:
        asked: the estimate of the settings as they are.
    """
    search = _Search(work, budget)
    fits = asked.peak <= budget
    largest = search.largest_batch()
    same = search.same_tokens(largest)
    changes = () if fits else search.changes(same)
    together = None if fits or changes else search.together()
    return Fit(budget, fits, largest, same, changes, together, search.most_generated())


class _Search:
    def __init__(self, work: Work, budget: int):
        self.work, self.config, self.budget = work, work.config, budget

    def _bytes(self, **changes: Any) -> int:
        return self.work.step(**changes).peak

    def _fitting(self, **changes: Any) -> Change | None:
        size = self._bytes(**changes)
        return Change(changes, size) if size <= self.budget else None

    def largest_batch(self) -> Change | None:
        size = functools.cache(lambda B: self._bytes(batch_size=B))
        B = largest(size, self.budget, MOST)
        return Change({"batch_size": B}, size(B)) if B else None

    def same_tokens(self, most: Change | None, **changes: Any) -> Change | None:
        """The largest batch that divides the sequences of a step, with its number of micro-batches."""
        if most is None:
            return None
        sequences = self.config.batch_size * self.config.gradient_accumulation_steps
        sizes = (B for B in range(min(sequences, most.settings["batch_size"]), 0, -1) if sequences % B == 0)
        tried = (self._fitting(batch_size=B, gradient_accumulation_steps=sequences // B, **changes) for B in sizes)
        return next(filter(None, tried), None)

    def changes(self, same: Change | None) -> tuple[Change, ...]:
        """Those that make the step fit, each by itself."""
        alone = [self._fitting(**change) for change in (*self._arithmetic(), *self._kernels())]
        found = [one for one in (*alone, same, self._shorter(), self._shallower()) if one is not None]
        return tuple(sorted(found, key=lambda one: one.bytes))

    def together(self) -> Change | None:
        """In order of what they cost in quality; the last two change the model."""
        merged: dict[str, Any] = {}
        for change in (*self._arithmetic(), *self._kernels()):
            merged |= change
            if found := self._fitting(**merged):
                return found
        sequences = self.config.batch_size * self.config.gradient_accumulation_steps
        merged |= {"batch_size": 1, "gradient_accumulation_steps": sequences}
        return self._fitting(**merged) or self._shorter(**merged) or self._smallest(merged)

    def _smallest(self, merged: Mapping[str, Any]) -> Change | None:
        shortest = min(SHORTEST, self.config.block_size)
        return self._shallower(**merged, block_size=shortest)

    def _arithmetic(self) -> Iterator[dict[str, Any]]:
        if self.work.machine.dtype == torch.float32 and not self.work.ops.interpreted:
            yield {"dtype": "bfloat16"}

    def _kernels(self) -> Iterator[dict[str, Any]]:
        for kernels in ("torch", "triton"):
            if set(self.work.ops.backends.values()) != {kernels} and self._can_run(kernels):
                yield {"kernels": kernels}

    def _can_run(self, kernels: str) -> bool:
        try:
            return not table.resolve(kernels, self.work.device).interpreted
        except UsageError:
            return False

    def _shorter(self, **others: Any) -> Change | None:
        """The longest context that fits, of halves of the asked one."""
        T = self.config.block_size // 2
        while T >= SHORTEST:
            if found := self._fitting(**others, block_size=T):
                return found
            T //= 2
        return None

    def _shallower(self, **others: Any) -> Change | None:
        """The most layers that fit."""
        size = functools.cache(lambda L: self._bytes(**others, n_layer=L))
        L = largest(size, self.budget, self.config.n_layer - 1)
        return Change({**others, "n_layer": L}, size(L)) if L else None

    def most_generated(self) -> Change | None:
        size = functools.cache(lambda B: self.work.generation(B).peak)
        B = largest(size, self.budget, MOST_GENERATED)
        return Change({"max_batch": B}, size(B)) if B else None


def largest(size: Callable[[int], int], budget: int, most: int) -> int:
    """The largest number from 1 to `most` whose size is within the budget; 0 for none. Sizes grow, nearly in a line.

    The line through two sizes tells where to look next; the result and the number after it are both tried.
    """
    if most < 1 or size(1) > budget:
        return 0
    low, high, slope = 1, most + 1, 1
    if most > 1:
        slope = max(1, size(2) - size(1))
    while high - low > 1:
        guess = min(max(low + (budget - size(low)) // slope, low + 1), high - 1)
        slope = max(1, (size(guess) - size(low)) // (guess - low))
        if size(guess) <= budget:
            low = guess
        else:
            high = guess
    return low
