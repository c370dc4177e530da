"""The calls of the table's operations that a GPT makes, for `fastgpt.ops.autotune`: of training, and of generation.

They are recorded from the model itself, on PyTorch's meta device, where nothing is computed. A new option of the model
needs no change here.
"""

import collections
import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from fastgpt.config.model import ModelConfig
from fastgpt.config.training import TrainConfig
from fastgpt.model.gpt import GPT
from fastgpt.model.int8 import quantize_model
from fastgpt.model.kv_cache import DenseCache, PagedBatch, PagedCache, Sequences
from fastgpt.ops.recorder import Recorder
from fastgpt.ops.timed_choices import source_hash
from fastgpt.ops.workload import Call, Calls, Workload, smaller

LAYERS = 2  # the first adds no branch; all that follow are like the second
PAGE = 16  # tokens; the default of `page_size`
DOCUMENTS = 4  # that begin in a packed context, on average
META = torch.device("meta")


def training(config: TrainConfig, dtype: torch.dtype) -> Workload:
    """The micro-batches of a run: float32 weights, and autocast to `dtype`.

    Raises:
        UsageError: the vocabulary's size is not known.
    """
    model, B = _shallow(config), config.batch_size

    def record() -> Calls:
        few, short = smaller(B, model.block_size)
        small = dataclasses.replace(model, block_size=short)
        return _calls(_trained(model, dtype, B, config.pack), _trained(small, dtype, few, config.pack))

    return Workload(_name("training, packed" if config.pack else "training", B, model), dtype, record, config.compile)


def generation(
    config: ModelConfig, dtype: torch.dtype, B: int = 1, *, int8: bool = False, compile: bool = False
) -> Workload:
    """Decoding B sequences at the end of the context, which is timed, and reading their prompts.

    The weights are in `dtype`, or the matrices in int8.

    Raises:
        UsageError: the vocabulary's size is not known.
    """
    model = dataclasses.replace(_shallow(config), dropout=0.0, attention_dropout=None)

    def record() -> Calls:
        few, short = smaller(B, model.block_size)
        small = dataclasses.replace(model, block_size=short)
        return _calls(
            _generated(model, dtype, B, int8, [_decode, _decode_pages]),
            _generated(small, dtype, few, int8, [_decode, _decode_pages, _read, _read_pages]),
        )

    return Workload(_name("generation, matrices int8" if int8 else "generation", B, model), dtype, record, compile)


def _shallow(config: ModelConfig) -> ModelConfig:
    """The model with few layers."""
    config = config.architecture()
    return dataclasses.replace(config, vocab_size=config.known_vocab, n_layer=LAYERS)


def _name(work: str, B: int, config: ModelConfig) -> str:
    fields = [f"{name} {value}" for name, value in dataclasses.asdict(config).items() if name != "n_layer"]
    return ", ".join([work, f"B {B}", *fields, f"model {source_hash(Path(__file__).parent)}"])


def _calls(made: Sequence[Call], small: Sequence[Call]) -> Calls:
    """Of the calls that are made most often, the one with the largest tensor is timed, of equals the first."""
    counts = collections.Counter(made)
    timed: dict[str, Call] = {}
    for call in sorted(counts, key=lambda call: (-counts[call], -_largest(call))):
        timed.setdefault(call.op, call)
    checked: dict[str, list[Call]] = {}
    for call in dict.fromkeys(small):
        checked.setdefault(call.op, []).append(call)
    return Calls(timed, checked)


def _largest(call: Call) -> int:
    return max(math.prod(tensor.shape) for _, tensor in call.tensors)


def _trained(config: ModelConfig, dtype: torch.dtype, B: int, pack: bool | None) -> list[Call]:
    """Those of a forward pass over B sequences of whole contexts, or of documents that are packed into them."""
    recorder, shape = Recorder(dtype), (B, config.block_size)
    with META:
        model = GPT(config, recorder.ops)
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(config.known_vocab, shape, generator=generator)
    doc_ids = (torch.rand(shape, generator=generator) < DOCUMENTS / shape[1]).cumsum(1) if pack else None
    with recorder:
        model(_tokens(*shape), targets, doc_ids=doc_ids)
    return recorder.calls()


Pass = Callable[[GPT, int], object]


def _generated(config: ModelConfig, dtype: torch.dtype, B: int, int8: bool, passes: Sequence[Pass]) -> list[Call]:
    """Those of some forward passes over B sequences."""
    recorder = Recorder()
    with META:
        weights = GPT(config).weights()
    model = GPT.from_weights(config, recorder.ops, weights, META, dtype)
    if int8:
        quantize_model(model)
    with torch.no_grad(), recorder:
        for run in passes:
            run(model, B)
    return recorder.calls()


def _decode(model: GPT, B: int) -> None:
    """The context's last token of each sequence."""
    cache = DenseCache(model.config, B, device=META, dtype=model.dtype)
    cache.advance(cache.capacity - 1)
    model(_tokens(B, 1), cache=cache)


def _read(model: GPT, B: int) -> None:
    """Whole contexts."""
    cache = DenseCache(model.config, B, device=META, dtype=model.dtype)
    model(_tokens(B, cache.capacity), cache=cache, last_only=True)


def _decode_pages(model: GPT, B: int) -> None:
    """As `_decode`, from pages."""
    _run_pages(model, [1] * B, decoding=True)


def _read_pages(model: GPT, B: int) -> None:
    """Every other sequence's whole context, and the last token of the others."""
    _run_pages(model, [1 if b % 2 else model.config.block_size for b in range(B)], decoding=False)


def _run_pages(model: GPT, counts: Sequence[int], *, decoding: bool) -> None:
    """The last tokens of sequences at the end of the context, so many of each, as the engine runs them."""
    B, T = len(counts), model.config.block_size
    M = math.ceil(T / PAGE)
    cache = PagedCache(model.config, B * M, PAGE, device=META, dtype=model.dtype)
    table = torch.randperm(B * M, generator=torch.Generator().manual_seed(0)).view(B, M)  # pages lie in any order
    slots = (table[..., None] * PAGE + torch.arange(PAGE)).flatten(1)  # of each position
    new = torch.cat([own[T - count : T] for own, count in zip(slots, counts, strict=True)])
    starts = torch.tensor([*itertools.accumulate(counts, initial=0)], dtype=torch.int32)
    sequences = Sequences(table.int(), torch.full((B,), T, dtype=torch.int32), None if decoding else starts)
    parts = (sequences, None) if decoding else (None, sequences)
    batch = PagedBatch(cache.keys, cache.values, _tokens(len(new)), new, *parts)
    hidden = model.hidden(_tokens(1, len(new)), cache=batch)[0]
    model.logits(hidden[-B:])


def _tokens(*shape: int) -> torch.Tensor:
    """Tokens, or their positions."""
    return torch.empty(shape, dtype=torch.int64, device=META)
