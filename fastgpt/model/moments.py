"""Counts what an optimizer keeps and computes, without building the model."""

import dataclasses
from collections.abc import Callable

from fastgpt.config.model import ModelConfig
from fastgpt.config.training import TrainConfig
from fastgpt.model.facts import count
from fastgpt.model.gpt import GPT
from fastgpt.model.matrices import hidden_weights


def count_moments(config: TrainConfig, parameters: int) -> int:
    """The float32 values that the optimizer keeps beside so many weights; its counters, one a tensor, are left out.

    AdamW keeps two for each weight, Muon one for those of its matrices.
    """
    return 2 * parameters - (count_hidden(config, hidden_weights) if config.optimizer == "muon" else 0)


def count_hidden(config: ModelConfig, measure: Callable[[GPT], int]) -> int:
    """`facts.count` of something in the hidden matrices, which do not depend on the vocabulary."""
    return count(dataclasses.replace(config.architecture(), vocab_size=1), measure)
