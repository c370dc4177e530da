"""The memory that a generation holds, by kind and by layer: estimated, or measured with the real engine.

The estimate computes two forward passes on fake tensors (`fastgpt.model.footprint`): one that reads prompts, and one
that decodes a token of each sequence at the end of the context. The memory of the sampler is not in it.
"""

import dataclasses
import random
from collections.abc import Mapping

import torch

from fastgpt.config.generation import GenerateConfig, SamplingParams
from fastgpt.config.model import ModelConfig
from fastgpt.generation.engine import Engine
from fastgpt.model.footprint import TEMPORARY, Footprint, Layers, Owner, hold_weights, holding, shallow, total
from fastgpt.model.gpt import GPT
from fastgpt.model.kv_cache import DenseCache, page_bytes
from fastgpt.model.linear import store_by_columns
from fastgpt.ops.table import Ops
from fastgpt.system.live_bytes import LiveBytes
from fastgpt.system.torch_private import fake_tensors

PHASES = ("prefill", "decode")
DECODED = 4  # tokens of each sequence in a measurement


def estimate(config: ModelConfig, ops: Ops, device: torch.device, dtype: torch.dtype, max_batch: int) -> Footprint:
    """The memory of so many sequences whose contexts are full, with weights in `dtype`, without compiling.

    The phases are `PHASES`, the kinds: weights, cache, logits, temporary.
    """
    config = dataclasses.replace(config.architecture(), dropout=0.0)
    small, one_layer = shallow(config), dataclasses.replace(config, n_layer=1)
    with fake_tensors():
        model = _model(small, ops, device, dtype)
        peaks = {phase: _pass(model, max_batch, phase) for phase in PHASES}
    cache = Layers(blocks=((config.n_layer, max_batch * page_bytes(one_layer, config.block_size, dtype)),))
    found = {phase: {**holding(held, small.n_layer, config.n_layer), "cache": cache} for phase, held in peaks.items()}
    return Footprint(found, {phase: total(held) for phase, held in found.items()})


def measure(config: ModelConfig, ops: Ops, device: torch.device, dtype: torch.dtype, max_batch: int) -> int:
    """The most bytes that the engine holds while it fills the contexts of so many sequences; random weights.

    Raises:
        UsageError: the cache alone takes more memory than is free.
    """
    config = dataclasses.replace(config.architecture(), dropout=0.0)
    model = _model(config, ops, device, dtype)
    page = GenerateConfig.page_size
    spare = max_batch - 1  # pages that the scheduler wants to be free before it takes the last sequence
    pages, each = max_batch * -(-config.block_size // page) + spare, page_bytes(config, page, dtype)
    new = min(DECODED, config.block_size)
    draw = random.Random(0)
    prompts = [
        [draw.randrange(config.known_vocab) for _ in range(config.block_size - new + 1)] for _ in range(max_batch)
    ]
    with LiveBytes(device) as memory:
        hold_weights(memory, model)
        engine = Engine(model, max_batch=max_batch, kv_memory=pages * each, prefix_cache=False)
        for prompt in prompts:
            engine.submit(prompt, SamplingParams(max_new_tokens=new))
        while engine.busy:
            engine.step()
    return memory.peak - spare * each


def _model(config: ModelConfig, ops: Ops, device: torch.device, dtype: torch.dtype) -> GPT:
    """A model that is ready to evaluate, as `GPT.from_weights` gives it."""
    with device:
        model = GPT(config, ops)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    store_by_columns(model)
    return model.eval()


class _Cache(DenseCache):
    """A cache of fake tensors, for which no memory has to be free."""

    def __init__(self, model: GPT, B: int, length: int):
        self.config, self.capacity, self.length = model.config, model.config.block_size, length
        shape = (B, self.capacity, self.config.kv_heads, self.config.head_dim)
        buffers = [torch.empty(shape, device=model.device, dtype=model.dtype) for _ in range(2 * self.config.n_layer)]
        self.keys, self.values = tuple(buffers[::2]), tuple(buffers[1::2])

    def attend(self, ops: Ops, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """As the engine on a CPU, which attends for one sequence after another, and then joins what it has."""
        keys, values = self.append(layer, k, v)
        if len(q) == 1:
            return ops.causal_attention(q, keys, values)
        outs = torch.empty_like(q)
        ops.causal_attention(q[:1], keys[:1], values[:1])  # any of them takes as much
        return outs.clone()


def _pass(model: GPT, max_batch: int, phase: str) -> Mapping[Owner, int]:
    """The bytes that are held at the peak of a forward pass, with the cache of its own sequences only."""
    config, device = model.config, model.device
    B, new = (max_batch, 1) if phase == "decode" else _read_at_once(config, max_batch)
    cache = _Cache(model, B, config.block_size - new)
    memory = LiveBytes(device, fake=True)
    with memory, torch.no_grad():
        hold_weights(memory, model)
        memory.hold((*cache.keys, *cache.values), Owner("cache"))
        memory.label = Owner(TEMPORARY)
        tokens = torch.zeros((B, new), dtype=torch.int64, device=device)
        hidden = model.hidden(tokens, cache=cache)[:, -1]
        memory.label = Owner("logits")
        model.logits(hidden)
    return memory.peaks[None].held  # pyright: ignore[reportReturnType]


def _read_at_once(config: ModelConfig, max_batch: int) -> tuple[int, int]:
    """The sequences and the tokens of each in the largest forward pass that reads prompts, as the engine limits it."""
    most = GenerateConfig.max_batch_tokens
    return min(max_batch, max(1, most // config.block_size)), min(config.block_size, most)
