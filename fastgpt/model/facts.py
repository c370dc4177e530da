"""Shapes and counts of a configuration's parameters, found on PyTorch's meta device, which takes no memory."""

import dataclasses
import functools
from collections.abc import Callable

import torch

from fastgpt.config.model import ModelConfig
from fastgpt.model.gpt import GPT, VOCABULARY
from fastgpt.system.units import counted

# Each layer, position and token of the vocabulary adds the same. So the smallest models are counted, and the count
# goes on in a straight line: a model of a billion layers, which cannot even be described, is counted as fast.
SIZES = ("n_layer", "block_size", "vocab_size")


def count_parameters(config: ModelConfig) -> int:
    """`GPT.num_parameters` without building the model. Raises `UsageError` where the vocabulary's size is not known."""
    return count(dataclasses.replace(config.architecture(), vocab_size=config.known_vocab), GPT.num_parameters)


def describe_shape(config: ModelConfig) -> str:
    """Layers, heads, width and context in words."""
    heads = counted(config.n_head, "head")
    if config.kv_heads != config.n_head:
        heads += f" ({config.kv_heads} for keys and values)"
    return f"{counted(config.n_layer, 'layer')}, {heads}, width {config.n_embd:,}, context {config.block_size:,}"


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of each parameter in `GPT.weights`, by name. Raises `UsageError` as `count_parameters` does."""
    with torch.device("meta"):
        smallest = GPT(dataclasses.replace(config.architecture(), **dict.fromkeys(SIZES, 1))).weights()
    rows = dict.fromkeys(VOCABULARY, config.known_vocab) | {"wpe.weight": config.block_size}
    shapes = {}
    for name, tensor in smallest.items():
        layers = range(config.n_layer) if name.startswith("h.0.") else range(1)
        shape = (rows.get(name, len(tensor)), *tensor.shape[1:])
        shapes |= {name.replace("h.0.", f"h.{layer}.", 1): shape for layer in layers}
    return shapes


def position_table_bytes(config: ModelConfig) -> int:
    """Bytes of `GPT.table`, which is all that a model holds beside its parameters."""
    return count(dataclasses.replace(config.architecture(), vocab_size=1), _buffer_bytes)


def _buffer_bytes(model: GPT) -> int:
    return sum(buffer.nbytes for buffer in model.buffers())


@functools.lru_cache
def count(config: ModelConfig, measure: Callable[[GPT], int]) -> int:
    """Measure a model on the meta device; `measure` grows evenly with the layers, the positions and the vocabulary."""
    smallest = dataclasses.replace(config, **dict.fromkeys(SIZES, 1))
    first = _measured(smallest, measure)
    total = first
    for name in SIZES:
        one_more = _measured(dataclasses.replace(smallest, **{name: 2}), measure)
        total += (getattr(config, name) - 1) * (one_more - first)
    return total


def _measured(config: ModelConfig, measure: Callable[[GPT], int]) -> int:
    with torch.device("meta"):
        return measure(GPT(config))
