"""Makes the optimizer of a run, with its parameter groups; and clipping.

A new one derives from `fastgpt.training.adamw.Optimizer`, and is listed in OPTIMIZERS, in
`fastgpt.config.training.OPTIMIZERS` and in `fastgpt.model.moments`.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch

from fastgpt.config.training import TrainConfig
from fastgpt.errors import UsageError
from fastgpt.model.gpt import GPT
from fastgpt.model.matrices import hidden_matrices
from fastgpt.system.device import matrix_dtype
from fastgpt.training.adamw import AdamW, Optimizer
from fastgpt.training.muon import Muon
from fastgpt.training.orthogonalize import METHODS


def _adamw(model: GPT, config: TrainConfig) -> AdamW:
    return AdamW(_groups(model.parameters(), config), config.learning_rate, (config.beta1, config.beta2))


def _muon(model: GPT, config: TrainConfig) -> Muon:
    matrices = hidden_matrices(model)
    if not matrices:
        raise UsageError("`optimizer` muon trains the matrices of blocks, and this model has none; use adamw")
    return Muon(
        matrices,
        config.muon_lr,
        config.weight_decay,
        groups=_groups((p for p in model.parameters() if p not in matrices), config),
        adam_lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        momentum=config.muon_momentum,
        method=METHODS[config.muon_method],
        ratio=config.muon_adjust_lr,
        dtype=matrix_dtype(next(iter(matrices)).device),
        compiled=config.compile,
    )


OPTIMIZERS: dict[str, Callable[[GPT, TrainConfig], Optimizer]] = {"adamw": _adamw, "muon": _muon}


def make_optimizer(model: GPT, config: TrainConfig) -> Optimizer:
    """The optimizer of the settings, with weight decay on matrices and none on vectors."""
    return OPTIMIZERS[config.optimizer](model, config)


def _groups(parameters: Iterable[torch.nn.Parameter], config: TrainConfig) -> list[dict[str, Any]]:
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]  # a model may have no vectors


def clip(parameters: list[torch.nn.Parameter], limit: float) -> torch.Tensor:
    """Scale the gradients, in place, to a norm of at most `limit`, 0 for none; returns the norm that they had."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    # On a CPU the norm can be read without waiting, and most steps need no scaling.
    if limit and (norm.device.type != "cpu" or not norm <= limit):  # also where the norm is not a number
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm
