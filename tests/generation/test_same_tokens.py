"""Whatever the engine does to be fast, each request's tokens are those of a plain loop without a cache."""

import dataclasses
import random
from collections.abc import Sequence

import pytest
import torch

from fastgpt.config.generation import SamplingParams
from fastgpt.generation.generator import TextGenerator
from fastgpt.generation.request import Completion
from fastgpt.generation.single import Generation
from fastgpt.model.gpt import GPT
from fastgpt.ops import table
from tests.helpers.covering import some
from tests.helpers.engines import answer, pages, watched
from tests.helpers.untrained import fresh

BLOCK = 32
VOCAB = 11
SHAPES = {
    "grouped queries": {"n_head": 4, "n_kv_head": 2},
    "one kv head, no bias": {"n_head": 4, "n_kv_head": 1, "bias": False},
    "rotary": {"position": "rotary"},
    "sinusoidal": {"position": "sinusoidal", "n_head": 4, "n_kv_head": 2},
    "none": {"position": "none"},
    "modern": {
        "position": "rotary",
        "norm": "rmsnorm",
        "norm_gain": False,
        "qk_norm": True,
        "mlp": "swiglu",
        "n_head": 4,
        "n_kv_head": 2,
        "head_size": 6,
        "tie": False,
        "logit_softcap": 15.0,
        "bias": False,
    },
}
# How the engine may run, and which of its means must then have been used.
MODES = {
    "batched": ({}, ()),
    "one at a time": ({"max_batch": 1}, ()),
    "chunked": ({"max_batch_tokens": 20}, ()),
    "pages of 1": ({"page_size": 1}, ("hits",)),
    "pages of 8": ({"page_size": 8}, ("hits",)),
    "no prefix cache": ({"prefix_cache": False}, ("misses",)),
    "preempted": ({"room": 9, "page_size": 4, "max_batch": 7}, ("preemptions", "hits")),
    "speculative": ({"speculate": "ngram"}, ("accepted",)),
    "all of it": (
        {"speculate": "ngram", "room": 37, "page_size": 1, "max_batch": 12, "max_batch_tokens": 26},
        ("accepted", "preemptions", "hits"),
    ),
    "all of it, no prefix cache": (
        {
            "speculate": "ngram",
            "room": 8,
            "page_size": 4,
            "max_batch": 8,
            "max_batch_tokens": 18,
            "prefix_cache": False,
        },
        ("accepted", "preemptions", "misses"),
    ),
}


def ragged(count: int, seed: int = 0, longest: int = BLOCK) -> list[list[int]]:
    """Prompts of random lengths; some begin alike, some repeat themselves, some are equal."""
    rng = random.Random(seed)
    shared = [rng.choices(range(VOCAB), k=longest) for _ in range(4)]
    prompts = []
    for n in range(count):
        length = rng.choice([1, longest - 1, longest, *[rng.randint(1, longest)] * 9])
        fixed = rng.choices(range(VOCAB), k=length)
        if n % 4 == 1:
            alike = rng.randint(0, length)
            fixed[:alike] = rng.choice(shared)[:alike]
        elif n % 4 == 2:
            fixed = (rng.choices(range(VOCAB), k=rng.randint(1, 3)) * length)[:length]
        elif n % 16 == 3:
            fixed = list(prompts[rng.randrange(n)])
        prompts.append(fixed)
    return prompts


def greedy(count: int, seed: int = 0) -> list[SamplingParams]:
    rng = random.Random(seed)
    return [SamplingParams(temperature=0, max_new_tokens=rng.randint(1, 10)) for _ in range(count)]


def sampled(count: int, seed: int = 0) -> list[SamplingParams]:
    """Settings of every kind, each request with its own."""
    rng = random.Random(seed)
    return [
        SamplingParams(
            max_new_tokens=rng.randint(1, 12),
            temperature=rng.choice([0.0, 0.5, 1.0, 3.0]),
            top_k=rng.choice([0, 1, 3, 200]),
            top_p=rng.choice([None, 0.5, 0.95]),
            min_p=rng.choice([None, None, 0.1]),
            repetition_penalty=rng.choice([1.0, 1.0, 1.3, 5.0]),
            presence_penalty=rng.choice([0.0, 0.0, 4.0]),
            frequency_penalty=rng.choice([0.0, 0.0, 2.5]),
            stop=rng.choice([(), (), ("ab", "c"), ("hg",), ("j\n",)]),
            stop_tokens=rng.choice([(), (), (3,)]),
            logprobs=rng.choice([None, 0, 3]),
            seed=rng.randrange(2**63),
        )
        for _ in range(count)
    ]


