"""Generation: caches, sizes and batches, against the same weights in other engines and against the machine's limit.

On a CPU: the baby shape and GPT-2's, with few tokens. On a GPU: GPT-2 to GPT-2 XL in bfloat16, with longer contexts.
"""

import itertools
import statistics
import string
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from bench.peers.generation import make_peers, own_facts
from bench.tools.generation import (
    cache_bytes,
    continuation,
    engine_facts,
    generator_of,
    profile_step,
    random_tokens,
    stream_facts,
    untrained,
    work,
)
from fastgpt.config.generation import SamplingParams
from fastgpt.config.model import ModelConfig
from fastgpt.generation.engine import Engine
from fastgpt.generation.generator import TextGenerator
from fastgpt.generation.single import Generation
from fastgpt.model.gpt import GPT
from fastgpt.system.device import resolve_weights_dtype, synchronize

PROMPT = "ROMEO:\n"
NEW_TOKENS = 240
REQUESTS, LONGEST = 64, 128
SHARERS, PREFIX = 32, 200
MANY, FEW = 16_000, 1_000  # prompts given together
GROWTH_WINDOW = 12  # tokens around a context whose time is measured
DECODED = 128  # new tokens beside other engines, after a short prompt
SHORT_PROMPT = [464, 2068, 7586, 21831, 18045]
PROFILED = 40  # steps
ON_GPU = torch.cuda.is_available()
SIZES = {"baby": (64, 32), "gpt2": (64, 8)}  # tokens of a case's prompt, and new ones, on a CPU
GPU_SIZES = (512, 256)
GPU_PRESETS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")

only_on_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a CUDA GPU")
only_on_cpu = pytest.mark.skipif(ON_GPU, reason="compares programs for the CPU")


def cases() -> Iterator[tuple[str, str, int | str, bool]]:
    """Preset, cache, batch and whether compiled: one continuation without an engine, or a batch in one."""
    if not ON_GPU:
        for cache, compiled in (("none", False), ("dense", False), ("dense", True), ("paged", True)):
            yield "baby", cache, 1, compiled
        yield from (("baby", "paged", batch, False) for batch in (8, 64, "ragged"))
        yield from (("gpt2", "dense", 1, compiled) for compiled in (False, True))
        yield "gpt2", "paged", 8, False
        return
    for preset in GPU_PRESETS:
        yield from ((preset, cache, 1, False) for cache in ("none", "dense"))
        yield from ((preset, "paged", *each) for each in itertools.product((1, 8, 64, "ragged"), (False, True)))


# What is compared with what, on a CPU: dtype, quantization, rounds, the peer that is the mark, the other peers.
DECODING = {
    "float32": (torch.float32, "none", 2, "llama.cpp f32", ("transformers float32", "ctranslate2 float32")),
    "bfloat16": (torch.bfloat16, "none", 3, "llama.cpp f16", ()),
    "int8": (torch.float32, "int8", 3, "llama.cpp q8_0", ("ctranslate2 int8",)),
}


@pytest.fixture(scope="module")
def model(device: torch.device) -> Callable[[str], GPT]:
    """Untrained models by preset; only the latest is kept."""
    kept: dict[str, GPT] = {}

    def of(preset: str) -> GPT:
        if preset not in kept:
            kept.clear()
            kept[preset] = untrained(preset, device)
        return kept[preset]

    return of


@pytest.fixture(scope="module")
def dtype(device: torch.device) -> torch.dtype:
    return resolve_weights_dtype("auto", device)


@pytest.fixture(scope="module")
def baby(device: torch.device, dtype: torch.dtype) -> TextGenerator:
    return generator_of(untrained("baby", device), dtype)


@pytest.fixture(scope="module")
def compiled_baby(device: torch.device) -> TextGenerator:
    return generator_of(untrained("baby", device), compiled=True)


def text(count: int, seed: int) -> str:
    return "".join(string.ascii_letters[place] for place in random_tokens(count, seed, len(string.ascii_letters)))


