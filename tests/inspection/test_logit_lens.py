"""The logit lens: each row is what a model that ends there would say, and the last row is the model's own output."""

import pytest
import torch
import torch.nn.functional as F

from fastgpt.inspection import logit_lens
from fastgpt.inspection.attention import observe
from tests.helpers.untrained import fresh

TOKENS = torch.tensor([1, 4, 4, 2, 9, 3])


@pytest.fixture(params=[None, 3], ids=["at once", "in parts"])
def rows_at_once(request, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute the logits of three rows at a time."""
    if request.param:
        monkeypatch.setattr("fastgpt.evaluation.token_scores.LOGITS", 11 * request.param)


@pytest.mark.usefixtures("rows_at_once")
@pytest.mark.parametrize("position", ["learned", "rotary"])
def test_rows_are_predictions_of_shorter_models(position: str):
    model = fresh(position, n_layer=3).model
    seen = observe(model, TOKENS, None, lambda *_: None)
    found = logit_lens.lens(seen.model, seen.streams)
    assert found.ids.shape == found.probabilities.shape == (4, 6, 10)
    assert len(logit_lens.row_names(3)) == 4
    for row in range(4):
        shorter = fresh(position, n_layer=3).model
        shorter.load_state_dict(model.state_dict())
        shorter.h = shorter.h[:row]
        x, _ = shorter.embed(TOKENS[None], slice(0, 6))
        hidden = shorter.hidden(TOKENS[None]) if row else F.layer_norm(x, (16,), model.ln_f.weight, model.ln_f.bias)
        best = shorter.logits(hidden)[0].softmax(-1).sort(descending=True)
        torch.testing.assert_close(found.probabilities[row], best.values[:, :10], atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(found.ids[row].long(), best.indices[:, :10])


@pytest.mark.usefixtures("rows_at_once")
def test_losses_and_ranks_are_of_the_true_next_token():
    model = fresh().model
    seen = observe(model, TOKENS, None, lambda *_: None)
    found = logit_lens.outcome(seen.model, seen.hidden, TOKENS)
    logits = model(TOKENS[None])[0, :-1].detach()
    torch.testing.assert_close(found.losses.float(), F.cross_entropy(logits, TOKENS[1:], reduction="none"))
    order = logits.argsort(-1, descending=True).tolist()
    assert found.ranks.tolist() == [row.index(token) + 1 for row, token in zip(order, TOKENS[1:].tolist(), strict=True)]
    assert len(set(found.ranks.tolist())) > 2


def test_one_token_predicts_nothing_that_is_known():
    model = fresh().model
    seen = observe(model, TOKENS[:1], None, lambda *_: None)
    assert [len(part) for part in logit_lens.outcome(seen.model, seen.hidden, TOKENS[:1])] == [0, 0]


def test_a_small_vocabulary_is_shown_whole():
    model = fresh(chars="\nabc").model
    seen = observe(model, TOKENS.clamp(max=3), None, lambda *_: None)
    found = logit_lens.lens(seen.model, seen.streams)
    assert found.ids.shape[-1] == 4
    torch.testing.assert_close(found.probabilities.sum(-1), torch.ones(3, 6))
