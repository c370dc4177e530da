"""The loss of a model on a text of any length, read in windows.

A window has the model's `block_size` tokens, and each begins `stride` tokens after the one before it. The first window
predicts all of its tokens but the first; each later one predicts those that no window before it has predicted, with at
least block_size - stride tokens before each of them. So every token of the text but the first is predicted exactly
once. Nothing stands before the first token, and it is not predicted, with or without a start token in the vocabulary:
this is also how the val loss of a training run is computed.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from fastgpt.data import packing
from fastgpt.data.loader import IGNORED, Batch
from fastgpt.data.prepared import Tokens
from fastgpt.errors import RunFailed, UsageError
from fastgpt.evaluation.token_scores import token_losses
from fastgpt.model.gpt import GPT
from fastgpt.system import out_of_memory
from fastgpt.system.bars import Advance
from fastgpt.system.device import send
from fastgpt.tokenizer.base import Tokenizer

COUNTED = 1 << 20  # tokens whose bytes are counted at a time
BATCH_TOKENS = 8192  # in a batch of windows, where the number of windows is not given


@dataclass(frozen=True)
class Windows:
    """Windows over tokens (N,), N at least 2; see above."""

    tokens: Tokens
    size: int
    stride: int

    def __post_init__(self) -> None:
        if self.stride > self.size:
            raise UsageError(
                f"`stride` {self.stride} is above block_size {self.size}, so tokens would be left out; "
                f"use `stride` {self.size} or less"
            )

    @property
    def targets(self) -> int:
        """The number of tokens that are predicted."""
        return len(self.tokens) - 1

    @property
    def count(self) -> int:
        """The number of windows."""
        return 1 + max(0, -(-(self.targets - self.size) // self.stride))

    def batches(self, batch_size: int | None, device: torch.device) -> Iterator[Batch]:
        """Inputs and targets, int64 (B, T). Targets that do not count, and those of padding, are `IGNORED`."""
        T = min(self.size, self.targets)
        B = batch_size or max(1, BATCH_TOKENS // T)
        for first in range(0, self.count, B):
            numbers = range(first, min(first + B, self.count))
            x, y = np.zeros((len(numbers), T), np.int64), np.full((len(numbers), T), IGNORED, np.int64)
            for row, number in enumerate(numbers):
                start = number * self.stride
                part = np.asarray(self.tokens[start : start + T + 1])
                fresh = self.size - self.stride if number else 0  # the first position that was not predicted before
                x[row, : len(part) - 1] = part[:-1]
                y[row, fresh : len(part) - 1] = part[fresh + 1 :]
            yield send(torch.from_numpy(x), device), send(torch.from_numpy(y), device)


@dataclass(frozen=True)
class Measurement:
    """A model's loss on a text.

    Attributes:
        nats: the sum over all predicted tokens.
        tokens, bytes: the number of predicted tokens, and the UTF-8 bytes of their text; an end-of-text has none.
    """

    nats: float
    tokens: int
    bytes: int
    seconds: float
    block_size: int
    stride: int

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """The size in bits of a byte of text that is compressed by the model: equal texts compare whatever the tokens.

        None where the predicted tokens have no text.
        """
        return self.nats / math.log(2) / self.bytes if self.bytes else None


@torch.no_grad()
def measure(
    model: GPT,
    tokenizer: Tokenizer,
    tokens: Tokens,
    *,
    stride: int | None = None,
    batch_size: int | None = None,
    end_token: int | None = None,
    advance: Advance = lambda done: None,
) -> Measurement:
    """The loss of a model on tokens (N,), N at least 2.

    The result does not depend on the batch size, rounding aside: losses are summed in float64. A batch that does not
    fit in memory is computed in halves.

    Args:
        stride: default block_size: windows end to end.
        batch_size: windows in a batch; default: as many as have 8,192 tokens.
        end_token: attention stays within the documents that begin with this token; None: within windows.

    Raises:
        UsageError: a stride above block_size.
        RunFailed: the loss is not a number.
    """
    size = model.config.block_size
    windows = Windows(tokens, size, stride or size)
    model.eval()
    nats, began = 0.0, time.perf_counter()

    def losses(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        counted = y != IGNORED
        return token_losses(model, model.hidden(x, packing.document_ids(x, end_token))[counted], y[counted])

    for x, y in windows.batches(batch_size, model.device):
        for part in out_of_memory.in_halves(losses, x, y):
            nats += part.sum().item()
            advance(len(part))
    if not math.isfinite(nats):
        raise RunFailed(f"the model's loss is {nats}: its weights or logits are not finite; try `dtype` float32")
    return Measurement(
        nats,
        windows.targets,
        predicted_bytes(tokenizer, tokens),
        time.perf_counter() - began,
        size,
        windows.stride,
    )


def predicted_bytes(tokenizer: Tokenizer, tokens: Tokens) -> int:
    """The UTF-8 bytes of the text of all tokens but the first. An end-of-text counts none."""
    ids = range(tokenizer.vocab_size)
    lengths = np.array([0 if id == tokenizer.end_token else len(tokenizer.token_bytes(id)) for id in ids])
    blocks = (np.asarray(tokens[at : at + COUNTED]) for at in range(0, len(tokens), COUNTED))
    return sum(int(lengths[block].sum()) for block in blocks) - int(lengths[tokens[0]])
