"""The values that an optimizer keeps, counted without building the model."""

import dataclasses

from fastgpt.config.training import TrainConfig
from fastgpt.model.facts import count
from fastgpt.model.matrices import hidden_weights


def count_moments(config: TrainConfig, parameters: int) -> int:
    """The float32 values that the optimizer keeps beside so many weights; its counters, one a tensor, are left out.

    AdamW keeps two for each weight, Muon one for those of its matrices.
    """
    if config.optimizer == "muon":
        smallest_vocabulary = dataclasses.replace(config.architecture(), vocab_size=1)  # no matrix depends on it
        return 2 * parameters - count(smallest_vocabulary, hidden_weights)
    return 2 * parameters
