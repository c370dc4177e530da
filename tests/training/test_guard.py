"""The guard's verdicts: what is skipped, what is learned, when it shuts; and the optimizer that obeys them."""

import json
import math
import statistics

import pytest
import torch

from fastgpt.config.training import OPTIMIZERS, TrainConfig
from fastgpt.model.gpt import GPT
from fastgpt.training.guard import WARMUP, Guard
from fastgpt.training.optimizer import make_optimizer
from fastgpt.training.step import TrainStep

CPU = torch.device("cpu")
BAD = [math.nan, math.inf, -math.inf]


def judge(guard: Guard, loss: float, norm: float = 1.0, scale: float | None = None) -> float:
    scalars = torch.tensor(loss), torch.tensor(norm), None if scale is None else torch.tensor(scale)
    return guard.judge(*scalars).item()


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("which", ["loss", "norm"])
def test_what_is_not_finite_is_skipped_and_named(bad: float, which: str):
    guard = Guard(CPU, patience=5)
    values = {"loss": 2.0, "norm": 1.0}
    assert judge(guard, **values) == 0
    assert judge(guard, **values | {which: bad}) == 1
    assert judge(guard, **values) == 0
    first, second, third = guard.read()
    assert first.skipped is None is third.skipped
    assert second.skipped == {"loss": "its loss is ", "norm": "its gradient's norm is "}[which] + str(bad)
    assert (second.in_row, second.scaling) == (1, False)
    assert guard.read() == []


def test_it_shuts_after_so_many_in_a_row_and_stays_shut():
    guard = Guard(CPU, patience=3)
    losses = [2.0, math.nan, 2.0, math.nan, math.nan, 2.0, math.nan, math.nan, math.nan, 2.0, 2.0]
    assert [judge(guard, loss) for loss in losses] == [0, 1, 0, 1, 1, 0, 1, 1, 1, 1, 1]
    assert [verdict.in_row for verdict in guard.read()] == [0, 1, 0, 1, 2, 0, 1, 2, 3, 4, 5]
    guard.load_state_dict({})
    assert judge(guard, 2.0) == 0


def test_running_mean_and_deviation_are_those_of_the_losses_and_then_forget():
    guard = Guard(CPU, patience=5, sigma=6)
    losses = [3 + 0.1 * math.sin(7 * i) for i in range(40)]
    for loss in losses:
        judge(guard, loss)
    state = guard.state_dict()
    assert state["mean"] == pytest.approx(statistics.fmean(losses), abs=1e-5)
    assert state["variance"] == pytest.approx(statistics.pvariance(losses), abs=1e-5)
    for _ in range(600):
        judge(guard, 2.5)
    assert guard.state_dict()["mean"] == pytest.approx(2.5, abs=1e-4)


@pytest.mark.parametrize(("deviations", "skipped"), [(10, True), (7, True), (5, False), (-10, False)])
def test_a_loss_far_above_is_skipped_and_not_learned(deviations: float, skipped: bool):
    guard = Guard(CPU, patience=5, sigma=6)
    for i in range(WARMUP):
        judge(guard, 3 + 0.1 * (-1) ** i)
    before = guard.state_dict()
    spike = before["mean"] + deviations * math.sqrt(before["variance"])
    guard.read()
    assert judge(guard, spike) == skipped
    (verdict,) = guard.read()
    assert (guard.state_dict() == before | {"in_row": 1.0}) == skipped
    if skipped:
        assert verdict.skipped == f"its loss {verdict.loss:.4f} is 6 standard deviations above those before it"


def test_no_loss_is_too_high_before_it_knows_enough_or_where_nobody_asked():
    early, never = Guard(CPU, patience=5, sigma=6), Guard(CPU, patience=5)
    for i in range(WARMUP - 1):
        assert judge(early, 3 + 0.1 * (-1) ** i) == 0 == judge(never, 3.0)
    assert judge(early, 50.0) == 0 == judge(never, 50.0)


