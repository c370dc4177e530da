"""The recipe of GPT-2 124M is a configuration that loads, with the published numbers and the preset's model."""

import dataclasses

import pytest

from fastgpt import cli
from fastgpt.config.training import PRESETS, TrainConfig
from fastgpt.training.schedule import learning_rate
from tests.helpers.places import ROOT

RECIPE = ROOT / "recipes" / "gpt2-124m.toml"
# The recipe's own; all others are the preset's.
CHANGED = {
    "out_dir", "dataset", "batch_size", "gradient_accumulation_steps", "max_iters", "warmup_iters", "min_lr",
    "eval_interval", "eval_iters", "pack",
}  # fmt: skip


@pytest.fixture(scope="module")
def recipe() -> TrainConfig:
    return cli.parse(TrainConfig, ["--config", str(RECIPE)], prog="train", description="", presets=PRESETS)


def test_a_step_and_a_run_have_the_published_tokens(recipe):
    assert recipe.tokens_per_step == 2**19
    assert recipe.max_iters * recipe.tokens_per_step == pytest.approx(10.26e9, rel=1e-3)
    assert recipe.eval_iters * recipe.batch_size * recipe.block_size == 10 * 2**20


def test_it_changes_what_it_says_and_keeps_the_presets_model_and_optimizer(recipe):
    preset = PRESETS["gpt2"]
    assert recipe.architecture() == preset.architecture()
    fields = [field.name for field in dataclasses.fields(TrainConfig)]
    assert {name for name in fields if getattr(recipe, name) != getattr(preset, name)} == CHANGED
    assert preset.tokens_per_step == pytest.approx(recipe.tokens_per_step, rel=0.07)


@pytest.mark.parametrize(("step", "rate"), [(0, 1e-6), (350, 0.000301), (699, 6e-4), (10_000, 0.000306), (19_559, 0.0)])
def test_the_rate_is_that_of_the_published_log(recipe, step: int, rate: float):
    assert learning_rate(step, recipe) == pytest.approx(rate, abs=2e-6)
