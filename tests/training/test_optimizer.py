"""Parameter groups, and schedules checked at their ends, at their midpoints and for their shape."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt.config.model import ModelConfig
from fastgpt.config.training import OPTIMIZERS as NAMES
from fastgpt.config.training import TrainConfig
from fastgpt.model.gpt import GPT
from fastgpt.model.moments import count_moments
from fastgpt.training.optimizer import OPTIMIZERS, clip, make_optimizer
from fastgpt.training.schedule import learning_rate, set_learning_rate

SCHEDULES = ("cosine", "linear", "constant", "wsd")


def config(schedule: str = "cosine", **changed) -> TrainConfig:
    values = {"learning_rate": 1.0, "min_lr": 0.1, "warmup_iters": 10, "max_iters": 110, "schedule": schedule}
    return TrainConfig(**(values | changed))


@pytest.fixture(scope="module")
def model() -> GPT:
    return GPT(ModelConfig(vocab_size=30, block_size=8, n_layer=1, n_head=2, n_embd=16))


def test_only_matrices_decay_and_every_parameter_is_in_one_group(model: GPT):
    optimizer = make_optimizer(model, TrainConfig(weight_decay=0.3, beta1=0.8, beta2=0.9))
    decayed, plain = optimizer.param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    assert {p.dim() for p in decayed["params"]} == {2}
    assert {p.dim() for p in plain["params"]} == {1}
    assert {id(p) for p in decayed["params"] + plain["params"]} == {id(p) for p in model.parameters()}
    assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters()))
    assert all(group["fused"] and group["betas"] == (0.8, 0.9) for group in optimizer.param_groups)


def test_every_optimizer_keeps_what_checkpoints_and_memory_are_counted_by():
    assert OPTIMIZERS.keys() == set(NAMES)
    shape = {"block_size": 8, "n_layer": 3, "n_head": 2, "n_kv_head": 1, "n_embd": 16, "n_inner": 24}
    for name in NAMES:
        config = TrainConfig(optimizer=name, vocab_size=128, **shape)  # no padding, which checkpoints leave out
        model = GPT(config)
        state = make_optimizer(model, config).state
        kept = [(p, value) for p in model.parameters() for value in state[p].values()]
        assert all(value.dtype == torch.float32 for _, value in kept)
        assert all(value.shape in ((), p.shape) for p, value in kept)
        assert count_moments(config, model.num_parameters()) == sum(value.numel() for _, value in kept if value.dim())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_model_without_vectors_is_trained_too(name: str):
    model = GPT(ModelConfig(vocab_size=30, block_size=8, n_layer=1, n_head=2, n_embd=16))
    for module in model.modules():
        for key in [key for key, p in module.named_parameters(recurse=False) if p.dim() < 2]:
            module.register_parameter(key, None)
    optimizer = make_optimizer(model, TrainConfig(optimizer=name))
    before = [p.detach().clone() for p in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert not any(map(torch.equal, before, model.parameters()))


def test_without_gradients_matrices_shrink_and_vectors_stay(model: GPT):
    optimizer = make_optimizer(model, TrainConfig(weight_decay=0.5))
    set_learning_rate(optimizer, 0.1)
    before = [p.detach().clone() for p in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for old, new in zip(before, model.parameters(), strict=True):
        torch.testing.assert_close(new.detach(), old * (0.95 if old.dim() == 2 else 1.0))


def test_steps_are_those_of_pytorchs_fused_adamw_bit_for_bit():
    models = [GPT(ModelConfig(vocab_size=30, block_size=8, n_layer=1, n_head=2, n_embd=16)) for _ in range(2)]
    models[1].load_weights(models[0].weights())
    ours = make_optimizer(models[0], TrainConfig())
    theirs = torch.optim.AdamW(
        [{"params": group["params"], "weight_decay": group["weight_decay"]} for group in ours.param_groups],
        betas=ours.param_groups[0]["betas"],
        fused=True,
    )
    for group, own in zip(theirs.param_groups, ours.param_groups, strict=True):
        of = dict(zip(models[0].parameters(), models[1].parameters(), strict=True))
        group["params"] = [of[p] for p in own["params"]]
    for rate in (0.1, 0.2, 0.05):
        for optimizer, model in zip((ours, theirs), models, strict=True):
            torch.manual_seed(int(1 / rate))
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
            set_learning_rate(optimizer, rate)
            optimizer.step()
    states = [optimizer.state_dict()["state"] for optimizer in (ours, theirs)]
    for i, state in states[0].items():
        assert all(torch.equal(value, states[1][i][name]) for name, value in state.items())
    assert all(torch.equal(p, q) for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True))


@pytest.mark.parametrize("limit", [0.0, 0.5, 100.0])
def test_clipping_is_pytorchs_and_returns_the_norm_before_it(model: GPT, limit: float):
    parameters = list(model.parameters())
    torch.manual_seed(0)
    gradients = [torch.randn_like(p) for p in parameters]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    wanted = torch.nn.utils.clip_grad_norm_(parameters, limit or math.inf)
    clipped = [p.grad for p in parameters]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    assert clip(parameters, limit) == wanted > 1
    assert all(torch.equal(p.grad, wanted) for p, wanted in zip(parameters, clipped, strict=True))


def test_a_norm_that_is_not_a_number_reaches_every_gradient():
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    parameters[0].grad, parameters[1].grad = torch.tensor([math.nan, 0.0]), torch.ones(2)
    assert clip(parameters, 1.0).isnan()
    assert all(p.grad is not None and p.grad.isnan().all() for p in parameters)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warm_up_is_a_line_to_the_peak(schedule: str):
    rates = [learning_rate(step, config(schedule)) for step in range(11)]
    assert rates == pytest.approx([(step + 1) / 11 for step in range(11)])


@pytest.mark.parametrize(
    ("schedule", "step", "rate"),
    [
        ("cosine", 10, 1.0),
        ("cosine", 35, 0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2),
        ("cosine", 60, 0.55),
        ("cosine", 110, 0.1),
        ("cosine", 10_000, 0.1),
        ("linear", 10, 1.0),
        ("linear", 35, 0.775),
        ("linear", 60, 0.55),
        ("linear", 110, 0.1),
        ("linear", 10_000, 0.1),
        ("constant", 60, 1.0),
        ("constant", 10_000, 1.0),
        ("wsd", 60, 1.0),
        ("wsd", 88, 1.0),
        ("wsd", 99, 0.55),
        ("wsd", 110, 0.1),
        ("wsd", 10_000, 0.1),
    ],
)
def test_values_at_the_ends_and_midpoints(schedule: str, step: int, rate: float):
    assert learning_rate(step, config(schedule)) == pytest.approx(rate, rel=1e-12)


@settings(deadline=None)
@given(
    schedule=st.sampled_from(SCHEDULES),
    warmup=st.integers(0, 60),
    end=st.integers(1, 60),
    final=st.floats(0, 1),
    decays=st.booleans(),
)
def test_rates_rise_in_warm_up_then_never_again_and_stay_within_bounds(schedule, warmup, end, final, decays):
    chosen = config(schedule, warmup_iters=warmup, lr_decay_iters=end, min_lr=final, decay_lr=decays)
    rates = [learning_rate(step, chosen) for step in range(130)]
    assert all(0 < rate <= 1 for rate in rates[:warmup])
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    assert all(final <= rate <= 1 for rate in rates[warmup:])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_decay_lr_off_is_the_constant_schedule(schedule: str):
    for step in (0, 5, 10, 60, 200):
        off = learning_rate(step, config(schedule, decay_lr=False))
        assert off == learning_rate(step, config("constant"))


def test_lr_decay_iters_and_min_lr_have_nanogpts_defaults():
    assert learning_rate(110, config(min_lr=None)) == pytest.approx(0.1)
    assert learning_rate(60, config(lr_decay_iters=60)) == pytest.approx(0.1)
    assert learning_rate(60, config(lr_decay_iters=None)) == pytest.approx(0.55)


def test_the_rate_reaches_every_group(model: GPT):
    optimizer = make_optimizer(model, TrainConfig())
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]
