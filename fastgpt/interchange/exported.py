"""A model that is to be written in another program's format: what every writer takes."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from fastgpt.config.model import ModelConfig
from fastgpt.system.lazy_tensors import LazyTensors
from fastgpt.tokenizer.base import Tokenizer

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class ExportedModel:
    """A model in GPT-2's form: learned positions, whatever its own were.

    Attributes:
        config: its shape, with the vocabulary's size and `position` learned.
        tensors: by the names of `fastgpt.model.gpt.GPT`, without the vocabulary's padding. Without `config.bias` there
            are no biases; `with_biases` adds zeros for formats that must have them.
        name: what to call it.
        facts: for a description, by name.
        step, val_loss: of the run, where it had any.
    """

    config: ModelConfig
    tokenizer: Tokenizer
    tensors: Mapping[str, torch.Tensor]
    name: str = "gpt2"
    facts: Mapping[str, str] = field(default_factory=dict)
    step: int = 0
    val_loss: float | None = None

    def with_biases(self) -> LazyTensors:
        """The tensors, and a bias of zeros for each layer that has none."""
        own = LazyTensors.of(self.tensors)
        layers = [name.removesuffix(".weight") for name in own if name.endswith(".weight")]
        zeros = {f"{layer}.bias": own.shapes[f"{layer}.weight"][:1] for layer in layers if layer not in ("wte", "wpe")}
        return LazyTensors(zeros | own.shapes, lambda name: own[name] if name in own else torch.zeros(zeros[name]))
