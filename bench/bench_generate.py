"""Generation at the baby shape: the dense cache against none, and the engine's paged cache against the dense one."""

import dataclasses
import statistics
import string
import time
from collections.abc import Callable

import pytest
import torch

from fastgpt import dispatch
from fastgpt.config import PRESETS, SamplingParams
from fastgpt.device import resolve_device, resolve_weights_dtype, synchronize
from fastgpt.engine import Engine
from fastgpt.generate import TextGenerator
from fastgpt.model import GPT
from fastgpt.tokenizer import ByteTokenizer

PROMPT = "ROMEO:\n"
NEW_TOKENS = 240
REQUESTS, LONGEST = 64, 128
SHARERS, PREFIX = 32, 200
GROWTH_WINDOW = 12  # tokens around a context whose time is measured


@pytest.fixture(scope="module")
def generator() -> TextGenerator:
    torch.manual_seed(0)
    device = resolve_device("auto")
    config = dataclasses.replace(PRESETS["baby"], vocab_size=256)
    ops, dtype = dispatch.resolve("auto", device), resolve_weights_dtype("auto", device)
    return TextGenerator(GPT.from_weights(config, ops, GPT(config).weights(), device, dtype), ByteTokenizer())


def text(count: int, seed: int) -> str:
    places = torch.randint(len(string.ascii_letters), (count,), generator=torch.Generator().manual_seed(seed))
    return "".join(string.ascii_letters[place] for place in places.tolist())


def one(generator: TextGenerator, cache: str, prompt: str, count: int) -> None:
    for _ in generator.stream(prompt, cache=cache, max_new_tokens=count):
        pass


def test_dense_cache(against, generator):
    ours, peer = (lambda c=c: one(generator, c, PROMPT, NEW_TOKENS) for c in ("dense", "none"))
    against(ours, peer, rounds=5, units=NEW_TOKENS, peer_name="without a cache", aim=10)


def test_paged_against_dense_at_batch_1(against, generator):
    engine, params = generator.engine(), SamplingParams(max_new_tokens=NEW_TOKENS)
    against(
        lambda: engine.generate([PROMPT], params),
        lambda: one(generator, "dense", PROMPT, NEW_TOKENS),
        rounds=11,
        units=NEW_TOKENS,
        peer_name="dense cache",
        aim=0.9,
    )


@pytest.mark.parametrize("ragged", ["prompts", "prompts and continuations"])
def test_ragged_requests_against_one_by_one(against, generator, ragged: str):
    """Prompts of 1 to LONGEST tokens, and LONGEST new ones, or also 1 to LONGEST of them."""
    lengths = torch.randint(1, LONGEST + 1, (REQUESTS, 2), generator=torch.Generator().manual_seed(1)).tolist()
    prompts = [text(length, seed) for seed, (length, _) in enumerate(lengths)]
    counts = [LONGEST if ragged == "prompts" else count for _, count in lengths]
    each = [SamplingParams(max_new_tokens=count) for count in counts]
    engine = generator.engine(max_batch=REQUESTS, prefix_cache=False)

    def one_by_one() -> None:
        for prompt, params in zip(prompts, each, strict=True):
            one(generator, "dense", prompt, params.max_new_tokens)

    against(
        lambda: engine.generate(prompts, each),
        one_by_one,
        rounds=3,
        units=sum(counts),
        peer_name="one by one, dense cache",
        aim=4,
    )


def test_prefill_of_a_shared_prefix(against, generator):
    prompts = [text(PREFIX, 0) + text(8, seed) for seed in range(SHARERS)]
    params = SamplingParams(max_new_tokens=1)

    def prefill(prefix_cache: bool) -> Callable[[], None]:
        engine = generator.engine(prefix_cache=prefix_cache)

        def run() -> None:
            engine.scheduler.allocator.forget()  # or the round before would have done all the work
            engine.generate(prompts, params)

        return run

    tokens = SHARERS * (PREFIX + 8)
    against(prefill(True), prefill(False), rounds=7, units=tokens, peer_name="without reuse", aim=5)


def test_time_per_token_as_the_context_grows(benchmark, generator):
    """Seconds a token around context 16 and around context 256, in the same generations."""
    engine, params = generator.engine(), SamplingParams(max_new_tokens=NEW_TOKENS + GROWTH_WINDOW)
    early, late = [], []

    def generate() -> None:
        seconds = step_seconds(engine, text(4, 0), params)
        early.append(statistics.median(seconds[16 - 4 - GROWTH_WINDOW // 2 :][:GROWTH_WINDOW]))
        late.append(statistics.median(seconds[256 - 4 - GROWTH_WINDOW :][:GROWTH_WINDOW]))

    benchmark.pedantic(generate, rounds=7, warmup_rounds=1)
    benchmark.extra_info |= {
        "milliseconds_at_16": statistics.median(early) * 1e3,
        "milliseconds_at_256": statistics.median(late) * 1e3,
        "growth": statistics.median(b / a for a, b in zip(early, late, strict=True)),
        "aim_below": 1.5,
    }


def step_seconds(engine: Engine, prompt: str, params: SamplingParams) -> list[float]:
    """How long each step of one continuation takes; the first reads the prompt."""
    engine.submit(prompt, params)
    seconds = []
    while engine.busy:
        began = time.perf_counter()
        engine.step()
        synchronize(engine.runner.device)
        seconds.append(time.perf_counter() - began)
    return seconds