@pytest.mark.parametrize("bad", BAD)
def test_statistics_never_see_what_is_not_finite(bad: float):
    guard = Guard(CPU, patience=99, sigma=6)
    for _ in range(10):
        judge(guard, bad)
        judge(guard, 2.0, bad)
    assert guard.state_dict() == {"in_row": 20, "good": 0, "mean": 0, "variance": 0}
    judge(guard, 2.0)
    assert guard.state_dict() == {"in_row": 0, "good": 1, "mean": 2, "variance": 0}


def test_float16s_own_skips_are_no_bad_steps_but_at_a_scale_of_1_they_are():
    guard = Guard(CPU, patience=3)
    assert judge(guard, 2.0, math.inf, scale=1024.0) == 1
    assert judge(guard, 2.0, math.inf, scale=1.0) == 1
    assert judge(guard, math.nan, math.nan, scale=1024.0) == 1
    assert judge(guard, 2.0, math.inf, scale=1024.0) == 1  # neither ends the row nor prolongs it
    assert judge(guard, 2.0, scale=1024.0) == 0
    assert [(v.scaling, v.in_row) for v in guard.read()] == [(True, 0), (False, 1), (False, 2), (True, 0), (False, 0)]


def test_a_guard_goes_on_exactly_where_its_state_was_saved():
    one, other = (Guard(CPU, patience=3, sigma=4) for _ in range(2))
    for i in range(70):
        judge(one, 3 + 0.1 * math.sin(i))
    judge(one, math.nan)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    for loss in (3.0, 9.0, 2.9, math.nan, 3.05):
        assert judge(one, loss) == judge(other, loss)
        assert one.state_dict() == other.state_dict()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_that_is_told_so_changes_nothing_at_all(name: str):
    torch.manual_seed(0)
    config = TrainConfig(optimizer=name, vocab_size=11, block_size=8, n_layer=1, n_head=2, n_embd=8)
    model = GPT(config)
    optimizer = make_optimizer(model, config)

    def step(found: float, gradient: float) -> None:
        for p in model.parameters():
            p.grad = torch.full_like(p, gradient)
        optimizer.found_inf = torch.tensor(found)
        optimizer.step()

    def everything() -> list[torch.Tensor]:
        moments = [value for p in model.parameters() for value in optimizer.state[p].values()]
        return [t.detach().clone() for t in [*model.parameters(), *moments]]

    for found in (0.0, 1.0, 0.0, 1.0):  # the first step is skipped as well as later ones
        before = everything()
        step(found, math.nan if found else 0.1)
        same = [torch.equal(a, b) for a, b in zip(before, everything(), strict=True)]
        assert all(same) if found else not any(same)
    assert {state["step"].item() for state in optimizer.state.values() if "step" in state} == {2.0}


def test_a_step_waits_for_no_verdict():
    """No scalar of the device is read in a step: with tensors on the meta device, reading one would raise."""
    guard = Guard(torch.device("meta"), patience=3, sigma=6)
    scalar = torch.zeros((), device="meta")
    assert guard.judge(scalar, scalar, scalar).device.type == "meta"
    assert len(guard.unread) == 1


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_loss_leaves_float16s_scale_alone_and_a_bad_gradient_does_not(bad: float):
    config = TrainConfig(
        vocab_size=11, block_size=8, n_layer=1, n_head=2, n_embd=8, gradient_accumulation_steps=1, warmup_iters=0
    )
    step = TrainStep(GPT(config), config, CPU, torch.float16)
    loss, tokens = step._loss, torch.randint(11, (2, 9))
    batch = [(tokens[:, :-1], tokens[:, 1:])]
    before = step.scaler.get_scale()
    step._loss = lambda x, y: loss(x, y) + bad
    for number in range(3):
        step(number, batch)
    assert step.scaler.get_scale() == before
    step._loss = lambda x, y: loss(x, y) * 1e9  # finite, but not its gradient in float16 at this scale
    step(3, batch)
    step._loss = loss
    assert [verdict.scaling for verdict in step.guard.read()] == [False, False, False, True]
    assert step.scaler.get_scale() == before / 2
