"""The sampler's frequencies against a plain numpy float64 implementation, and what it must always keep."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt.config import SamplingParams
from fastgpt.sampler import Sampler, keep_likely

DRAWS = 20_000
LOGITS = [2.0, 1.5, 1.2, 0.4, 0.1, -0.3, -0.9, -1.0, -2.0, -5.0]
PROMPT = [0, 3, 7]
NO_PROMPT = torch.zeros(1, 0, dtype=torch.int64)


def params(**settings) -> SamplingParams:
    return SamplingParams(**({"top_k": None, "temperature": 1.0} | settings))


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def expected(logits: list[float], seen: list[int], chosen: SamplingParams) -> np.ndarray:
    """The distribution by the definitions, one token at a time, in float64."""
    scores = np.array(logits)
    for token in set(seen):
        scores[token] *= chosen.repetition_penalty ** (-1 if scores[token] > 0 else 1)
    scores /= chosen.temperature
    order = np.argsort(-scores)
    if chosen.top_k:
        scores[order[chosen.top_k :]] = -np.inf
    if chosen.top_p is not None:
        held, shares = 0.0, softmax(scores)
        for token in order:
            if held >= chosen.top_p:
                scores[token] = -np.inf
            held += shares[token]
    if chosen.min_p is not None:
        shares = softmax(scores)
        scores[shares < chosen.min_p * shares.max()] = -np.inf
    return softmax(scores)


def draw(logits: list[float], prompt: list[int], chosen: SamplingParams, count: int = DRAWS) -> torch.Tensor:
    """`count` draws at once: as many identical rows."""
    sampler = Sampler(chosen, torch.tensor([prompt] * count, dtype=torch.int64).view(count, -1), len(logits))
    return sampler(torch.tensor([logits] * count))[:, 0]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 1.7},
        {"top_k": 4},
        {"top_k": 0},
        {"top_k": 99},
        {"top_p": 0.8},
        {"top_p": 1.0},
        {"min_p": 0.2},
        {"min_p": 0.0},
        {"repetition_penalty": 1.8},
        {"repetition_penalty": 0.6},
        {"temperature": 0.7, "top_k": 6, "top_p": 0.9},
        {"temperature": 2.0, "top_k": 8, "min_p": 0.3},
        {"top_p": 0.95, "min_p": 0.1, "repetition_penalty": 1.3},
        {"temperature": 1.3, "top_k": 7, "top_p": 0.9, "min_p": 0.2, "repetition_penalty": 1.5},
    ],
    ids=str,
)
def test_frequencies_are_the_definitions(settings: dict):
    chosen = params(**settings)
    wanted = expected(LOGITS, PROMPT, chosen) * DRAWS
    found = np.bincount(draw(LOGITS, PROMPT, chosen).numpy(), minlength=len(LOGITS))
    kept = wanted > 0
    assert found[~kept].sum() == 0
    chi2, freedom = ((found - wanted)[kept] ** 2 / wanted[kept]).sum(), kept.sum() - 1
    # Wilson and Hilferty's cube-root normal: 3.5 deviations, one false alarm in 4,000 seeds; the seed is fixed.
    limit = freedom * (1 - 2 / (9 * freedom) + 3.5 * np.sqrt(2 / (9 * freedom))) ** 3
    assert chi2 < limit


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}], ids=str)
def test_the_narrowest_setting_of_each_kind_is_greedy(settings: dict):
    assert draw(LOGITS, [], params(**settings), count=500).eq(0).all()


@pytest.mark.parametrize("temperature", [1e-5, 1e-20, 1e-38, 1e-45, 1e-300])
def test_a_temperature_near_zero_is_greedy(temperature: float):
    for logits in ([1.0, 3.0, 2.0], [-3.0, -1.0, -2.0], [-1.0, 0.0, -1e-3]):
        assert draw(logits, [], params(temperature=temperature), count=50).eq(1).all()


@settings(deadline=None, max_examples=60)
@given(
    logits=st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=30),
    temperature=st.floats(0.01, 100),
    top_k=st.none() | st.integers(0, 40),
    top_p=st.none() | st.floats(0, 1, exclude_min=True),
    min_p=st.none() | st.floats(0, 1),
)
def test_the_likeliest_token_survives_and_no_likelier_one_is_dropped(logits, temperature, top_k, top_p, min_p):
    row = torch.tensor([logits]) / temperature
    kept = keep_likely(row, params(top_k=top_k, top_p=top_p, min_p=min_p))[0].isfinite()
    assert kept[row[0] == row.max()].any()
    if not kept.all():
        assert row[0][kept].min() >= row[0][~kept].max()


def test_greedy_takes_the_likeliest_of_every_row():
    logits = torch.randn(64, 50, generator=torch.Generator().manual_seed(0))
    token = Sampler(params(temperature=0), NO_PROMPT.expand(64, 0), 50)(logits)
    assert torch.equal(token[:, 0], logits.argmax(-1))
    assert token.shape == (64, 1)


def test_the_penalty_counts_what_was_drawn_too():
    logits = torch.tensor([[3.0, 2.0, -1.0]])
    sampler = Sampler(params(temperature=0, repetition_penalty=2.0), NO_PROMPT, 3)
    assert [int(sampler(logits)) for _ in range(3)] == [0, 1, 0]  # 3 -> 1.5 < 2 -> 1 < 1.5


def test_a_penalty_lowers_negative_scores_as_well():
    logits = torch.tensor([[-1.0, -1.5]])
    sampler = Sampler(params(temperature=0, repetition_penalty=2.0), torch.tensor([[0]]), 2)
    assert int(sampler(logits)) == 1


def test_rows_are_penalized_apart():
    logits = torch.tensor([[3.0, 2.0], [3.0, 2.0]])
    sampler = Sampler(params(temperature=0, repetition_penalty=2.0), torch.tensor([[0], [1]]), 2)
    assert sampler(logits)[:, 0].tolist() == [1, 0]


def test_the_same_seed_draws_the_same_tokens_and_another_seed_others():
    first, again, other = (draw(LOGITS, [], params(seed=seed), count=200) for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_drawing_leaves_torchs_own_generator_and_the_logits_alone():
    state, logits = torch.get_rng_state(), torch.tensor([LOGITS])
    kept = logits.clone()
    Sampler(params(repetition_penalty=1.5, top_k=3, top_p=0.9), torch.tensor([PROMPT]), len(LOGITS))(logits)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(logits, kept)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_drawn_in_float32(dtype: torch.dtype):
    logits = torch.tensor([LOGITS] * 2000).to(dtype)
    prompt = NO_PROMPT.expand(2000, 0)
    half = Sampler(params(top_p=0.9), prompt, len(LOGITS))(logits)
    assert torch.equal(half, Sampler(params(top_p=0.9), prompt, len(LOGITS))(logits.float()))
