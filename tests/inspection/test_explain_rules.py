"""The rules of `fastgpt explain`: each finds its problem in a made curve, and none finds one in a healthy run."""

import dataclasses
import math
import re
from dataclasses import fields

import numpy as np
import pytest
import torch

from fastgpt.config.generation import GenerateConfig
from fastgpt.config.training import TrainConfig
from fastgpt.inspection.rules import RULES, Finding, diagnose
from fastgpt.inspection.symptoms import Case, spikes
from fastgpt.training.guard import Guard
from tests.helpers.histories import STEPS, healthy, history
from tests.helpers.places import ROOT

UNIFORM = math.log(65)
PROSE = "ROMEO: What light is this that breaks upon the hill? It is the east, and I have seen no dawn so fair as yours."


def noisy(curve: np.ndarray, size: float = 0.02) -> np.ndarray:
    return curve + np.random.default_rng(1).normal(0, size, curve.size)


def at_every(step: int, curve: np.ndarray) -> np.ndarray:
    return np.where(STEPS % step == 0, curve, np.nan)


def falling(end: float = 1.6) -> np.ndarray:
    return end + 2 * np.exp(-STEPS / 200)


def jumping() -> np.ndarray:
    return noisy(falling()) + np.where(np.isin(STEPS, (700, 710, 1100)), 1.5, 0)


def spent(steps: np.ndarray) -> np.ndarray:
    return np.where(steps < 100, steps / 100, np.where(steps < 700, 1.0, 0.1)) * 1e-3


def layered(key: str, late: list[float]) -> list[dict]:
    """A healthy run with a statistic that ends with other values."""
    records = healthy()
    for record in records:
        if "loss" in record:
            record["stats"] = {key: [None, 0.01, 0.02, None] if record["step"] < 1400 else late}
    return records


# The curves that differ from those of a healthy run, with the problem, and what its evidence says.
CURVES = {
    "no better than a guess": (
        {"loss": noisy(np.full(150, 4.4)), "val_loss": np.full(150, np.nan)},
        r"step 1,500, after a warm-up to step 100, .* is 4\.\d+; .* scores 4\.1744",
    ),
    "blown up at first": (
        {"loss": noisy(falling() + 4 * np.exp(-STEPS / 20))},
        r"at step 10 the train loss is 5\.\d+; a uniform guess scores 4\.1744",
    ),
    "diverging": (
        {"loss": noisy(falling() + np.maximum(0, STEPS - 800) / 800)},
        r"was 1\.6\d+ around step [78]\d0, and is 2\.\d+ at step 1,500",
    ),
    "stuck early": (
        {"loss": noisy(3.3 + np.exp(-STEPS / 40))},
        r"from step 950 to 1,500 the train loss went from 3\.\d+ to 3\.\d+; .* scores 4\.1744",
    ),
    "plateau": (
        {"loss": noisy(1.8 + np.exp(-STEPS / 100))},
        r"from step 950 to 1,500 the train loss went from 1\.\d+ to 1\.\d+$",
    ),
    "learning rate decayed early": (
        {"loss": noisy(1.8 + np.exp(-STEPS / 100)), "lr": spent},
        r"from step 950 to 1,500 .*; the learning rate was below a fifth of its peak",
    ),
    "overfitting": (
        {"val_loss": at_every(150, 1.8 + (np.maximum(STEPS, 600) - 600) / 3000 + np.maximum(0, 600 - STEPS) / 600)},
        r"lowest at step 600 \(1\.8000\) and is 2\.1000 at step 1,500, while train loss fell from 1\.\d+ to 1\.5",
    ),
    "spikes": (
        {"loss": jumping()},
        r"jumped from 1\.\d+ to 3\.\d+ at step 700, from 1\.\d+ to 3\.\d+ at step 1,100$",
    ),
    "gradient always clipped": (
        {"grad_norm": lambda steps: 30 + np.sin(steps)},
        r"since step 110 the gradient is clipped in 100% of the records; its norm is 30 \(median\)",
    ),
    "slower than before": (
        {"tokens_per_second": lambda steps: np.where(steps > 1000, 2000.0, 6400.0)},
        r"since step 1,010 training runs at 2,000 tokens/s; before, at up to 6,400",
    ),
    "warm-up never ended": (
        {"lr": lambda steps: steps * 5e-7},
        r"step 1,500, the last, .* to 0\.00075; its peak is 0\.001",
    ),
}


