"""A model that is to be written in another program's format: what every writer takes."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from fastgpt.config.model import ModelConfig
from fastgpt.system.lazy_tensors import LazyTensors
from fastgpt.tokenizer.base import Tokenizer

EMBEDDINGS = ("wte", "wpe", "lm_head")  # layers that have no bias
RELUS = ("relu", "relu2")  # activations that formats with GELU alone do not have
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class ExportedModel:
    """A model in GPT-2's form: learned positions, whatever its own were.

    Attributes:
        config: its shape, with the vocabulary's size and `position` learned.
        tensors: by the names of `fastgpt.model.gpt.GPT`, without the vocabulary's padding. Biases may be missing;
            `with_biases` adds zeros for formats that must have them.
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
        zeros = {f"{layer}.bias": own.shapes[f"{layer}.weight"][:1] for layer in layers if layer not in EMBEDDINGS}
        return LazyTensors(zeros | own.shapes, lambda name: own[name] if name in own else torch.zeros(zeros[name]))


def beyond_gpt2(config: ModelConfig) -> list[str]:
    """The parts of a model that no format of a GPT-2 can hold, in words."""
    parts = {
        f"grouped queries (`n_kv_head` {config.n_kv_head})": config.kv_heads != config.n_head,
        "rotary positions (`position` rotary)": config.position == "rotary",
        f"heads of another width than `n_embd` / `n_head` (`head_size` {config.head_size})": (
            config.n_head * config.head_dim != config.n_embd
        ),
        "norms of queries and keys (`qk_norm`)": config.qk_norm,
        "RMS norms (`norm` rmsnorm)": config.norm != "layernorm",
        "a gated MLP (`mlp` swiglu)": config.mlp == "swiglu",
        f"bounded logits (`logit_softcap` {config.logit_softcap})": config.logit_softcap is not None,
    }
    return [part for part, there in parts.items() if there]
