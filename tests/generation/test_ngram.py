"""Guesses from the text itself: what is proposed, and that checking them costs fewer steps and changes no token."""

import dataclasses
import random

import pytest
import torch

from fastgpt.config.generation import SamplingParams
from fastgpt.generation.engine import DRAFTS
from fastgpt.generation.generator import TextGenerator
from fastgpt.generation.ngram import NgramProposer
from tests.helpers.engines import answer, pages, watched
from tests.helpers.untrained import fresh

BLOCK = 64
GREEDY = SamplingParams(temperature=0, max_new_tokens=50)
PROMPT = "a"


@pytest.fixture(scope="module")
def generator() -> TextGenerator:
    return fresh(block_size=BLOCK)


@pytest.fixture(scope="module")
def dull() -> TextGenerator:
    """A model that always says the same, so that each guess is right."""
    generator = fresh(block_size=BLOCK)
    with torch.no_grad():
        for name, parameter in generator.model.named_parameters():
            parameter.mul_(0.0 if "wpe" in name or "c_proj" in name else 1.0)
    return generator


def plain_lookup(tokens: list[int], most: int) -> list[int]:
    """What followed the last place where the longest end of 4 to 2 tokens stood before, by searching it all."""
    for n in (4, 3, 2):
        for end in range(len(tokens) - 1, n - 1, -1):
            if len(tokens) > n and tokens[end - n : end] == tokens[-n:]:
                text = list(tokens)
                for place in range(end, end + most):
                    text.append(text[place])  # perhaps a guess itself
                return text[len(tokens) :]
    return []


@pytest.mark.parametrize(
    ("tokens", "most", "wanted"),
    [
        ([], 5, []),
        ([1], 5, []),
        ([1, 2], 5, []),
        ([1, 1], 5, []),
        ([1, 1, 1], 5, [1, 1, 1, 1, 1]),
        ([1, 2, 3, 1, 2], 5, [3, 1, 2, 3, 1]),
        ([1, 2, 3, 1, 2], 2, [3, 1]),
        ([1, 2, 3, 1, 2], 0, []),
        ([1, 2, 3, 1, 2], -3, []),
        ([1, 2, 3, 1, 2, 4, 1, 2], 1, [4]),  # the last time
        ([7, 1, 2, 3, 8, 1, 2, 4, 7, 1, 2], 1, [3]),  # the longest end first
        ([1, 2, 3, 4, 5], 5, []),
    ],
)
def test_what_followed_the_last_time_is_proposed(tokens: list[int], most: int, wanted: list[int]):
    assert NgramProposer().propose(tokens, most) == wanted == (plain_lookup(tokens, most) if most > 0 else [])


@pytest.mark.parametrize("seed", range(5))
def test_a_text_that_grows_is_looked_up_as_if_it_were_new(seed: int):
    rng = random.Random(seed)
    proposer, tokens = NgramProposer(), rng.choices(range(3), k=rng.randint(0, 10))
    found = 0
    for _ in range(60):
        most = rng.randint(0, 6)
        guess = proposer.propose(tokens, most)
        assert guess == (plain_lookup(tokens, most) if most else [])
        found += bool(guess)
        tokens += rng.choices(range(3), k=rng.randint(1, 4))
    assert found > 20


def test_a_proposal_is_not_the_text_itself():
    tokens = [1, 2, 3, 1, 2]
    guess = NgramProposer().propose(tokens, 5)
    guess.append(9)
    assert tokens == [1, 2, 3, 1, 2]


@pytest.mark.parametrize("temperature", [0, 0.3])
def test_right_guesses_save_steps_and_change_nothing(generator: TextGenerator, temperature: float):
    params = dataclasses.replace(GREEDY, temperature=temperature, logprobs=1)
    found, steps = [], []
    for speculate in ("none", "ngram"):
        engine = watched(generator.engine(kv_memory=pages(generator, 50), speculate=speculate))
        found.append([(one.tokens, one.text, len(one.logprobs)) for one in answer(engine, [PROMPT], params)])
        steps.append(engine.stats.steps)
    assert found[0] == found[1]
    stats = engine.stats
    assert 0 < stats.accepted <= stats.proposed
    assert steps == [50, 50 - stats.accepted]
    assert stats.decode_tokens == 49