def found(records: list[dict], sample: str | None = None, **settings) -> dict[str, Finding]:
    return {finding.name: finding for finding in diagnose(Case(history(records, **settings), UNIFORM, sample))}


@pytest.mark.parametrize("name", CURVES)
def test_a_rule_finds_its_problem_and_no_other_does(name: str):
    changes, saying = CURVES[name]
    problems = found(healthy(**changes))
    assert list(problems) == [name]
    assert re.search(saying, problems[name].evidence)


@pytest.mark.parametrize("sample", [None, PROSE, "", "short"])
@pytest.mark.parametrize("records", [150, 90, 20, 3, 1])
def test_a_healthy_run_has_none_at_any_time(records: int, sample: str | None):
    assert found(healthy()[:records], sample) == {}


@pytest.mark.parametrize("seed", range(20))
def test_noise_is_no_problem(seed: int):
    noise = np.random.default_rng(seed).normal(0, 0.05, STEPS.size)
    val = np.random.default_rng(seed).normal(0, 0.004, STEPS.size)
    smooth = 1.45 + 0.75 * np.exp(-STEPS / 700) + 1.5 * np.exp(-STEPS / 40)
    assert found(healthy(loss=smooth + noise, val_loss=at_every(150, smooth + 0.1 + val))) == {}


def test_a_gradient_that_is_clipped_to_a_third_is_none():
    """As in the run of README's first command."""
    assert found(healthy(grad_norm=lambda steps: 3 + np.sin(steps))) == {}


@pytest.mark.parametrize("records", [200, 1000])
@pytest.mark.parametrize("noise", [0.05, 0.08])
def test_the_noise_of_small_batches_is_no_spike(records: int, noise: float):
    """The middle distance of ten records is often a third of the noise; twice the usual loss is a spike."""
    steps = np.arange(1, records + 1) * 10
    for seed in range(10):
        loss = (1.3 + 6 * steps**-0.4) * (1 + np.random.default_rng(seed).normal(0, noise, records))
        run = [
            {"step": int(step), "tokens": int(step), "loss": float(one)} for step, one in zip(steps, loss, strict=True)
        ]
        assert spikes(Case(history(run))) is None
        run[150]["loss"] *= 2.2
        assert "at step 1,510" in (spikes(Case(history(run))) or "")


def test_a_large_model_that_still_learns_is_no_plateau():
    """Loss by the fit of Hoffmann et al. (2022), of GPT-2 in 600,000 steps: it falls by 1.4% in the last 40%."""
    steps = np.linspace(1000, 600_000, 600)
    loss = 1.69 + 406.4 / 124e6**0.34 + 410.7 / (steps * 491_520) ** 0.28
    noisy_loss = loss * (1 + np.random.default_rng(0).normal(0, 0.005, steps.size))
    rate = 6e-5 + 2.7e-4 * (1 + np.cos(np.pi * steps / 600_000))
    run = [
        {"step": int(step), "tokens": int(step), "loss": float(one), "lr": float(lr)}
        for step, one, lr in zip(steps, noisy_loss, rate, strict=True)
    ]
    assert diagnose(Case(history(run), math.log(50257))) == []


def test_weights_of_another_model_may_begin_worse_than_a_guess():
    run = history(healthy(loss=noisy(falling() + 4 * np.exp(-STEPS / 20))))
    assert [one.name for one in diagnose(Case(run, UNIFORM))] == ["blown up at first"]
    assert diagnose(Case(dataclasses.replace(run, imported=True), UNIFORM)) == []


def test_a_fault_that_is_over_is_none():
    slow = healthy(tokens_per_second=lambda steps: np.where((steps > 700) & (steps < 1300), 2000.0, 6400.0))
    assert found(slow) == {}
    val = healthy(val_loss=at_every(150, np.where(STEPS == 1350, 2.0, 1.9)))
    assert found(val) == {}


