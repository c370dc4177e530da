"""The loss of a model on text that it does not train on."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from fastgpt.config.training import TrainConfig
from fastgpt.data.corpus import Corpus
from fastgpt.data.loader import IGNORED, Counted, Loader
from fastgpt.model.gpt import GPT
from fastgpt.system import out_of_memory
from fastgpt.system.units import counted

WHOLE_SPLIT_LIMIT = 1_000_000  # tokens, where --eval_iters does not say
FIXED_BATCHES = 200
BATCH_TOKENS = 8192  # in a batch of the whole split, at least: there is no backward pass to hold memory for


@dataclass(frozen=True)
class EvaluationSet:
    """The part of the val split that the evaluations of a run read, recorded with the run so that losses compare.

    Attributes:
        windows: how many windows of `block_size` tokens, at even distances over the split; 0: the whole split.
        batch_size: windows that are evaluated at once; that of the run's first steps, whatever a resume has.
        text: sha256 of the text.
    """

    windows: int
    batch_size: int
    block_size: int
    val_tokens: int
    text: str

    @classmethod
    def of(cls, config: TrainConfig, data: Corpus, batch_size: int) -> "EvaluationSet":
        """The set of a run whose first batch size is given: --eval_iters batches, or the whole split."""
        return cls(
            plan(config.eval_iters, data.val_tokens) * batch_size,
            batch_size,
            config.block_size,
            data.val_tokens,
            data.source_sha256,
        )

    @property
    def identity(self) -> str:
        """Equal for two sets if losses on them compare; kept in checkpoints and in metrics.jsonl."""
        number = counted(self.windows, "window") if self.windows else "all windows"
        return f"{number} of {self.block_size:,} in {self.val_tokens:,} val tokens of text {self.text[:16]}"

    def describe(self) -> str:
        """The set, for people."""
        if not self.windows:
            return "the whole val split"
        share = self.windows * self.block_size / self.val_tokens
        return f"{counted(self.windows, 'window')} evenly spaced over the val split, {share:.0%} of its tokens"

    def batches(self, loader: Loader) -> Iterator[Counted]:
        """The batches of an evaluation, the same every time."""
        if self.windows:
            return loader.windows(self.windows, self.batch_size)
        return loader.whole(self._whole_batch)

    @property
    def count(self) -> int:
        """How many batches there are."""
        if self.windows:
            return -(-self.windows // self.batch_size)
        return -(-(self.val_tokens - 1) // (self.block_size * self._whole_batch))

    @property
    def _whole_batch(self) -> int:
        return max(self.batch_size, BATCH_TOKENS // self.block_size)


def plan(eval_iters: int | None, val_tokens: int) -> int:
    """How many batches of windows an evaluation takes, or 0 for the whole val split."""
    if eval_iters is not None:
        return eval_iters
    return 0 if val_tokens <= WHOLE_SPLIT_LIMIT else FIXED_BATCHES


@torch.no_grad()
def mean_loss(
    model: GPT,
    batches: Iterator[Counted],
    arithmetic: AbstractContextManager,
    stopping: Callable[[], bool] = lambda: False,
) -> float | None:
    """The mean loss in nats over all targets that count, or None where `stopping`, asked at each batch, says so.

    A batch that does not fit into the memory is evaluated in halves.
    """
    total, count = 0.0, 0
    model.eval()
    with arithmetic:
        for x, y, counted in batches:
            if stopping():
                break
            total += _loss(model, x, y) * counted
            count += counted
        else:
            model.train()
            return total / count
    model.train()
    return None


def _loss(model: GPT, x: torch.Tensor, y: torch.Tensor) -> float:
    """The mean loss of a batch, (B, T) each, in nats over the targets that count."""
    if len(x) == 1:
        return model(x, y).item()
    with out_of_memory.caught():
        return model(x, y).item()
    middle = len(x) // 2
    halves = [(x[part], y[part]) for part in (slice(middle), slice(middle, None))]
    counts = [int((targets != IGNORED).sum()) for _, targets in halves]
    losses = [_loss(model, *half) if count else 0.0 for half, count in zip(halves, counts, strict=True)]
    return sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
