"""Two models side by side: KL by torch.distributions, equal guesses, and the tokens where they differ most."""

import copy

import numpy as np
import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from fastgpt.errors import RunFailed, UsageError
from fastgpt.evaluation import comparison, token_scores
from fastgpt.evaluation.comparison import compare
from fastgpt.evaluation.sliding_window import measure
from tests.helpers.untrained import BLOCK, fresh

TOKENS = np.random.default_rng(0).integers(0, 11, 101).astype(np.uint16)
A = fresh()


def other(block_size: int = BLOCK):
    """A model of another shape and with other weights."""
    model = fresh("rotary", n_layer=1, block_size=block_size).model
    torch.manual_seed(8)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def distributions(model) -> Categorical:
    """Of every predicted token, in windows end to end."""
    text = torch.from_numpy(TOKENS.astype(np.int64))
    with torch.no_grad():
        logits = [model(text[None, at : at + BLOCK][:, : len(text) - 1 - at])[0] for at in range(0, 100, BLOCK)]
    return Categorical(logits=torch.cat(logits).double())


@pytest.mark.parametrize("batch_size", [1, 4, None])
@pytest.mark.parametrize("rows", [1, 3, 1000])
def test_kl_is_that_of_the_distributions(monkeypatch, batch_size: int | None, rows: int):
    monkeypatch.setattr(token_scores, "LOGITS", rows * comparison.SMALLER * 11)
    b = other()
    p, q = distributions(A.model), distributions(b)
    found = compare(A.model, b, TOKENS, batch_size=batch_size)
    kl = kl_divergence(p, q)
    assert found.tokens == len(kl) == 100
    assert found.kl_ab == pytest.approx(kl.mean().item(), rel=1e-5)
    assert found.kl_ba == pytest.approx(kl_divergence(q, p).mean().item(), rel=1e-5)
    assert found.equal_argmax == pytest.approx((p.probs.argmax(-1) == q.probs.argmax(-1)).double().mean().item())
    assert found.nats_a / 100 == pytest.approx(measure(A.model, A.tokenizer, TOKENS).loss, rel=1e-6)
    assert found.nats_b / 100 == pytest.approx(measure(b, A.tokenizer, TOKENS).loss, rel=1e-6)
    assert [one.kl for one in found.differences] == pytest.approx(kl.topk(20).values.tolist(), rel=1e-5)
    assert len({one.position for one in found.differences}) == 20
    for one in found.differences:
        row = one.position - 1
        assert one.kl == pytest.approx(kl[row].item(), rel=1e-5)
        assert one.token == TOKENS[one.position]
        for guess, its in ((one.a, p), (one.b, q)):
            assert guess.token == its.probs[row].argmax()
            assert guess.probability == pytest.approx(its.probs[row].max().item(), rel=1e-5)


def test_a_model_is_like_itself():
    found = compare(A.model, copy.deepcopy(A.model), TOKENS, stride=3)
    assert (found.kl_ab, found.kl_ba, found.equal_argmax) == (0.0, 0.0, 1.0)
    assert found.nats_a == found.nats_b
    assert found.stride == 3


def test_windows_are_those_of_the_smaller_model():
    found = compare(A.model, other(block_size=5), TOKENS)
    assert (found.block_size, found.stride, found.tokens) == (5, 5, 100)
    assert compare(other(block_size=5), A.model, TOKENS).nats_b == pytest.approx(found.nats_a, rel=1e-6)
    with pytest.raises(UsageError, match="`stride` 6 is above block_size 5"):
        compare(A.model, other(block_size=5), TOKENS, stride=6)


def test_a_text_of_two_tokens_has_one_difference():
    assert len(compare(A.model, other(), TOKENS[:2]).differences) == 1


def test_weights_that_are_not_numbers_are_an_error():
    b = other()
    with torch.no_grad():
        b.ln_f.weight.fill_(float("nan"))
    with pytest.raises(RunFailed, match="not finite"):
        compare(A.model, b, TOKENS)
