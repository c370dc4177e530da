"""Evaluations: the same batches every time, and the mean over exactly the targets that count."""

import re
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from fastgpt import evaluate
from fastgpt.config import ModelConfig, TrainConfig
from fastgpt.loader import Loader
from fastgpt.model import GPT
from tests.runs import parts, records, run

pytestmark = pytest.mark.usefixtures("workplace", "no_picture")
LIMIT = evaluate.WHOLE_SPLIT_LIMIT


def test_a_fixed_evaluation_is_the_mean_over_the_same_batches():
    out = run("--eval_iters 3 --max_iters 5 --eval_interval 5 --dropout 0.2")
    model, _, loader = parts(out, "latest")
    with torch.no_grad():
        losses = [model(x, y).item() for x, y, _ in loader.fixed(3, 4)]
    assert records(out, "val_loss") == {5: pytest.approx(sum(losses) / 3, rel=1e-6)}


def test_an_evaluation_of_the_whole_split_is_a_plain_loop_over_its_windows():
    out = run("--eval_iters 0 --max_iters 5 --eval_interval 5 --dropout 0.2")
    model, _, loader = parts(out, "latest")
    text, T = torch.from_numpy(loader.tokens.astype(np.int64)), 8
    assert (len(text) - 1) % T, "the last window should be short"
    total = 0.0
    with torch.no_grad():
        for first in range(0, len(text) - 1, T):
            window = text[first : first + T + 1]
            logits = model(window[None, :-1])[0].double()
            total += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
    assert records(out, "val_loss") == {5: pytest.approx(total / (len(text) - 1), rel=1e-6)}


@pytest.mark.parametrize(
    ("asked", "tokens", "batches"),
    [
        (None, 9, 0),
        (None, LIMIT, 0),
        (None, LIMIT + 1, 200),
        (0, LIMIT + 1, 0),
        (0, 9, 0),
        (7, 9, 7),
        (7, LIMIT + 1, 7),
    ],
)
def test_the_plan_is_what_was_asked_for_or_fits_the_split(asked: int | None, tokens: int, batches: int):
    assert evaluate.plan(TrainConfig(eval_iters=asked), tokens) == batches


def test_a_small_split_is_evaluated_whole_unless_told_otherwise(capsys):
    usual, whole = run("--eval_iters none", "usual"), run("--eval_iters 0", "whole")
    assert records(usual, "val_loss") == records(whole, "val_loss")
    assert re.search(r"^evaluation +the whole val split, every 3 steps$", capsys.readouterr().err, re.M)
    run("--eval_iters 5", "fixed")
    assert "5 batches of the val split, always the same, every 3 steps" in capsys.readouterr().err


@pytest.fixture
def loader() -> Loader:
    tokens = np.arange(60, dtype=np.uint16) % 11
    return Loader(tokens, 8, 11, seed=1, device=torch.device("cpu"), name="the text")


@pytest.fixture
def model() -> GPT:
    return GPT(ModelConfig(vocab_size=11, block_size=8, n_layer=1, n_head=2, n_embd=8, dropout=0.5)).train()


def test_the_batch_size_does_not_change_the_loss_of_the_whole_split(loader: Loader, model: GPT):
    losses = [evaluate.mean_loss(model, loader.whole(size), nullcontext()) for size in (1, 3, 7, 64)]
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-6)


def test_an_evaluation_drops_nothing_out_and_leaves_the_model_in_training(loader: Loader, model: GPT):
    config = TrainConfig(eval_iters=3, batch_size=2, block_size=8)
    first, again = (evaluate.mean_loss(model, evaluate.batches(loader, config), nullcontext()) for _ in range(2))
    assert first == again
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_evaluation_that_is_stopped_has_no_loss(loader: Loader, model: GPT):
    answers = iter([False, True])
    assert evaluate.mean_loss(model, loader.fixed(9, 1), nullcontext(), stopping=lambda: next(answers)) is None
    assert model.training
    assert list(answers) == []
