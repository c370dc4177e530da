"""nanoGPT's recipe for a small model on a CPU, trained by the plain GPT in stock PyTorch, as one writes it first.

The settings are those that nanoGPT's README gives for a laptop (https://github.com/karpathy/nanoGPT, "I only have a
macbook"): 4 layers, 4 heads, width 128, context 64, 12 sequences, 2,000 steps, no dropout, and those of its
config/train_shakespeare_char.py for the rest. The code is ours.
"""

import math
import time
from typing import NamedTuple

import numpy as np
import torch

from bench.peers.training import PlainGPT, plain_optimizer, plain_step

LAYERS, HEADS, WIDTH, CONTEXT, SEQUENCES, STEPS = 4, 4, 128, 64, 12, 2000
LEARNING_RATE, MIN_LR, WARMUP, BETAS = 1e-3, 1e-4, 100, (0.9, 0.99)
AT_ONCE = 256  # windows of an evaluation


class Trained(NamedTuple):
    """The steps of a run; `val_loss` is the mean over the whole val split."""

    steps: int
    tokens: int
    seconds: float
    val_loss: float


def train(train_tokens: np.ndarray, val_tokens: np.ndarray, vocab_size: int, seed: int, steps: int = STEPS) -> Trained:
    """Train from random weights on the CPU; only the steps are timed."""
    torch.manual_seed(seed)
    model = PlainGPT(vocab_size, CONTEXT, LAYERS, HEADS, WIDTH, bias=False)
    optimizer = plain_optimizer(model, LEARNING_RATE, BETAS)
    data = torch.from_numpy(train_tokens.astype(np.int64))

    def batches():
        while True:
            starts = torch.randint(len(data) - CONTEXT, (SEQUENCES,)).tolist()
            yield tuple(torch.stack([data[at + one : at + one + CONTEXT] for at in starts]) for one in (0, 1))

    step = plain_step(model, model, optimizer, batches())
    began = time.perf_counter()
    for number in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(number, steps)
        step()
    return Trained(steps, steps * SEQUENCES * CONTEXT, time.perf_counter() - began, evaluate(model, val_tokens))


def learning_rate(step: int, steps: int) -> float:
    """nanoGPT's: a line up, then half a cosine down."""
    if step < WARMUP:
        return LEARNING_RATE * (step + 1) / (WARMUP + 1)
    share = (step - WARMUP) / (steps - WARMUP)
    return MIN_LR + 0.5 * (1 + math.cos(math.pi * share)) * (LEARNING_RATE - MIN_LR)


@torch.no_grad()
def evaluate(model: PlainGPT, tokens: np.ndarray) -> float:
    """The mean loss over all tokens but the first, in windows side by side; the last may be shorter."""
    data = torch.from_numpy(tokens.astype(np.int64))
    whole = (len(data) - 1) // CONTEXT * CONTEXT
    windows = [data[at : at + whole].view(-1, CONTEXT).split(AT_ONCE) for at in (0, 1)]
    rest = data[None, whole:]
    pairs = [*zip(*windows, strict=True), *([(rest[:, :-1], rest[:, 1:])] if rest.shape[1] > 1 else [])]
    total = sum(model(x, y).double() * y.numel() for x, y in pairs)
    return float(total) / (len(data) - 1)
