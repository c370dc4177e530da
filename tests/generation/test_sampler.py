"""The sampler's frequencies against a plain numpy float64 implementation, and what it must always keep."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt.config.generation import SamplingParams
from fastgpt.generation import sampler as module
from fastgpt.generation.random_stream import prompt_digest, stream_key, uniform
from fastgpt.generation.sampler import NOT_DRAWN, Sampler, least_kept, ranks
from tests.helpers.covering import some

DRAWS = 20_000
LOGITS = [2.0, 1.5, 1.2, 0.4, 0.1, -0.3, -0.9, -1.0, -2.0, -5.0]
PROMPT = [0, 3, 7]
SAID = [1, 4, 4, 0, 4, 8]
INF = float("inf")

KINDS = [
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
    {"presence_penalty": 1.1},
    {"frequency_penalty": 0.6},
    {"presence_penalty": -0.7, "frequency_penalty": 0.3, "repetition_penalty": 1.4},
    {"top_k": 3, "top_p": 0.7},
    {"temperature": 0.7, "top_k": 6, "top_p": 0.9},
    {"temperature": 2.0, "top_k": 8, "min_p": 0.3},
    {"top_p": 0.95, "min_p": 0.1, "repetition_penalty": 1.3},
    {"temperature": 1.3, "top_k": 7, "top_p": 0.9, "min_p": 0.2, "repetition_penalty": 1.5, "presence_penalty": 0.4},
]


def params(**settings) -> SamplingParams:
    return SamplingParams(**({"top_k": None, "temperature": 1.0} | settings))


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def expected(logits: list[float], prompt: list[int], said: list[int], chosen: SamplingParams) -> np.ndarray:
    """The distribution by the definitions, one token at a time, in float64."""
    scores = np.array(logits)
    for token in {*prompt, *said}:
        scores[token] *= chosen.repetition_penalty ** (-1 if scores[token] > 0 else 1)
    for token in set(said):
        scores[token] -= chosen.presence_penalty + chosen.frequency_penalty * said.count(token)
    scores /= chosen.temperature
    order = np.argsort(-scores, kind="stable")  # of equals the lowest id first
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


def assert_drawn_from(shares: np.ndarray, tokens: torch.Tensor) -> None:
    """The tokens' frequencies are the shares', by chi-square."""
    wanted, found = shares * len(tokens), np.bincount(tokens.numpy(), minlength=len(shares))
    kept = wanted > 0
    assert found[~kept].sum() == 0
    chi2, freedom = ((found - wanted)[kept] ** 2 / wanted[kept]).sum(), kept.sum() - 1
    # Wilson and Hilferty's cube-root normal: 3.5 deviations, one false alarm in 4,000 seeds; the seeds are fixed.
    limit = freedom * (1 - 2 / (9 * freedom) + 3.5 * np.sqrt(2 / (9 * freedom))) ** 3
    assert chi2 < limit


def begun(requests: list[SamplingParams], vocab_size: int, prompt=(), said=()) -> Sampler:
    """A sampler with one slot for each request."""
    sampler = Sampler(len(requests), vocab_size)
    for slot, chosen in enumerate(requests):
        sampler.begin(slot, chosen, prompt, said)
    return sampler


def seeded(chosen: SamplingParams, count: int) -> list[SamplingParams]:
    return [dataclasses.replace(chosen, seed=chosen.seed + i) for i in range(count)]


def draw(logits: list[float], chosen: SamplingParams, prompt=(), said=(), count: int = DRAWS) -> torch.Tensor:
    """`count` first tokens at once: as many requests, alike but for the seed."""
    sampler = begun(seeded(chosen, count), len(logits), prompt, said)
    return sampler(torch.tensor([logits] * count), range(count), [0] * count).tokens


def one(sampler: Sampler, logits: torch.Tensor, slot: int = 0, index: int = 0) -> int:
    return int(sampler(logits[None], [slot], [index]).tokens)


@pytest.mark.parametrize("kind", some(1, KINDS[::-1]), ids=str)
def test_frequencies_are_the_definitions(kind: dict):
    chosen = params(**kind)
    assert_drawn_from(expected(LOGITS, PROMPT, SAID, chosen), draw(LOGITS, chosen, PROMPT, SAID))


@pytest.mark.slow
def test_rows_of_all_kinds_in_one_call_each_have_their_own_frequencies():
    each = 2_000
    kinds = [*KINDS, {"temperature": 0}]
    requests = [r for row in zip(*(seeded(params(**kind), each) for kind in kinds), strict=True) for r in row]
    sampler = begun(requests, len(LOGITS), PROMPT, SAID)
    tokens = sampler(torch.tensor([LOGITS] * len(requests)), range(len(requests)), [3] * len(requests)).tokens
    tokens = tokens.view(each, len(kinds))
    assert tokens[:, -1].eq(0).all()
    for column, kind in enumerate(KINDS):
        assert_drawn_from(expected(LOGITS, PROMPT, SAID, params(**kind)), tokens[:, column])


def test_one_request_draws_from_the_distribution_at_its_many_indices():
    sampler = begun([params(top_k=6)], len(LOGITS))
    tokens = sampler(torch.tensor([LOGITS] * DRAWS), [0] * DRAWS, range(DRAWS)).tokens
    assert_drawn_from(expected(LOGITS, [], [], params(top_k=6)), tokens)
    follows = tokens[::2] * len(LOGITS) + tokens[1::2]
    shares = expected(LOGITS, [], [], params(top_k=6))
    assert_drawn_from(np.outer(shares, shares).ravel(), follows)


def test_a_draw_depends_on_seed_and_index_not_on_the_batch():
    kinds = [*KINDS, {"temperature": 0}, {"logprobs": 3}, {"top_k": 200}]
    requests = [params(**kind, seed=seed) for kind in kinds for seed in (0, 1, 2)]
    logits = 3 * torch.randn(len(requests), 300, generator=torch.Generator().manual_seed(0))
    indices = [i % 7 for i in range(len(requests))]
    together = begun(requests, 300, PROMPT, SAID)(logits, range(len(requests)), indices).tokens.tolist()
    alone = [one(begun([r], 300, PROMPT, SAID), logits[i], 0, indices[i]) for i, r in enumerate(requests)]
    assert together == alone
    shuffled = torch.randperm(len(requests), generator=torch.Generator().manual_seed(1)).tolist()
    sampler = begun([requests[i] for i in shuffled], 300, PROMPT, SAID)
    some = range(0, len(requests), 2)
    found = sampler(logits[[shuffled[s] for s in some]], some, [indices[shuffled[s]] for s in some]).tokens
    assert found.tolist() == [alone[shuffled[s]] for s in some]


def test_seed_and_index_both_count():
    sampler = begun([params(seed=5), params(seed=5), params(seed=6)], len(LOGITS))
    logits = torch.tensor([LOGITS] * 200)
    first, again, other = (sampler(logits, [slot] * 200, range(200)).tokens for slot in range(3))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len(set(first.tolist())) > 3


def test_uniform_numbers_are_exact_in_float32_and_fill_the_unit_interval():
    keys = [stream_key(prompt_digest([1, 2]), seed) for seed in (0, 1, 2**63 + 5)]
    numbers = np.array([uniform(key, index) for key in keys for index in range(5000)])
    assert (numbers.astype(np.float32) == numbers).all()
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert len(np.unique(numbers)) > 14_980
    shares = np.full(16, 1 / 16)
    assert_drawn_from(shares, torch.from_numpy((numbers * 16).astype(np.int64)))
    # Pinned: a change would give every seed another text.
    assert [int(uniform(key, 0) * 2**24) for key in keys] == [4128047, 9728005, 221878]


@pytest.mark.parametrize("kind", [{"temperature": 0}, {"top_k": 1}, {"top_p": 1e-9}, {"top_p": 1e-60}, {"min_p": 1.0}])
def test_the_narrowest_setting_of_each_kind_is_greedy(kind: dict):
    assert draw(LOGITS, params(**kind), count=500).eq(0).all()


@pytest.mark.parametrize("temperature", [1e-5, 1e-20, 1e-38, 1e-45, 1e-300])
def test_a_temperature_near_zero_is_greedy(temperature: float):
    for logits in ([1.0, 3.0, 2.0], [-3.0, -1.0, -2.0], [-1.0, 0.0, -1e-3]):
        assert draw(logits, params(temperature=temperature), count=50).eq(1).all()


@pytest.mark.parametrize("temperature", [1e10, 1e300])
def test_a_temperature_without_end_is_uniform_over_what_is_not_masked(temperature: float):
    tokens = draw([4.0, -INF, 0.0, -3.0], params(temperature=temperature), count=2000)
    assert_drawn_from(np.array([1, 0, 1, 1]) / 3, tokens)


def test_one_likeliest_token_is_greedy_where_their_weights_round_to_the_same():
    logits = [0.1, math.nextafter(0.1, 1) + 1e-8]
    assert torch.tensor(logits)[1] > torch.tensor(logits)[0]
    assert draw(logits, params(top_k=1, temperature=100.0), count=100).eq(1).all()
    mixed = begun([params(temperature=0), params()], 2)(torch.tensor([logits] * 2), [0, 1], [0, 0])
    assert mixed.tokens[0] == 1


@pytest.mark.parametrize("shift", some(1, [1e4, -1e4]))
def test_only_differences_of_logits_count(shift: float):
    logits = [shift - 500, shift + 1, shift]
    assert_drawn_from(expected(logits, [], [], params()), draw(logits, params()))


TIED = [1.0, 0.0, -0.0, 0.0, 1.0, -1.0, -1.0]


@pytest.mark.parametrize(
    ("kind", "kept"),
    [
        *[({"top_k": k}, kept) for k, kept in enumerate(([0], [0, 4], [0, 1, 4], [0, 1, 2, 4]), start=1)],
        ({"top_k": 6}, [0, 1, 2, 3, 4, 5]),
        ({"top_p": 0.2}, [0]),
        ({"top_p": 0.7}, [0, 1, 4]),
        ({"top_k": 3, "top_p": 0.99}, [0, 1, 4]),
        ({"min_p": 1.0}, [0, 4]),
        ({"min_p": 0.3}, [0, 1, 2, 3, 4]),
    ],
    ids=str,
)
def test_of_equal_scores_the_lowest_ids_stay(kind: dict, kept: list[int]):
    assert sorted(set(draw(TIED, params(**kind), count=800).tolist())) == kept
    assert expected(TIED, [], [], params(**kind)).nonzero()[0].tolist() == kept


def test_top_k_keeps_k_tokens_and_one_is_greedy_among_many_ties():
    logits = (2 * torch.randn(40, 3000, generator=torch.Generator().manual_seed(0))).round().bfloat16()
    likeliest = logits.argmax(-1)
    assert (logits == logits.amax(-1, keepdim=True)).sum(-1).max() > 1
    for kinds in ([{"top_k": 1}], [{"top_k": 1}, {"top_p": 1e-9}], [{"top_k": 1}, {"top_k": 7}, {}, {"top_p": 0.5}]):
        requests = [params(**kinds[row % len(kinds)], logprobs=30) for row in range(40)]
        together = begun(requests, 3000)(logits, range(40), [0] * 40)
        greedy = [row for row, r in enumerate(requests) if r.top_k == 1 or r.top_p == 1e-9]
        assert torch.equal(together.tokens[greedy], likeliest[greedy])
        first = np.argsort(-logits.float().numpy(), axis=-1, kind="stable")[:, :30]
        assert together.top_ids is not None
        assert together.top_ids.tolist() == first.tolist()
        for row, request in enumerate(requests):
            alone = begun([request], 3000)(logits[row : row + 1], [0], [0]).to_host()[0]
            assert alone == together.to_host()[row]
    drawn = begun(seeded(params(top_k=5, temperature=1e30), 1000), 3000)(
        logits[:1].expand(1000, -1), range(1000), [0] * 1000
    )
    assert sorted(set(drawn.tokens.tolist())) == sorted(
        np.argsort(-logits[0].float().numpy(), kind="stable")[:5].tolist()
    )


@settings(deadline=None, max_examples=60)
@given(
    logits=st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=30),
    rows=st.lists(
        st.tuples(st.floats(0.01, 100), st.integers(1, 40), st.none() | st.floats(0, 1, exclude_min=True)),
        min_size=1,
        max_size=5,
    ),
)
def test_the_likeliest_token_survives_and_no_likelier_one_is_dropped(logits, rows):
    scores = torch.tensor([logits] * len(rows))
    temperature = torch.tensor([[t] for t, _, _ in rows])
    top_k = torch.tensor([[min(k, len(logits))] for _, k, _ in rows])
    top_p = torch.tensor([[INF if p is None else p] for _, _, p in rows])
    weights = ((scores - scores.amax(-1, keepdim=True)) / temperature).exp()
    ranked = ranks(scores, torch.arange(len(logits)).flip(0))
    kept = ranked >= least_kept(ranked, weights, int(top_k.max()), top_k, top_p)
    for row, (_, k, p) in enumerate(rows):
        order = np.argsort(-scores[row].numpy(), kind="stable")
        count = int(kept[row].sum())
        assert 1 <= count <= min(k, len(logits))
        assert sorted(order[:count].tolist()) == kept[row].nonzero()[:, 0].tolist()
        if p is None:
            assert count == min(k, len(logits))


@settings(deadline=None, max_examples=60)
@given(
    logits=st.lists(st.just(-INF) | st.floats(-100, 100, width=32), min_size=1, max_size=30),
    temperature=st.just(0.0) | st.floats(1e-3, 1e3),
    top_k=st.none() | st.integers(0, 40),
    top_p=st.none() | st.floats(0, 1, exclude_min=True),
    min_p=st.none() | st.floats(0, 1),
    repetition_penalty=st.floats(1e-3, 1e3),
    presence_penalty=st.floats(-100, 100),
    number=st.none() | st.sampled_from([0.0, 2**-24, 1 - 2**-24]),
)
def test_a_token_without_probability_is_never_drawn(logits, number, **settings):
    logits = [0.5, *logits]
    said = [0, len(logits) - 1]
    with pytest.MonkeyPatch.context() as patch:
        if number is not None:
            patch.setattr(module, "uniform", lambda seed, index: number)
        drawn = draw(logits, params(**settings), said=said, count=8).tolist()
    assert all(logits[token] > -INF for token in drawn)
    if settings["top_k"]:
        scores = np.array(logits, dtype=np.float32)
        for token in said:
            factor = np.float32(settings["repetition_penalty"])
            scores[token] = scores[token] / factor if scores[token] > 0 else scores[token] * factor
        for token in set(said):
            scores[token] -= np.float32(settings["presence_penalty"])
        kth = np.sort(scores)[::-1][min(settings["top_k"], len(logits)) - 1]
        assert all(scores[token] >= kth - 1e-4 for token in drawn)  # the penalties' own rounding


@pytest.mark.parametrize("spread", [1e-6, 0.5, 5.0])
def test_a_running_sum_that_is_not_monotone_draws_no_dropped_token(spread: float, monkeypatch: pytest.MonkeyPatch):
    plain, noise = torch.Tensor.cumsum, torch.Generator().manual_seed(0)

    def rounded(self: torch.Tensor, dim: int) -> torch.Tensor:
        exact = plain(self, dim)
        return exact + spread * torch.randn(exact.shape, generator=noise)

    monkeypatch.setattr(torch.Tensor, "cumsum", rounded)
    logits = [-INF, -9.0, 1.0, -INF, 2.0, -INF, 0.5, -8.0, -INF, -INF]
    assert set(draw(logits, params(top_k=3), count=3000).tolist()) <= {2, 4, 6}
    assert set(draw(logits, params(min_p=0.05), count=3000).tolist()) <= {2, 4, 6}
    assert draw(logits, params(temperature=0), count=10).eq(4).all()
    for number in (0.0, 1 - 2**-24):
        monkeypatch.setattr(module, "uniform", lambda key, index, number=number: number)
        assert set(draw(logits, params(top_k=3), count=1000).tolist()) <= {2, 4, 6}
    mixed = begun([params(temperature=0), params()] * 200, 10)
    assert mixed(torch.tensor([logits] * 400), range(400), [0] * 400).tokens[::2].eq(4).all()


@pytest.mark.parametrize("kind", [*KINDS, {"temperature": 0}, {"logprobs": 2}], ids=str)
def test_from_logits_that_are_not_numbers_nothing_is_drawn(kind: dict):
    for row in ([math.nan] * 4, [0.0, math.nan, -INF, 1.0], [-INF] * 4, [INF, INF, 0.0, -INF], [-INF, 0.0, 3.0, INF]):
        sampler = begun([params(**kind), params(**kind)], 4, [0], [1])
        drawn = sampler(torch.tensor([row, [-INF, 1.0, -INF, -INF]]), [0, 1], [0, 0]).to_host()
        assert [one.token for one in drawn] == [NOT_DRAWN, 1]


def test_greedy_takes_the_likeliest_of_every_row_and_the_first_of_equals():
    logits = torch.randn(64, 50, generator=torch.Generator().manual_seed(0)).round(decimals=0)
    greedy, other = params(temperature=0, top_k=5, top_p=0.5, min_p=0.1), params(top_k=5)
    assert torch.equal(begun([greedy] * 64, 50)(logits, range(64), [0] * 64).tokens, logits.argmax(-1))
    mixed = begun([greedy, other] * 32, 50)(logits, range(64), [0] * 64).tokens
    assert torch.equal(mixed[::2], logits.argmax(-1)[::2])
    assert not torch.equal(mixed[1::2], logits.argmax(-1)[1::2])


def test_penalties_count_what_was_drawn_too():
    logits = torch.tensor([3.0, 2.0, -1.0])
    sampler = begun([params(temperature=0, repetition_penalty=2.0)], 3)
    assert [one(sampler, logits) for _ in range(3)] == [0, 1, 0]  # 3 -> 1.5 < 2 -> 1 < 1.5
    sampler = begun([params(temperature=0, frequency_penalty=0.4)], 3)
    assert [one(sampler, logits) for _ in range(6)] == [0, 0, 0, 1, 0, 1]  # 3, 2.6, 2.2, 1.8 < 2, 1.8 > 1.6, ...
    sampler = begun([params(temperature=0, presence_penalty=1.5)], 3)
    assert [one(sampler, logits) for _ in range(4)] == [0, 1, 0, 0]  # 3 -> 1.5 < 2 -> 0.5, and no further


def test_repetition_lowers_negative_scores_as_well():
    sampler = begun([params(temperature=0, repetition_penalty=2.0)], 2, [0])
    assert one(sampler, torch.tensor([-1.0, -1.5])) == 1


def test_presence_and_frequency_leave_the_prompt_alone():
    sampler = begun([params(temperature=0, presence_penalty=9.0, frequency_penalty=9.0)], 2, prompt=[0, 0])
    assert one(sampler, torch.tensor([1.0, 0.0])) == 0


def test_rows_are_penalized_apart():
    sampler, chosen = Sampler(3, 2), params(temperature=0, repetition_penalty=2.0)
    for slot, prompt in enumerate([[0], [1]]):
        sampler.begin(slot, chosen, prompt)
    sampler.begin(2, params(temperature=0), [0])
    logits = torch.tensor([[3.0, 2.0]] * 4)
    assert sampler(logits, [1, 0, 2, 2], [0, 0, 0, 1]).tokens.tolist() == [0, 1, 0, 0]
    assert sampler(logits[:2], [0, 1], [1, 1]).tokens.tolist() == [0, 0]  # 1.5 > 1 where both are seen


@pytest.mark.parametrize("kind", [k for k in KINDS if any("penalty" in name for name in k)], ids=str)
def test_a_request_begun_anew_with_what_it_said_draws_as_if_it_had_gone_on(kind: dict):
    logits = torch.randn(30, 12, generator=torch.Generator().manual_seed(0))
    sampler = begun([params(**kind)], 12, PROMPT)
    tokens = [one(sampler, row, 0, index) for index, row in enumerate(logits)]
    resumed = Sampler(3, 12)
    for start in (1, 7, 20):
        resumed.begin(2, params(**kind), PROMPT, said=tokens[:start])
        assert [one(resumed, logits[i], 2, i) for i in range(start, 30)] == tokens[start:]


def test_a_slot_forgets_the_request_before():
    chosen, logits = params(temperature=0, repetition_penalty=2.0, presence_penalty=1.0), torch.tensor([3.0, 2.0])
    sampler = Sampler(1, 2)
    sampler.begin(0, chosen, [0], said=[0])
    assert one(sampler, logits) == 1
    sampler.begin(0, params(temperature=0), [0])
    assert one(sampler, logits) == 0
    sampler.begin(0, chosen, [])
    assert one(sampler, logits) == 0
    sampler.begin(0, params(seed=8), [])
    assert one(sampler, logits, index=4) == one(begun([params(seed=8)], 2), logits, index=4)


def test_logprobs_are_the_models_own():
    asked = [None, 0, 3, 20, 2]
    kinds = [{}, {"temperature": 0.3}, {"top_k": 2}, {"repetition_penalty": 3.0}, {"temperature": 0}]
    requests = [params(**kind, logprobs=n) for kind, n in zip(kinds, asked, strict=True)]
    logits = 100 + 5 * torch.randn(5, 10, generator=torch.Generator().manual_seed(0))
    sampled = begun(requests, 10, PROMPT, SAID)(logits, range(5), [0] * 5)
    wanted = logits.double().log_softmax(-1)
    drawn = sampled.to_host()
    assert [d.token for d in drawn] == sampled.tokens.tolist()
    assert drawn[0][1:] == (None, None, None)
    for row, n in list(enumerate(asked))[1:]:
        assert drawn[row].logprob == pytest.approx(float(wanted[row, drawn[row].token]), abs=1e-5)
        ids, values = zip(*(drawn[row].top or []), strict=True) if n else ((), ())
        best = wanted[row].topk(min(n, 10))
        assert list(ids) == best.indices.tolist()
        assert values == pytest.approx(best.values.tolist(), abs=1e-5)


def test_logprobs_are_absent_where_nobody_asks_and_of_the_token_alone_at_zero():
    sampled = begun([params()], 10)(torch.tensor([LOGITS]), [0], [0])
    assert sampled.logprobs is None
    assert sampled.to_host()[0][1:] == (None, None, None)
    alone = begun([params(logprobs=0)], 10)(torch.tensor([LOGITS]), [0], [0]).to_host()[0]
    assert alone.top == []
    assert alone.logprob == pytest.approx(math.log(softmax(np.array(LOGITS))[alone.token]), abs=1e-6)


@pytest.mark.parametrize("logprobs", [None, 0, 4])
def test_all_comes_to_the_host_in_one_copy(logprobs: int | None, monkeypatch: pytest.MonkeyPatch):
    sampled = begun([params(logprobs=logprobs)], 10)(torch.tensor([LOGITS]), [0], [0])
    copy, read, copies = torch.Tensor.cpu, torch.Tensor.tolist, []

    def cpu(self: torch.Tensor) -> torch.Tensor:
        copies.append(copy(self).clone())
        return copies[-1]

    def tolist(self: torch.Tensor) -> list:
        assert self.untyped_storage().data_ptr() in [c.untyped_storage().data_ptr() for c in copies]
        return read(self)

    for name in ("item", "numpy", "__int__", "__float__", "__iter__", "__bool__"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_: pytest.fail("another copy"))
    monkeypatch.setattr(torch.Tensor, "cpu", cpu)
    monkeypatch.setattr(torch.Tensor, "tolist", tolist)
    sampled.to_host()
    assert len(copies) == 1


def test_what_no_row_asks_for_is_not_computed(monkeypatch: pytest.MonkeyPatch):
    called = []

    def spy(name: str) -> None:
        plain = getattr(torch.Tensor, name)

        def method(self: torch.Tensor, *given) -> torch.Tensor:
            called.append((name, *(x for x in given if isinstance(x, int))))
            return plain(self, *given)

        monkeypatch.setattr(torch.Tensor, name, method)

    for name in ("topk", "exp_", "log_softmax", "cumsum", "masked_fill_"):
        spy(name)
    monkeypatch.setattr(module, "penalize", lambda *_: pytest.fail("no row has a penalty"))

    def work(*kinds: dict) -> list:
        called.clear()
        sampler = begun([params(**kind) for kind in kinds], 10, PROMPT)
        sampler(torch.tensor([LOGITS] * len(kinds)), range(len(kinds)), [0] * len(kinds))
        return called.copy()

    weigh, drop, add = ("exp_",), ("masked_fill_", 0), ("cumsum", -1)
    assert work({"temperature": 0, "top_k": 3, "top_p": 0.5}, {"temperature": 0}) == []
    assert work({}, {"top_k": 99}, {"top_p": 1.0}, {"temperature": 0, "top_k": 4, "top_p": 0.1, "min_p": 1}) == [
        weigh,
        add,
    ]
    assert work({}, {"min_p": 0.3}) == [weigh, drop, add]
    assert work({"top_k": 2}, {"top_k": 4}, {}) == [weigh, ("topk", 4), drop, add]
    assert work({"top_k": 2, "top_p": 0.5}, {}) == [weigh, ("topk", 2), add, drop, add]
    assert work({"top_k": 2}, {"top_p": 0.5}) == [weigh, ("topk", 2), ("topk", 10), add, drop, add]


def test_drawing_leaves_torchs_own_generator_and_the_logits_alone():
    state, logits = torch.get_rng_state(), torch.tensor([LOGITS] * len(KINDS), requires_grad=True)
    kept = logits.detach().clone()
    for requests in (
        [params(**kind) for kind in KINDS],
        [params(temperature=0, logprobs=2)] * len(KINDS),
        [params(top_k=3, top_p=0.9, min_p=0.1)] * len(KINDS),
    ):
        sampler = begun(requests, len(LOGITS), PROMPT)
        sampled = sampler(logits, range(len(KINDS)), [0] * len(KINDS))
        assert sampled.logprobs is None or not sampled.logprobs.requires_grad
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(logits, kept)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_drawn_in_float32(dtype: torch.dtype):
    logits = torch.tensor([LOGITS] * 2000).to(dtype)
    requests = seeded(params(top_p=0.9, logprobs=2), 2000)
    half, full = (
        begun(requests, 10, PROMPT, SAID)(x, range(2000), [0] * 2000).to_host() for x in (logits, logits.float())
    )
    assert half == full


def test_a_wrong_shape_and_an_unknown_slot_are_refused():
    sampler = begun([params()], 4)
    with pytest.raises(ValueError, match=r"logits \(1, 5\) for 1 slots"):
        sampler(torch.zeros(1, 5), [0], [0])
    with pytest.raises(ValueError, match="2 indices"):
        sampler(torch.zeros(1, 4), [0], [0, 1])
    with pytest.raises(IndexError, match="slot 1 of a sampler with 1"):
        sampler.begin(1, params(), [])
    with pytest.raises(KeyError):
        Sampler(2, 4)(torch.zeros(1, 4), [1], [0])
    assert sampler(torch.zeros(0, 4), [], []).to_host() == []


@pytest.mark.gpu
def test_a_gpu_draws_as_the_cpu_does_and_never_waits():
    requests = [params(**kind, logprobs=3, seed=seed) for kind in [*KINDS, {"temperature": 0}] for seed in range(20)]
    rows, vocab_size = len(requests), 1000
    logits = 3 * torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(0))
    on_gpu, there = Sampler(rows, vocab_size, "cuda"), logits.cuda()
    wanted = begun(requests, vocab_size, PROMPT, SAID)(logits, range(rows), [0] * rows).to_host()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for slot, chosen in enumerate(requests):
            on_gpu.begin(slot, chosen, PROMPT, SAID)
        sampled = on_gpu(there, range(rows), [0] * rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found = sampled.to_host()
    # Sums round apart: a number that falls on the edge between two tokens may go either way.
    assert sum(f.token == w.token for f, w in zip(found, wanted, strict=True)) >= rows - 2
    assert [[i for i, _ in f.top or []] for f in found] == [[i for i, _ in w.top or []] for w in wanted]
