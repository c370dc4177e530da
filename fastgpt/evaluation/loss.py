"""The loss of a model on text that it does not train on."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from fastgpt.config.training import TrainConfig
from fastgpt.data import packing
from fastgpt.data.loader import IGNORED, Counted, Loader
from fastgpt.data.prepared import Corpus
from fastgpt.model.gpt import GPT
from fastgpt.system import out_of_memory
from fastgpt.system.units import counted

WHOLE_SPLIT_LIMIT = 1_000_000  # tokens, where `eval_iters` does not say
FIXED_BATCHES = 200
BATCH_TOKENS = 8192  # in a batch of the whole split, at least: there is no backward pass to hold memory for


@dataclass(frozen=True)
class EvaluationSet:
    """The part of the val split that every evaluation of a run reads. A run records it, so that its losses compare.

    Attributes:
        windows: the number of windows of `block_size` tokens, evenly spaced over the split; 0: the whole split.
        batch_size: the windows in a batch: the batch size that the run began with, also after a resume.
        text: sha256 of the text.
        end_token: of a packed run, see `fastgpt.data.packing`.
    """

    windows: int
    batch_size: int
    block_size: int
    val_tokens: int
    text: str
    end_token: int | None = None

    @classmethod
    def of(cls, config: TrainConfig, data: Corpus, batch_size: int) -> "EvaluationSet":
        """The set of a run that began with this batch size: `eval_iters` batches, or the whole split."""
        return cls(
            plan(config.eval_iters, data.val_tokens) * batch_size,
            batch_size,
            config.block_size,
            data.val_tokens,
            data.source_sha256,
            packing.end_token(config, data),
        )

    @property
    def identity(self) -> str:
        """A text that is equal for two sets if their losses compare; checkpoints and metrics.jsonl keep it."""
        number = counted(self.windows, "window") if self.windows else "all windows"
        packed = "" if self.end_token is None else ", packed"
        return f"{number} of {self.block_size:,} in {self.val_tokens:,} val tokens of text {self.text[:16]}{packed}"

    def describe(self) -> str:
        """The set in words."""
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
        """The number of batches."""
        if self.windows:
            return -(-self.windows // self.batch_size)
        return -(-(self.val_tokens - 1) // (self.block_size * self._whole_batch))

    @property
    def _whole_batch(self) -> int:
        return max(self.batch_size, BATCH_TOKENS // self.block_size)


def plan(eval_iters: int | None, val_tokens: int) -> int:
    """The number of batches of windows in an evaluation; 0: the whole val split."""
    if eval_iters is not None:
        return eval_iters
    return 0 if val_tokens <= WHOLE_SPLIT_LIMIT else FIXED_BATCHES


@torch.no_grad()
def mean_loss(
    model: GPT,
    batches: Iterator[Counted],
    arithmetic: AbstractContextManager,
    stopping: Callable[[], bool] = lambda: False,
    end_token: int | None = None,
) -> float | None:
    """The mean loss in nats over all targets but `IGNORED`. None if `stopping`, asked before each batch, is true.

    A batch that does not fit in memory is evaluated in halves.

    Args:
        end_token: of a packed run, see `fastgpt.data.packing`.
    """
    total, count = 0.0, 0
    model.eval()
    with arithmetic:
        for x, y, counted in batches:
            if stopping():
                break
            total += _loss(model, x, y, end_token) * counted
            count += counted
        else:
            model.train()
            return total / count
    model.train()
    return None


def _loss(model: GPT, x: torch.Tensor, y: torch.Tensor, end_token: int | None) -> float:
    """The mean loss of a batch in nats: tokens x and targets y, (B, T) each."""

    def compute(x: torch.Tensor, y: torch.Tensor) -> tuple[float, torch.Tensor]:
        return model(x, y, doc_ids=packing.document_ids(x, end_token)).item(), y

    parts = out_of_memory.in_halves(compute, x, y)
    if len(parts) == 1:
        return parts[0][0]
    counts = [int((targets != IGNORED).sum()) for _, targets in parts]
    return sum(loss * count for (loss, _), count in zip(parts, counts, strict=True) if count) / sum(counts)
