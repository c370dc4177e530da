"""Random numbers: independent between any two continuations, and the same wherever one of them is computed."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from fastgpt.config.generation import SamplingParams
from fastgpt.generation.generator import TextGenerator
from fastgpt.generation.random_stream import Occurrences, prompt_digest, stream_key, uniform
from fastgpt.generation.single import Generation
from tests.helpers.engines import answer, pages, watched
from tests.helpers.untrained import fresh

BLOCK = 32
DRAWN = SamplingParams(max_new_tokens=8, temperature=1.5, top_k=0, seed=5)


@pytest.fixture(scope="module")
def generator() -> TextGenerator:
    return fresh(block_size=BLOCK)


@pytest.fixture
def engine(generator: TextGenerator):
    return watched(generator.engine(kv_memory=pages(generator, 200), slide=True))


def plain(generator: TextGenerator, prompt: str, params: SamplingParams = DRAWN, **which: int) -> list[int]:
    """The tokens of a loop without a cache; `which`: its occurrence and sample."""
    stream = Generation(generator.model, generator.tokenizer, prompt, params, "none", **which)
    return list(stream.tokens())


def test_everything_that_tells_two_draws_apart_changes_the_number():
    prompts = [prompt_digest(tokens) for tokens in ([1], [1, 1], [1, 2], [2**40])]
    ways = itertools.product(prompts, (0, 1, 2**63 - 1), (0, 1), (0, 1))
    keys = [stream_key(*way) for way in ways]
    numbers = [uniform(key, index) for key in keys for index in (0, 1, 500)]
    assert len(set(numbers)) == len(numbers) == 4 * 3 * 2 * 2 * 3


@pytest.mark.parametrize("which", ["prompt", "seed", "occurrence", "sample", "index"])
def test_neighbours_draw_independent_numbers(which: str):
    """0.289 is the standard deviation of the uniform distribution; neighbours are uncorrelated."""

    def number(i: int) -> float:
        told = dict.fromkeys(("prompt", "seed", "occurrence", "sample", "index"), 0) | {which: i}
        key = stream_key(prompt_digest([told["prompt"]]), told["seed"], told["occurrence"], told["sample"])
        return uniform(key, told["index"])

    numbers = np.array([number(i) for i in range(4000)])
    assert numbers.std() == pytest.approx(12**-0.5, abs=0.01)
    assert abs(np.corrcoef(numbers[1:], numbers[:-1])[0, 1]) < 0.05


def test_equal_prompts_with_equal_seeds_are_numbered():
    equal = Occurrences()
    one, other = prompt_digest([1, 2]), prompt_digest([1])
    given = [(one, 7), (other, 7), (one, 8), (one, 7), (other, 7), (one, 7)]
    assert [equal.number(*each) for each in given] == [0, 0, 0, 1, 1, 2]


def test_prompts_of_a_batch_draw_independent_tokens():
    """Where in its distribution each first token lies; the same number for all gave a deviation of 0.001."""
    generator = fresh(chars=None, n_layer=1, block_size=8)
    prompts = [[i, (7 * i) % 256] for i in range(200)]
    found = generator.engine(kv_memory=1 << 20).generate(prompts, dataclasses.replace(DRAWN, max_new_tokens=1))
    with torch.no_grad():
        shares = (generator.model(torch.tensor(prompts))[:, -1].double() / DRAWN.temperature).softmax(-1)
    ends = shares.cumsum(-1)
    middles = torch.stack([ends[i, one.tokens[0]] - shares[i, one.tokens[0]] / 2 for i, one in enumerate(found)])
    assert 0.25 < middles.std() < 0.32


def test_seeds_one_apart_share_no_continuation(engine):
    texts = [
        {one.text for one in engine.generate(["abc"], dataclasses.replace(DRAWN, num_samples=8, seed=seed))}
        for seed in (1, 2)
    ]
    assert [len(each) for each in texts] == [8, 8]
    assert not texts[0] & texts[1]


def test_one_call_numbers_equal_prompts_whatever_stands_between(generator: TextGenerator, engine):
    """Text and token ids that are the same tokens count as equal."""
    encoded = generator.tokenizer.encode("abc").tolist()
    found = [one.tokens for one in answer(engine, ["abc", "b", encoded, "b", "abc"], DRAWN)]
    assert found == [
        *(plain(generator, "abc", occurrence=0), plain(generator, "b", occurrence=0)),
        *(plain(generator, "abc", occurrence=1), plain(generator, "b", occurrence=1)),
        plain(generator, "abc", occurrence=2),
    ]
    assert len({tuple(tokens) for tokens in found}) == 5
    longer = [one.tokens for one in answer(engine, ["abc", "a", "b", encoded, "j", "b", "abc"], DRAWN)]
    assert [longer[i] for i in (0, 2, 3, 5, 6)] == found


def test_a_seed_of_its_own_is_an_equal_prompts_own_stream(generator: TextGenerator, engine):
    each = [dataclasses.replace(DRAWN, seed=seed) for seed in (1, 2, 1)]
    found = [one.tokens for one in answer(engine, ["abc"] * 3, each)]
    assert found == [plain(generator, "abc", one, occurrence=n) for one, n in zip(each, (0, 0, 1), strict=True)]


def test_across_calls_nothing_is_numbered(generator: TextGenerator, engine):
    first, second = (answer(engine, ["abc", "abc"], DRAWN) for _ in range(2))
    assert [one.tokens for one in first] == [one.tokens for one in second]
    for _ in range(3):
        engine.submit("abc", DRAWN)
    done = []
    while engine.busy:
        done += [piece.completion.tokens for piece in engine.step() if piece.completion]
    assert done == [first[0].tokens] * 3


@pytest.mark.parametrize("options", [{}, {"max_batch": 1}, {"page_size": 4, "room": 10}], ids=str)
def test_continuations_that_are_not_wanted_change_none_that_are(generator: TextGenerator, options: dict):
    memory = pages(generator, options.pop("room", 200), options.get("page_size", 16))
    engine = watched(generator.engine(kv_memory=memory, **options))
    prompts, params = ["abc", "b", "abc", "abc"], dataclasses.replace(DRAWN, num_samples=3)
    whole = {(one.index, one.sample): one.tokens for one in answer(engine, prompts, params)}
    assert len({tuple(tokens) for tokens in whole.values()}) == 12
    wanted = [[], [1], [0, 2], [2]]
    pieces = engine.stream(prompts, params, wanted=wanted)
    some = {(p.index, p.sample): p.completion.tokens for p in pieces if p.completion}
    assert some == {(i, n): whole[i, n] for i, numbers in enumerate(wanted) for n in numbers}


def test_the_stream_is_that_of_the_whole_prompt_also_where_the_window_slides(generator: TextGenerator, engine):
    long, end = "abcdefghij" * 9, ("abcdefghij" * 9)[-BLOCK:]
    found = [one.tokens for one in answer(engine, [long, end], DRAWN)]
    assert found == [plain(generator, long), plain(generator, end)]
    assert found[0] != found[1]
