"""Draws batches from a token file. The tokens of a step are a pure function of (seed, step)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fastgpt.config.training import TrainConfig
from fastgpt.data.corpus import Unprepared
from fastgpt.data.prepared import Corpus, Tokens
from fastgpt.errors import UsageError
from fastgpt.system.units import counted

IGNORED = -100  # the target at positions without a loss
Batch = tuple[torch.Tensor, torch.Tensor]
Counted = tuple[torch.Tensor, torch.Tensor, int]  # a batch, and the number of its targets that are not `IGNORED`


class Loader:
    """Draws (inputs, targets), each int64 (B, block_size), from a one-dimensional array of tokens.

    A seed and a step always give the same global batch, into however many micro-batches it is divided. So a resumed
    run sees the same batches as an uninterrupted one.

    Raises:
        UsageError: fewer than block_size + 1 tokens; in a batch: a token outside the vocabulary.
    """

    def __init__(
        self,
        tokens: Tokens,
        block_size: int,
        vocab_size: int,
        *,
        seed: int,
        device: torch.device,
        name: str,
    ):
        if len(tokens) < block_size + 1:
            shortest = f"`block_size` {len(tokens) - 1}" if len(tokens) > 1 else "a longer text"
            raise UsageError(
                f"{name} holds {counted(len(tokens), 'token')}, and `block_size` {block_size} needs at least "
                f"{block_size + 1}; try {shortest}"
            )
        self.tokens, self.block_size, self.vocab_size = tokens, block_size, vocab_size
        self.seed, self.device, self.name = seed, device, name
        self.drawn = (-1, 0, np.empty(0, np.int64))  # the last step, its number of sequences, and their first positions

    def batch(self, step: int, micro: int, micro_batches: int, batch_size: int) -> Batch:
        """Micro-batch number `micro` of the `micro_batches` that make up the step's global batch."""
        if self.drawn[:2] != (step, micro_batches * batch_size):
            random = np.random.Generator(np.random.Philox(key=self.seed, counter=[0, 0, 0, step]))
            starts = random.integers(0, len(self.tokens) - self.block_size, size=micro_batches * batch_size)
            self.drawn = step, micro_batches * batch_size, starts
        return self._gather(self.drawn[2][micro * batch_size : (micro + 1) * batch_size])

    def windows(self, count: int, batch_size: int) -> Iterator[Counted]:
        """`count` windows, evenly spaced from the first to the last, in batches. The last batch may be smaller."""
        last = len(self.tokens) - self.block_size - 1  # the beginning of the last window
        for first in range(0, count, batch_size):
            numbers = range(first, min(first + batch_size, count))
            starts = np.array([number * last // max(1, count - 1) for number in numbers])
            yield *self._gather(starts), len(numbers) * self.block_size

    def whole(self, batch_size: int) -> Iterator[Counted]:
        """Windows laid end to end, in which every token but the first is a target exactly once.

        The last window may be short, and the last batch may lack rows. Targets there are `IGNORED`.
        """
        T, count = self.block_size, len(self.tokens) - 1
        for first in range(0, count, T * batch_size):
            part = np.asarray(self.tokens[first : first + T * batch_size + 1]).astype(np.int64)
            x, y = np.zeros(T * batch_size, np.int64), np.full(T * batch_size, IGNORED, np.int64)
            x[: len(part) - 1], y[: len(part) - 1] = part[:-1], part[1:]
            x, y = (self._to_device(tokens.reshape(batch_size, T)) for tokens in (x, y))
            yield x, y, len(part) - 1

    def _gather(self, starts: np.ndarray) -> Batch:
        windows = self.tokens[starts[:, None] + np.arange(self.block_size + 1)].astype(np.int64)
        return self._to_device(windows[:, :-1]), self._to_device(windows[:, 1:])

    def _to_device(self, tokens: np.ndarray) -> torch.Tensor:
        if (top := tokens.max()) >= self.vocab_size:
            raise UsageError(
                f"{self.name} holds token {top}, but its vocabulary has {self.vocab_size}; prepare it again"
            )
        tensor = torch.from_numpy(np.ascontiguousarray(tokens))
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)


@dataclass(frozen=True)
class StepBatches(Sequence[Batch]):
    """The micro-batches of one step. Each is gathered when it is asked for."""

    loader: Loader
    step: int
    batch_size: int
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, micro: int) -> Batch:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not 0 <= micro < self.count:
            raise IndexError(micro)
        return self.loader.batch(self.step, micro, self.count, self.batch_size)


class MicroBatches:
    """Divides the batch of each step into `count` micro-batches of `batch_size` sequences, and further on request."""

    def __init__(self, loader: Loader, batch_size: int, count: int):
        self.loader, self.batch_size, self.count = loader, batch_size, count

    def of_step(self, step: int) -> "StepBatches":
        """The micro-batches of a step, which hold the same sequences however they are divided."""
        return StepBatches(self.loader, step, self.batch_size, self.count)

    def divide(self) -> bool:
        """Divide the micro-batches by their smallest factor, for good; False if each is a single sequence."""
        if self.batch_size == 1:
            return False
        factor = next(n for n in range(2, self.batch_size + 1) if self.batch_size % n == 0)
        self.batch_size, self.count = self.batch_size // factor, self.count * factor
        return True


def check_length(data: Corpus | Unprepared, block_size: int) -> None:
    """Raise `UsageError` if a split is shorter than block_size + 1 tokens, or will be once the text is tokenized."""
    if isinstance(data, Unprepared):
        (train, val), most = data.most_tokens, "at most "
    else:
        train, val, most = data.train_tokens, data.val_tokens, ""
    needed, shortest = block_size + 1, min(train, val)
    if shortest < needed:
        fix = f"try `block_size` {shortest - 1}, or " if shortest > 1 else ""
        raise UsageError(
            f"`block_size` {block_size} needs {counted(needed, 'token')} in each split, and {data.name} "
            f"has {most}{train:,} to train on and {most}{val:,} to validate on; {fix}use a longer text"
        )


def loaders(data: Corpus, config: TrainConfig, device: torch.device) -> tuple[Loader, Loader]:
    """Loaders of the train and the val split.

    Raises:
        UsageError: a split is shorter than block_size + 1 tokens.
    """
    check_length(data, config.block_size)
    vocab_size, block_size, seed = data.tokenizer.vocab_size, config.block_size, config.seed
    train, val = (
        Loader(tokens, block_size, vocab_size, seed=seed, device=device, name=f"{data.name}'s {split} split")
        for split, tokens in (("train", data.train()), ("val", data.val()))
    )
    return train, val