def test_where_each_guess_is_right_few_steps_are_left(dull: TextGenerator):
    engine = watched(dull.engine(kv_memory=pages(dull, 50), speculate="ngram"))
    (found,) = answer(engine, ["abc"], dataclasses.replace(GREEDY, logprobs=0))
    assert found.text == dull.generate("abc", temperature=0, max_new_tokens=50)
    assert len(found.logprobs) == 50
    assert engine.stats.accepted == engine.stats.proposed == 50 - engine.stats.steps
    assert engine.stats.steps <= 3 + 50 // (1 + DRAFTS) + 1


def test_the_counts_are_those_of_the_guesses_that_came_true(generator: TextGenerator):
    """Against the truth, of which each guess is known to be right or wrong."""
    (truth,) = generator.engine(kv_memory=pages(generator, 50)).generate([PROMPT], GREEDY)
    prompt = generator.tokenizer.encode(PROMPT).tolist()
    whole, end, proposed, accepted = prompt + truth.tokens, len(prompt) + 1, 0, 0
    while end < len(whole):
        guess = plain_lookup(whole[:end], min(DRAFTS, len(whole) - end - 1))
        right = next((i for i, token in enumerate(guess) if token != whole[end + i]), len(guess))
        proposed, accepted, end = proposed + len(guess), accepted + right, end + right + 1
    engine = watched(generator.engine(kv_memory=pages(generator, 50), speculate="ngram"))
    answer(engine, [PROMPT], GREEDY)
    assert (engine.stats.proposed, engine.stats.accepted) == (proposed, accepted)
    assert 0 < accepted < proposed


def test_a_continuation_ends_within_a_guess_where_it_would_end_anyway(generator: TextGenerator):
    plain = watched(generator.engine(kv_memory=pages(generator, 50)))
    quick = watched(generator.engine(kv_memory=pages(generator, 50), speculate="ngram"))
    (whole,) = answer(plain, [PROMPT], GREEDY)
    settings = [dataclasses.replace(GREEDY, max_new_tokens=n) for n in range(1, 51)]
    settings += [dataclasses.replace(GREEDY, stop=(whole.text[i : i + 3],)) for i in range(46)]
    settings += [dataclasses.replace(GREEDY, stop_tokens=(token,)) for token in set(whole.tokens)]
    found = [answer(engine, [PROMPT] * len(settings), settings) for engine in (plain, quick)]
    ends = [[(one.tokens, one.text, one.finish_reason) for one in completions] for completions in found]
    assert ends[0] == ends[1]
    assert quick.stats.accepted > 0


@pytest.mark.parametrize("slide", [False, True])
def test_no_guess_reaches_past_the_context(generator: TextGenerator, dull: TextGenerator, slide: bool):
    """Neither where a request ends there nor where its window slides on."""
    params = dataclasses.replace(GREEDY, max_new_tokens=BLOCK + 20)
    for source in (generator, dull):
        for prompt in ("abc", "abcabc", "abcab" * 11):
            found = []
            for speculate in ("none", "ngram"):
                engine = watched(source.engine(kv_memory=pages(source, 4), speculate=speculate, slide=slide))
                found.append(answer(engine, [prompt], params)[0].tokens)
            assert found[0] == found[1]
            assert len(found[0]) == (BLOCK + 20 if slide else BLOCK + 1 - len(prompt))
            assert engine.stats.proposed > 0 or len(prompt) > 6


def test_penalties_are_not_guessed_at(generator: TextGenerator):
    """They depend on each token before, which a guess has not yet."""
    engine = watched(generator.engine(kv_memory=pages(generator, 50), speculate="ngram"))
    for penalty in ({"repetition_penalty": 1.1}, {"presence_penalty": 1.0}, {"frequency_penalty": -1.0}):
        params = dataclasses.replace(GREEDY, **penalty)
        (found,) = answer(engine, [PROMPT], params)
        assert found.text == generator.generate(PROMPT, **vars(params))
    assert engine.stats.proposed == 0


def test_a_budget_of_one_token_leaves_no_room_for_guesses(generator: TextGenerator):
    engine = watched(generator.engine(kv_memory=pages(generator, 50), speculate="ngram", max_batch_tokens=1))
    (found,) = answer(engine, ["abcabc"], GREEDY)
    assert found.text == generator.generate("abcabc", temperature=0, max_new_tokens=50)
    assert engine.stats.proposed == 0
