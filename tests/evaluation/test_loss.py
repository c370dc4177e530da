"""Evaluations: the same windows every time, and the mean over exactly the targets that count."""

import re
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from fastgpt.config.model import ModelConfig
from fastgpt.data.loader import Loader
from fastgpt.evaluation import loss as evaluation_loss
from fastgpt.evaluation.loss import EvaluationSet
from fastgpt.model.gpt import GPT
from tests.helpers.runs import TEXT, parts, records, run

pytestmark = pytest.mark.usefixtures("workplace")
LIMIT = evaluation_loss.WHOLE_SPLIT_LIMIT


def test_an_evaluation_of_windows_is_the_mean_over_even_distances():
    out = run("--eval_iters 3 --max_iters 5 --eval_interval 5 --dropout 0.2")
    model, _, loader = parts(out, "latest")
    text, T = torch.from_numpy(loader.tokens.astype(np.int64)), 8
    starts = [number * (len(text) - T - 1) // 11 for number in range(12)]  # 3 batches of 4
    windows = torch.stack([text[start : start + T + 1] for start in starts])
    assert starts[-1] + T + 1 == len(text)
    with torch.no_grad():
        loss = model(windows[:, :-1], windows[:, 1:]).item()
    assert records(out, "val_loss") == {5: pytest.approx(loss, rel=1e-6)}


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
    assert evaluation_loss.plan(asked, tokens) == batches


def test_a_small_split_is_evaluated_whole_unless_told_otherwise(capsys):
    usual, whole = run("--eval_iters none", "usual"), run("--eval_iters 0", "whole")
    assert records(usual, "val_loss") == records(whole, "val_loss")
    assert re.search(r"^evaluation +the whole val split, every 3 steps$", capsys.readouterr().err, re.M)
    run("--eval_iters 5", "fixed")
    share = round(100 * 5 * 4 * 8 / (len(TEXT) - int(0.9 * len(TEXT))))
    told = f"20 windows evenly spaced over the val split, {share}% of its tokens, every 3 steps"
    assert told in capsys.readouterr().err


@pytest.fixture
def loader() -> Loader:
    tokens = np.arange(60, dtype=np.uint16) % 11
    return Loader(tokens, 8, 11, seed=1, device=torch.device("cpu"), name="the text")


@pytest.fixture
def model() -> GPT:
    return GPT(ModelConfig(vocab_size=11, block_size=8, n_layer=1, n_head=2, n_embd=8, dropout=0.5)).train()


def test_the_batch_size_does_not_change_the_loss_of_the_whole_split(loader: Loader, model: GPT):
    losses = [evaluation_loss.mean_loss(model, loader.whole(size), nullcontext()) for size in (1, 3, 7, 64)]
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-6)


def test_the_batch_size_does_not_change_the_loss_of_windows(loader: Loader, model: GPT):
    losses = [evaluation_loss.mean_loss(model, loader.windows(10, size), nullcontext()) for size in (1, 3, 7, 64)]
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-6)


@pytest.mark.parametrize("windows", [0, 6, 7])
def test_the_batches_of_a_set_are_counted_without_reading_them(loader: Loader, windows: int):
    chosen = EvaluationSet(windows, 2, 8, len(loader.tokens), "")
    assert chosen.count == len(list(chosen.batches(loader)))


def test_an_evaluation_drops_nothing_out_and_leaves_the_model_in_training(loader: Loader, model: GPT):
    chosen = EvaluationSet(6, 2, 8, len(loader.tokens), "")
    first, again = (evaluation_loss.mean_loss(model, chosen.batches(loader), nullcontext()) for _ in range(2))
    assert first == again
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_evaluation_that_is_stopped_has_no_loss(loader: Loader, model: GPT):
    answers = iter([False, True])
    assert evaluation_loss.mean_loss(model, loader.windows(9, 1), nullcontext(), stopping=lambda: next(answers)) is None
    assert model.training
    assert list(answers) == []
