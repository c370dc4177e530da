"""The host's work for a decode step: planning, preparing its inputs, giving out its tokens.

Nothing is computed or launched. Stand-ins take the place of the CUDA graph with the copy of its inputs, of the copy of
changed entries into the block tables, and of the sampler, which always draws the same token. What is left is all else
of `Engine.step`: the scheduler's plan, new pages and their hashes for the prefix cache, which entries have changed, the
graph's inputs, and each sequence's new token and its piece, as ids or as text.
"""

import itertools
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch

from bench.tools.generation import random_tokens
from fastgpt.config.generation import SamplingParams
from fastgpt.config.model import ModelConfig
from fastgpt.generation.engine import Engine
from fastgpt.generation.runner import DecodeGraph, Runner, graph_sizes
from fastgpt.generation.sampler import Drawn
from fastgpt.model.gpt import GPT
from fastgpt.model.kv_cache import page_bytes
from fastgpt.tokenizer.byte import ByteTokenizer

VOCABULARY = 256
STEPS, WARM_UP = 1000, 50
AIM_SECONDS = {1: 60e-6, 64: 150e-6}
CONTEXTS = (64, 32_000)


class NoLaunches(DecodeGraph):
    """A graph that is neither captured nor replayed."""

    def __init__(self, runner: Runner, size: int):
        runner.graph_pool = SimpleNamespace(capture=lambda run: (None, torch.zeros(size, VOCABULARY)))
        super().__init__(runner, size)

    def launch(self) -> None:
        pass


class OneToken:
    """Stands in for a `Sampler`, and for what it draws."""

    def __init__(self, slots: int):
        self.drawn = [Drawn(97)] * slots

    def begin(self, slot: int, *_: object, **__: object) -> None:
        pass

    def __call__(self, logits: torch.Tensor, slots: Sequence[int], indices: Sequence[int]) -> "OneToken":
        return self

    def to_host(self) -> list[Drawn]:
        return self.drawn


def engine_of(B: int, context: int, text: bool) -> Engine:
    """An engine whose B sequences have read their prompts and decode."""
    block = context + STEPS + WARM_UP + 10
    config = ModelConfig(vocab_size=VOCABULARY, block_size=block, n_layer=1, n_head=1, n_embd=4)
    engine = Engine(
        GPT(config).eval(),
        ByteTokenizer() if text else None,
        max_batch=B,
        max_batch_tokens=B * context,
        kv_memory=B * (block // 16 + 1) * page_bytes(config, 16, torch.float32),
    )
    logits = torch.zeros(B, VOCABULARY)
    engine.runner.forward = lambda tokens, step, rows: logits
    engine.runner.graph_sizes = [size := graph_sizes(B)[-1]]
    engine.runner.graphs[size] = NoLaunches(engine.runner, size)
    engine.runner.tables.launch = lambda entries: None
    engine.sampler = OneToken(B)
    for seed in range(B):  # of uneven lengths, so that their pages end in different steps
        prompt = random_tokens(context - seed % 16, seed, VOCABULARY)
        engine.submit(prompt, SamplingParams(max_new_tokens=STEPS + WARM_UP + 2, temperature=0.0))
    engine.step()
    return engine


@pytest.mark.parametrize(
    ("B", "context", "given"), [*itertools.product(AIM_SECONDS, CONTEXTS, ["ids"]), (1, 64, "text"), (64, 64, "text")]
)
def test_host_time_of_a_decode_step(benchmark, B: int, context: int, given: str):
    engine = engine_of(B, context, given == "text")
    benchmark.extra_info |= {"aim_seconds": AIM_SECONDS[B], "sequences": B}
    benchmark.pedantic(engine.step, rounds=STEPS, warmup_rounds=WARM_UP)
    assert len(engine.scheduler.running) == B
