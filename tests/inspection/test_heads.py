"""Heads that were made to follow a pattern are found to follow it, with the share that they were given."""

import math

import pytest
import torch

from fastgpt.inspection.heads import LABELLED, Head, Patterns, measure

TOKENS = torch.tensor([5, 6, 7, 5, 6, 8, 5, 5])  # 5 and 6 come again


def head(rows: list[dict[int, float]], documents: torch.Tensor | None = None, tokens: torch.Tensor = TOKENS) -> Head:
    """The measure of a head with the weights of each row's keys."""
    weights = torch.zeros(1, len(rows), len(rows))
    for query, row in enumerate(rows):
        assert sum(row.values()) == pytest.approx(1)
        for key, weight in row.items():
            weights[0, query, key] += weight
    (found,) = measure(weights, Patterns(tokens, documents))
    return found


def test_a_head_of_the_previous_token():
    found = head([{0: 1.0}, *({t - 1: 0.75, t: 0.25} for t in range(1, 8))])
    assert found.scores["previous"] == pytest.approx(0.75)
    assert found.labels == (("previous token", pytest.approx(0.75)),)
    assert found.distance == pytest.approx(7 * 0.75 / 8)
    quarter = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert found.entropy == pytest.approx(7 / 8 * quarter)


def test_a_head_of_the_first_token():
    found = head([{0: 0.5, t: 0.5} if t else {0: 1.0} for t in range(8)])
    assert found.scores["first"] == pytest.approx(0.5)
    assert found.labels == (("first token", pytest.approx(0.5)),)
    assert found.distance == pytest.approx(0.5 * sum(range(8)) / 8)


def test_an_induction_head():
    """Queries 3, 4, 6 and 7 have an earlier occurrence: 0, 1, 0 and 3, and 0, 3 and 6, whose successor is 7 itself."""
    rows = [{t: 1.0} for t in range(8)]
    rows[3], rows[4], rows[6], rows[7] = {1: 0.8, 3: 0.2}, {2: 1.0}, {1: 0.3, 4: 0.5, 6: 0.2}, {1: 0.2, 4: 0.2, 7: 0.6}
    found = head(rows)
    assert found.scores["induction"] == pytest.approx((0.8 + 1.0 + 0.8 + 0.4) / 4)
    assert found.labels == (("induction", pytest.approx(0.75)),)


def test_equal_weights_are_no_pattern_even_in_a_short_text():
    found = head([{key: 1 / (t + 1) for key in range(t + 1)} for t in range(3)], tokens=torch.tensor([1, 1, 1]))
    assert found.scores["previous"] == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert found.scores["previous"] > LABELLED
    assert found.labels == ()
    assert found.entropy == pytest.approx((math.log(2) + math.log(3)) / 3, rel=1e-5)


def test_a_score_of_few_queries_is_no_label():
    """Only the last of three queries has an earlier occurrence; all three have a token before and a first token."""
    found = head([{0: 1.0}, {0: 1.0}, {1: 1.0}], tokens=torch.tensor([1, 2, 1]))
    assert found.scores == {"previous": 1.0, "first": 0.5, "induction": 1.0}
    assert found.labels == ()


def test_a_score_without_a_query_is_none():
    found = head([{0: 1.0}], tokens=torch.tensor([1]))
    assert found.scores == {"previous": None, "first": None, "induction": None}
    assert (found.entropy, found.distance, found.labels) == (0, 0, ())
    assert head([{0: 1.0}, {1: 1.0}], tokens=torch.tensor([1, 2])).scores["induction"] is None


def test_each_document_is_a_text_of_its_own():
    """Tokens 3 and 6 begin documents: their previous tokens, first tokens and earlier occurrences are in others."""
    documents = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])
    keys = Patterns(TOKENS, documents).keys
    assert keys["previous"].nonzero().tolist() == [[1, 0], [2, 1], [4, 3], [5, 4], [7, 6]]
    assert keys["first"].nonzero().tolist() == [[1, 0], [2, 0], [4, 3], [5, 3], [7, 6]]
    assert keys["induction"].nonzero().tolist() == []


def test_heads_are_measured_apart():
    weights = torch.zeros(2, 8, 8)
    weights[0, range(8), range(8)] = 1
    weights[1, :, 0] = 1
    own, first = measure(weights, Patterns(TOKENS))
    assert (own.distance, own.scores["first"], own.labels) == (0, 0, ())
    assert (first.distance, first.labels) == (3.5, (("first token", 1.0),))