@pytest.mark.parametrize(("preset", "cache", "batch", "compiled"), cases())
def test_generation(against, benchmark, model, dtype, preset: str, cache: str, batch: int | str, compiled: bool):
    """Prompts of one length, or ragged: 64 of 1 to that many tokens; as many new tokens for each."""
    gpt = model(preset)
    prompt, new_tokens = GPU_SIZES if ON_GPU else SIZES[preset]
    lengths = [1 + at * (prompt - 1) // 63 for at in range(64)] if isinstance(batch, str) else [prompt] * batch
    prompts = [random_tokens(length, seed, gpt.config.vocab_size) for seed, length in enumerate(lengths)]
    kinds = ["transformers bfloat16", "transformers bfloat16 static"] if ON_GPU else ["transformers float32"]
    peers, left_out = make_peers(kinds, gpt)
    ours, facts = our_side(gpt, dtype, prompts, new_tokens, cache, compiled)
    against(
        ours,
        {name: lambda peer=peer: peer(prompts, new_tokens) for name, peer in peers.items()},
        rounds=5 if ON_GPU or preset == "baby" else 2,
        units=len(prompts) * new_tokens,
        arithmetic=dtype,
        **work(gpt, dtype, lengths, new_tokens, cached=cache != "none"),
        dtype=str(dtype).removeprefix("torch."),
        prompt_tokens=sum(lengths),
        new_tokens=new_tokens,
        cache_bytes=cache_bytes(gpt.config, dtype, cache, [length + new_tokens for length in lengths]),
        left_out=left_out,
    )
    benchmark.extra_info |= facts()


def our_side(
    model: GPT, dtype: torch.dtype, prompts: list[list[int]], new_tokens: int, cache: str, compiled: bool
) -> tuple[Callable[[], object], Callable[[], dict[str, float]]]:
    """A call that continues the prompts, and what is known of its speed after some calls.

    Compiled is the decode step of one sequence on a CPU, and the engine's forward pass on a GPU.
    """
    generator = generator_of(model, dtype, compiled=compiled, batch=len(prompts))
    made = {"compile_seconds": generator.decoder.seconds} if generator.decoder else {}
    if cache == "paged":
        engine = generator.engine(max_batch=len(prompts), prefix_cache=False, compile=compiled and ON_GPU)
        params = SamplingParams(max_new_tokens=new_tokens, temperature=0.0)
        return lambda: engine.generate(prompts, params), lambda: made | engine_facts(engine)
    runs: list[Generation] = []

    def one() -> None:
        runs.append(continuation(generator, prompts[0], new_tokens, cache=cache, temperature=0.0))

    return one, lambda: made | stream_facts(runs[1:])  # without the first, which warms up


@only_on_cpu
@pytest.mark.parametrize("weights", DECODING)
def test_decode_beside_other_engines(against, benchmark, model, weights: str):
    dtype, quantize, rounds, mark, others = DECODING[weights]
    gpt = model("gpt2")
    peers, left_out = make_peers([mark, *others], gpt)
    generator = generator_of(gpt, dtype, quantize=quantize, compiled=True)
    against(
        short_first(lambda count: continuation(generator, SHORT_PROMPT, count, temperature=0.0)),
        {name: short_first(lambda count, peer=peer: peer([SHORT_PROMPT], count)) for name, peer in peers.items()},
        rounds=rounds,
        units=DECODED,
        bytes=work(gpt, dtype, [len(SHORT_PROMPT)], DECODED, quantize=quantize)["bytes"],
        aim=1.0 if mark in peers else None,
        aim_peer=mark if mark in peers else None,
        left_out=left_out,
    )
    benchmark.extra_info |= own_facts(peers) | {"compile_seconds": generator.decoder and generator.decoder.seconds}


def short_first(call: Callable[[int], object]) -> Callable[[], object]:
    """Calls with DECODED tokens, but for the first, which only warms up."""
    counts = itertools.chain([8], itertools.repeat(DECODED))
    return lambda: call(next(counts))


@pytest.mark.parametrize("preset", ["baby", "gpt2"])
def test_where_a_decode_step_goes(benchmark, model, dtype, preset: str):
    """The time of one step by operation; the benchmark's own time is that of a short uncompiled continuation."""
    variants = {"eager": generator_of(model(preset), dtype)}
    if not ON_GPU:
        variants["compiled"] = generator_of(model(preset), dtype, compiled=True)
    prompt = random_tokens(64, 0, model(preset).config.vocab_size)
    benchmark.pedantic(lambda: continuation(variants["eager"], prompt, 8, temperature=0.0), rounds=3, warmup_rounds=1)
    benchmark.extra_info["profile"] = {
        name: profile_step(generator, prompt, PROFILED) for name, generator in variants.items()
    }


@pytest.mark.parametrize("drawn", ["greedy", "sampled"])
def test_dense_cache(against, baby, request: pytest.FixtureRequest, drawn: str):
    """Compiled where one continuation can be, which is on a CPU. Sampling is top-k's, as by default."""
    ours = baby if ON_GPU else request.getfixturevalue("compiled_baby")
    settings = {"temperature": 0.0} if drawn == "greedy" else {}
    peers = {"without a cache": lambda: continuation(baby, PROMPT, NEW_TOKENS, cache="none", **settings)}
    if not ON_GPU:
        peers["not compiled"] = lambda: continuation(baby, PROMPT, NEW_TOKENS, **settings)
    against(
        lambda: continuation(ours, PROMPT, NEW_TOKENS, **settings),
        peers,
        rounds=5 if ON_GPU else 2,
        units=NEW_TOKENS,
        aim=None if ON_GPU else 12,
        aim_peer="without a cache",
    )


@only_on_cpu
def test_baby_beside_other_engines(against, benchmark, device, compiled_baby):
    names = ["transformers float32", "ctranslate2 float32", "llama.cpp f32"]
    peers, left_out = make_peers(names, untrained("baby", device))
    prompt = list(PROMPT.encode())
    wanted = "transformers float32" if "transformers float32" in peers else None
    against(
        lambda: continuation(compiled_baby, prompt, NEW_TOKENS, temperature=0.0),
        {name: lambda peer=peer: peer([prompt], NEW_TOKENS) for name, peer in peers.items()},
        rounds=5,
        units=NEW_TOKENS,
        **work(compiled_baby.model, torch.float32, [len(prompt)], NEW_TOKENS),
        aim=2.5 if wanted else None,
        aim_peer=wanted,
        left_out=left_out,
    )
    benchmark.extra_info |= own_facts(peers)


def test_paged_against_dense_at_batch_1(against, baby):
    engine, params = baby.engine(), SamplingParams(max_new_tokens=NEW_TOKENS)
    against(
        lambda: engine.generate([PROMPT], params),
        {"dense cache": lambda: continuation(baby, PROMPT, NEW_TOKENS)},
        rounds=7,
        units=NEW_TOKENS,
        aim=0.9,
    )


@pytest.mark.parametrize("ragged", ["prompts", "prompts and continuations"])
def test_ragged_requests_against_one_by_one(against, baby, ragged: str):
    """Prompts of 1 to LONGEST tokens, and LONGEST new ones, or also 1 to LONGEST of them."""
    lengths = torch.randint(1, LONGEST + 1, (REQUESTS, 2), generator=torch.Generator().manual_seed(1)).tolist()
    prompts = [text(length, seed) for seed, (length, _) in enumerate(lengths)]
    counts = [LONGEST if ragged == "prompts" else count for _, count in lengths]
    each = [SamplingParams(max_new_tokens=count) for count in counts]
    engine = baby.engine(max_batch=REQUESTS, prefix_cache=False)

    def one_by_one() -> None:
        for prompt, count in zip(prompts, counts, strict=True):
            continuation(baby, prompt, count)

    against(
        lambda: engine.generate(prompts, each),
        {"one by one, dense cache": one_by_one},
        rounds=3 if ON_GPU else 1,
        units=sum(counts),
        aim=4,
    )


def test_many_prompts_cost_each_what_few_do(against, device):
    """A tiny model, so that what the engine does for each prompt is most of the time."""
    shape = {"n_layer": 1, "n_head": 1, "n_embd": 32, "block_size": 32}
    with device:
        model = GPT(ModelConfig(vocab_size=256, **shape)).eval()
    engine, params = Engine(model, kv_memory=64 << 20), SamplingParams(max_new_tokens=1)
    prompts = [random_tokens(8, seed, 256) for seed in range(MANY)]
    few = [prompts[i : i + FEW] for i in range(0, MANY, FEW)]
    against(
        lambda: engine.generate(prompts, params),
        {f"{FEW:,} prompts at a time": lambda: [engine.generate(part, params) for part in few]},
        rounds=3,
        units=MANY,
        unit="prompts",
        aim=0.9,
    )


def test_prefill_of_a_shared_prefix(against, baby):
    prompts = [text(PREFIX, 0) + text(8, seed) for seed in range(SHARERS)]
    params = SamplingParams(max_new_tokens=1)

    def prefill(prefix_cache: bool) -> Callable[[], None]:
        engine = baby.engine(prefix_cache=prefix_cache)

        def run() -> None:
            engine.scheduler.allocator.forget()  # or the round before would have done all the work
            engine.generate(prompts, params)

        return run

    tokens = SHARERS * (PREFIX + 8)
    against(prefill(True), {"without reuse": prefill(False)}, rounds=5, units=tokens, aim=5)


def test_time_per_token_as_the_context_grows(benchmark, baby):
    """Seconds a token around context 16 and around context 256, in the same generations."""
    engine, params = baby.engine(), SamplingParams(max_new_tokens=NEW_TOKENS + GROWTH_WINDOW)
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
    """The time of each step of one continuation; the first reads the prompt."""
    engine.submit(prompt, params)
    seconds = []
    while engine.busy:
        began = time.perf_counter()
        engine.step()
        synchronize(engine.runner.device)
        seconds.append(time.perf_counter() - began)
    return seconds


@only_on_gpu
@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_gpt2_paged_against_dense_at_batch_1(against, model, kernels: str):
    generator = generator_of(model("gpt2"), torch.bfloat16, kernels=kernels)
    engine, params = generator.engine(prefix_cache=False), SamplingParams(max_new_tokens=DECODED)
    against(
        lambda: engine.generate([[97]], params),
        {"dense cache": lambda: continuation(generator, [97], DECODED)},
        rounds=5,
        units=DECODED,
        aim=0.97,
    )


@only_on_gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_gpt2_against_transformers(against, model, compiled: bool):
    gpt = model("gpt2")
    eager = "transformers bfloat16"
    peers, left_out = make_peers([eager, "transformers bfloat16 static"], gpt)
    engine = generator_of(gpt, torch.bfloat16, kernels="triton").engine(prefix_cache=False, compile=compiled)
    params = SamplingParams(max_new_tokens=2 * DECODED, temperature=0.0)
    against(
        lambda: engine.generate([[97]], params),
        {name: lambda peer=peer: peer([[97]], 2 * DECODED) for name, peer in peers.items()},
        rounds=5,
        units=2 * DECODED,
        arithmetic=torch.bfloat16,
        **work(gpt, torch.bfloat16, [1], 2 * DECODED),
        aim=10 if eager in peers else None,
        aim_peer=eager if eager in peers else None,
        left_out=left_out,
    )