def test_skipped_steps_and_rollbacks_are_told():
    guard = Guard(torch.device("cpu"), patience=5)
    guard.judge(torch.tensor(math.nan), torch.tensor(1.0))
    why = guard.read()[0].skipped
    place = {"step": 310, "tokens": 310 * 2048}
    records = [*healthy()[:30], place | {"skipped": why, "batch": 309}]
    assert found(records)["loss is not a number"].evidence == (
        "1 step changed nothing (step 310), the last because its loss is nan"
    )
    back = {"step": 300, "tokens": 1, "rolled_back_from": 315, "skipped": why, "batches": [300, 314]}
    (finding,) = found([*healthy()[:30], back]).values()
    assert (
        finding.evidence == "1 return to an earlier checkpoint, the last from step 315 to 300, because its loss is nan"
    )
    del back["skipped"]  # a damaged line
    assert found([*healthy()[:30], back])["loss is not a number"].evidence.endswith("of what its record does not say")
    (finding,) = found([*healthy()[:30], place | {"loss": None}]).values()
    assert finding.evidence == "the loss is not a number at step 310"


def test_steps_that_were_skipped_as_outliers_are_spikes():
    guard = Guard(torch.device("cpu"), patience=5, sigma=3.0)
    for loss in [*np.linspace(2, 2.1, 60), 9.0]:
        guard.judge(torch.tensor(loss, dtype=torch.float32), torch.tensor(1.0))
    why = guard.read()[-1].skipped
    records = healthy() + [{"step": step, "tokens": 1, "skipped": why, "batch": 1} for step in (1503, 1507)]
    (finding,) = found(records).values()
    assert (finding.name, finding.evidence) == (
        "spikes",
        "2 steps with such a loss changed nothing (steps 1,503 to 1,507)",
    )


def test_an_evaluation_set_that_changed_is_no_overfitting():
    records = healthy(val_loss=at_every(150, np.where(STEPS < 750, 1.0, 2.0 - STEPS / 3000)))
    assert list(found(records)) == ["overfitting"]
    at = next(i for i, record in enumerate(records) if record["step"] == 750)
    records.insert(at, {"step": 740, "tokens": 1, "val_set": "others"})
    assert found(records) == {}


@pytest.mark.parametrize(
    ("key", "late", "name", "evidence"),
    [
        ("dead_units", [None, 0.2, 0.73, None], "dead units", "at step 1,500, units dead: layer 1 73%"),
        (
            "update_ratio",
            [0.4, 0.2, 0.01, None],
            "updates too large",
            "since step 1,460, update / weight in a step: embeddings 0.4, layer 0 0.2",
        ),
    ],
)
def test_statistics_by_layer_are_judged_where_they_are_logged(key: str, late: list, name: str, evidence: str):
    (finding,) = found(layered(key, late)).values()
    assert (finding.name, finding.evidence) == (name, evidence)
    assert found(layered(key, [0.01] * 4)) == {}


@pytest.mark.parametrize(
    ("text", "share"),
    [("the king of the " * 14, "92%"), (PROSE + "and the " * 40, "7\\d%"), ("아버지가 방에 들어가신다. " * 9, "8\\d%")],
)
def test_a_sample_that_repeats_is_told(text: str, share: str):
    (finding,) = found(healthy(), text).values()
    assert finding.name == "output repeats"
    assert re.match(f"{share} of a sample of {len(text)} characters is a repetition; '", finding.evidence)


def test_advice_names_settings_that_exist_with_their_present_values():
    known = {field.name for kind in (TrainConfig, GenerateConfig) for field in fields(kind)}
    for rule in RULES:
        assert set(re.findall(r"{(\w+)}", rule.advice)) <= {field.name for field in fields(TrainConfig)}
        assert set(re.findall(r"`(\w+)`", rule.advice)) <= known
    advice = found(healthy(lr=lambda steps: steps * 5e-7))["warm-up never ended"].advice
    assert advice == "shorten `warmup_iters` (now 100) to a tenth of `max_iters` (now 1500)"
    (finding,) = diagnose(Case(history(healthy(), grad_clip=0.05)))
    expected = "lower `learning_rate` (now 0.001); if the loss falls well, raise `grad_clip` (now 0.05) above"
    assert finding.advice.startswith(expected)


def test_the_document_lists_the_rules():
    text = (ROOT / "docs" / "inspect.md").read_text(encoding="utf-8")
    table = text[text.index("| problem | looks for |") :]
    assert re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", table, re.M)[1 : len(RULES) + 1] == [
        (rule.name, rule.looks_for) for rule in RULES
    ]