def one_by_one(
    generator: TextGenerator, prompts: Sequence[list[int]], params: Sequence[SamplingParams], cache: str
) -> list[Completion]:
    """The plain loop; its logits come from whole forward passes with cache "none"."""
    found, parts = [], (generator.model, generator.tokenizer)
    given = [(prompt, one.seed) for prompt, one in zip(prompts, params, strict=True)]
    for index, ((prompt, _), one) in enumerate(zip(given, params, strict=True)):
        equal = given[:index].count(given[index])
        for sample in range(one.num_samples):
            stream = Generation(*parts, list(prompt), one, cache, occurrence=equal, sample=sample)
            found.append(stream.completion(index, sample))
    return found


def outcome(completion: Completion) -> tuple:
    which, said = (completion.index, completion.sample), (completion.tokens, completion.text)
    return *which, *said, completion.finish_reason, completion.error


def assert_same(found: Sequence[Completion], wanted: Sequence[Completion]) -> None:
    assert [outcome(one) for one in found] == [outcome(one) for one in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert (one.logprobs is None) == (other.logprobs is None)
        for (own, top), (own_too, top_too) in zip(one.logprobs or [], other.logprobs or [], strict=True):
            # Of two that are all but equal, rounding may put either first.
            assert [own, *(p for _, p in top)] == pytest.approx([own_too, *(p for _, p in top_too)], abs=1e-3)


def engine_of(generator: TextGenerator, *, room: int | None = None, **options):
    """A watched engine; `room`: its pages."""
    memory = pages(generator, room or 2000, options.get("page_size", 16))
    return watched(generator.engine(kv_memory=memory, **{"slide": True} | options))


def assert_used(engine, means: Sequence[str]) -> None:
    counts = {
        "hits": engine.scheduler.hits > 0,
        "misses": engine.scheduler.hits == 0,
        "preemptions": engine.scheduler.preemptions > 0,
        "accepted": 0 < engine.stats.accepted < engine.stats.proposed,
    }
    assert [name for name in means if not counts[name]] == []


@pytest.fixture(scope="module")
def generator() -> TextGenerator:
    return fresh(block_size=BLOCK)


@pytest.fixture(scope="module")
def truth(generator: TextGenerator) -> tuple[list[list[int]], list[SamplingParams], list[Completion]]:
    """100 random ragged requests, and their tokens."""
    prompts, params = ragged(100), greedy(100)
    found = one_by_one(generator, prompts, params, "none")
    assert len({tuple(one.tokens) for one in found}) > 40
    assert sum(len(set(one.tokens)) > 1 for one in found) > 50
    return prompts, params, found


@pytest.fixture(scope="module")
def drawn(generator: TextGenerator) -> tuple[list[list[int]], list[SamplingParams], list[Completion]]:
    """80 sampled requests, each with settings of its own."""
    prompts, params = ragged(80, seed=1), sampled(80)
    found = one_by_one(generator, prompts, params, "none")
    assert {one.finish_reason for one in found} == {"stop", "length"}
    return prompts, params, found


@pytest.fixture(scope="module")
def repeated(generator: TextGenerator) -> tuple[list[list[int]], list[SamplingParams], list[Completion]]:
    """40 requests of one seed, most of them equal to others, some for several continuations."""
    rng, few = random.Random(5), ragged(6, seed=5)
    prompts = rng.choices(few, k=40)
    some = SamplingParams(max_new_tokens=6, temperature=1.5, top_k=0)
    params = [dataclasses.replace(some, num_samples=rng.choice([1, 1, 1, 4])) for _ in prompts]
    found = one_by_one(generator, prompts, params, "none")
    assert len({tuple(one.tokens) for one in found}) > 0.9 * len(found) > 60
    return prompts, params, found


@pytest.mark.slow
def test_the_dense_cache(generator: TextGenerator, truth, drawn, repeated):
    for prompts, params, wanted in (truth, drawn, repeated):
        assert_same(one_by_one(generator, prompts, params, "dense"), wanted)


@pytest.mark.parametrize("mode", some(2, [*MODES]))
def test_the_engine(generator: TextGenerator, truth, mode: str):
    options, means = MODES[mode]
    prompts, params, wanted = truth
    engine = engine_of(generator, **options)
    assert_same(answer(engine, prompts, params), wanted)
    assert_used(engine, means)


@pytest.mark.parametrize("mode", some(2, [*MODES]))
def test_sampled_requests(generator: TextGenerator, drawn, mode: str):
    options, means = MODES[mode]
    prompts, params, wanted = drawn
    engine = engine_of(generator, **options)
    assert_same(answer(engine, prompts, params), wanted)
    assert_used(engine, [name for name in means if name != "accepted"])


@pytest.mark.parametrize("mode", some(2, [*MODES]))
def test_equal_prompts_and_several_continuations(generator: TextGenerator, repeated, mode: str):
    prompts, params, wanted = repeated
    assert_same(answer(engine_of(generator, **MODES[mode][0]), prompts, params), wanted)


@pytest.mark.parametrize("shape", some(2, [*SHAPES]))
def test_other_shapes(shape: str):
    generator = fresh(**{"block_size": BLOCK, **SHAPES[shape]})
    prompts, params = ragged(24, seed=2), [*greedy(12), *sampled(12)]
    wanted = one_by_one(generator, prompts, params, "none")
    assert_same(one_by_one(generator, prompts, params, "dense"), wanted)
    for mode in ("pages of 8", "chunked", "all of it"):
        assert_same(answer(engine_of(generator, **MODES[mode][0]), prompts, params), wanted)


@pytest.mark.parametrize("mode", ["preempted", "all of it"])
def test_without_sliding_the_same_tokens_end_with_the_context(generator: TextGenerator, truth, mode: str):
    prompts, params, wanted = truth
    cut = []
    for prompt, one in zip(prompts, wanted, strict=True):
        tokens = one.tokens[: BLOCK + 1 - len(prompt)]
        cut.append(dataclasses.replace(one, tokens=tokens, text=generator.tokenizer.decode(tokens)))
    assert sum(len(short.tokens) < len(one.tokens) for short, one in zip(cut, wanted, strict=True)) > 20
    assert_same(answer(engine_of(generator, slide=False, **MODES[mode][0]), prompts, params), cut)


def test_what_was_cached_by_earlier_requests_changes_nothing(generator: TextGenerator, drawn):
    """Also where old pages are given up for new ones all the time."""
    prompts, params, wanted = drawn
    for room, least in ((2000, 800), (40, 1)):
        engine = engine_of(generator, room=room, page_size=4, max_batch=4)
        for _ in range(2):
            before = engine.scheduler.hits
            found = answer(engine, prompts, params)
            first = found[0].index
            assert_same([dataclasses.replace(one, index=one.index - first) for one in found], wanted)
        assert engine.scheduler.hits - before > least


def test_requests_that_come_while_others_run(generator: TextGenerator, drawn):
    prompts, params, wanted = drawn
    engine, rng, found = engine_of(generator, room=30, page_size=4, max_batch=5), random.Random(3), []
    jobs = list(zip(prompts, params, strict=True))
    while jobs or engine.busy:
        for _ in range(min(len(jobs), rng.randint(0, 3))):
            engine.submit(*jobs.pop(0))
        found += [piece.completion for piece in engine.step() if piece.completion]
    assert_same(sorted(found, key=lambda one: one.index), wanted)


def test_neighbours_that_are_cancelled_change_nothing(generator: TextGenerator, drawn):
    prompts, params, wanted = drawn
    engine, rng, found = engine_of(generator, room=30, page_size=4, max_batch=6), random.Random(4), {}
    for prompt, one in zip(prompts, params, strict=True):
        engine.submit(prompt, one)
    while engine.busy:
        if rng.random() < 0.2 and engine.scheduler.running:
            queued = [*engine.scheduler.running, *engine.scheduler.waiting]
            engine.cancel(rng.choice(queued).order[0])
        found |= {piece.index: piece.completion for piece in engine.step() if piece.completion}
    assert len(found) == len(wanted)
    ended = {index: one for index, one in found.items() if one.finish_reason != "cancelled"}
    assert 20 < len(ended) < len(wanted)
    assert_same(list(dict(sorted(ended.items())).values()), [wanted[index] for index in sorted(ended)])
    for index in found.keys() - ended.keys():  # cut short, and otherwise the same
        assert found[index].tokens == wanted[index].tokens[: len(found[index].tokens)]


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_on_a_gpu(kernels: str, graphs: bool, mode: str):
    """In float32, against the loop of whole forward passes on the CPU."""
    cpu = fresh(block_size=BLOCK, n_embd=64, n_head=4, n_kv_head=2)
    model = GPT(cpu.model.config, table.resolve(kernels, "cuda"))
    model.load_state_dict(cpu.model.state_dict())
    options, means = MODES[mode]
    prompts, params = ragged(200), greedy(200)
    engine = engine_of(TextGenerator(model.cuda().eval(), cpu.tokenizer), cuda_graphs=graphs, **options)
    assert_same(answer(engine, prompts, params), one_by_one(cpu, prompts, params, "none"))
    assert_used(engine, [name for name in means if name != "accepted"])
    assert torch.backends.cuda.matmul.allow_tf32 is False
