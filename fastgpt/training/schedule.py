"""The learning rate and the momentum of each step."""

import math

import torch

from fastgpt.config.training import TrainConfig

STABLE_SHARE = 0.8  # of a wsd run, before its decay begins
MUON_START = 0.85  # momentum in the first step, as in modded-nanogpt (Jordan et al., 2024)


def learning_rate(step: int, config: TrainConfig) -> float:
    """The learning rate of a step, counted from 0.

    Linear warm-up over `config.warmup` steps, then down to `min_lr` at `lr_decay_iters` along a half cosine
    (Loshchilov & Hutter, 2017) or a line, or constant; wsd stays at the peak for 80% of the way and then goes
    down a line (Hu et al., 2024).
    """
    peak, final, warmup, end = (
        config.learning_rate,
        config.final_lr,
        config.warmup,
        config.decay_iters,
    )
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if config.schedule == "constant" or not config.decay_lr:
        return peak
    begin = max(warmup, int(STABLE_SHARE * end)) if config.schedule == "wsd" else warmup
    if step < begin:
        return peak
    progress = min(1.0, (step - begin) / (end - begin)) if end > begin else 1.0
    share = 0.5 * (1.0 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1.0 - progress
    return final + share * (peak - final)


def momentum(step: int, config: TrainConfig) -> float:
    """Muon's momentum in a step, counted from 0: along a line from `MUON_START` over `muon_momentum_warmup` steps."""
    peak, steps = config.muon_momentum, config.muon_momentum_warmup
    start = min(MUON_START, peak)
    return peak if step >= steps else start + (peak - start) * step / steps


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the rate of every group. One with a `peak` of its own keeps its proportion to the peak of the `others`."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * (rate / group["others"]) if "peak" in group else rate


def set_momentum(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Set the momentum of every group that has one."""
    for group in optimizer.param_groups:
        if "momentum" in group:
            group["momentum"] = value
