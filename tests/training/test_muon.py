"""Muon against PyTorch's own and against float64; which parameters it takes; what a step may change."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, cast

import pytest
import torch

from fastgpt.checkpoint import run_folder, store
from fastgpt.config.fields import validate
from fastgpt.config.training import ADJUSTMENTS, TrainConfig
from fastgpt.config.training import METHODS as METHOD_NAMES
from fastgpt.errors import UsageError
from fastgpt.model.gpt import GPT
from fastgpt.model.matrices import hidden_matrices
from fastgpt.training.muon import RATIOS, Muon
from fastgpt.training.optimizer import make_optimizer
from fastgpt.training.orthogonalize import MARGIN, METHODS
from fastgpt.training.schedule import learning_rate, momentum, set_learning_rate, set_momentum
from fastgpt.training.start import complete
from fastgpt.training.step import TrainStep

CPU = torch.device("cpu")
SHAPES = [(24, 24), (64, 16), (16, 64), (16, 40), (2, 8)]
SMALL = TrainConfig(
    optimizer="muon", vocab_size=29, block_size=8, n_layer=2, n_head=4, n_kv_head=2, n_embd=16,
    gradient_accumulation_steps=1, batch_size=2, learning_rate=3e-3, warmup_iters=0,
)  # fmt: skip


def weights(dtype: torch.dtype = torch.float32, shapes: Sequence[tuple[int, int]] = SHAPES) -> list[torch.nn.Parameter]:
    """As small as a model's, so that the rounding of the weights themselves is small beside an update."""
    random = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter((0.02 * torch.randn(shape, generator=random)).to(dtype)) for shape in shapes]


def muon(matrices: Sequence[torch.nn.Parameter], parts: Sequence[Sequence[int]] | None = None, **settings) -> Muon:
    """Without parameters for AdamW; the weights are one matrix each, or divided by their `parts`."""
    parts = parts or [(len(p),) for p in matrices]
    rest = [{"params": [torch.nn.Parameter(torch.zeros(1))], "weight_decay": 0.0}]
    return Muon(dict(zip(matrices, parts, strict=True)), 0.02, 0.1, groups=rest, **settings)


def train(optimizer: torch.optim.Optimizer, matrices: Sequence[torch.nn.Parameter], steps: int) -> list[torch.Tensor]:
    """The changes of the weights by steps on random gradients, the same for every optimizer."""
    before = [p.detach().double().clone() for p in matrices]
    random = torch.Generator().manual_seed(1)
    rest = [p for group in optimizer.param_groups for p in group["params"] if not any(p is q for q in matrices)]
    for _ in range(steps):
        for p in matrices:
            p.grad = torch.randn(p.shape, generator=random).to(p.dtype)
        for p in rest:
            p.grad = torch.ones_like(p)
        optimizer.step()
    return [p.detach().double() - old for p, old in zip(matrices, before, strict=True)]


def by_hand(matrices: Sequence[torch.nn.Parameter], steps: int, ratio: str, method: str) -> list[torch.Tensor]:
    """The same in plain loops in float64, matrix by matrix."""
    random = torch.Generator().manual_seed(1)
    now = [p.detach().double() for p in matrices]
    averages = [torch.zeros_like(p) for p in now]
    for _ in range(steps):
        for i, shape in enumerate(p.shape for p in matrices):
            gradient = torch.randn(shape, generator=random).double()
            averages[i] = 0.95 * averages[i] + 0.05 * gradient
            x = 0.05 * gradient + 0.95 * averages[i]
            values = torch.linalg.svdvals(x)
            x /= MARGIN * (values**4).sum() ** 0.25 if METHODS[method].tight else (values**2).sum() ** 0.5
            for a, b, c in METHODS[method].coefficients:
                x = a * x + b * x @ x.T @ x + c * x @ x.T @ x @ x.T @ x
            now[i] = (1 - 0.02 * 0.1) * now[i] - 0.02 * RATIOS[ratio](*shape) * x
    return [after - p.detach().double() for after, p in zip(now, matrices, strict=True)]


def assert_near(found: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor], tolerance: float) -> None:
    errors = [(a - b).norm().item() / b.norm().item() for a, b in zip(found, wanted, strict=True)]
    assert max(errors) < tolerance, errors


@pytest.mark.parametrize("steps", [1, 50])
@pytest.mark.parametrize("ratio", ADJUSTMENTS)
def test_updates_in_bfloat16_are_pytorchs(ratio: str, steps: int):
    ours, theirs = weights(), weights()
    peer = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn=ratio)
    optimizer = muon(ours, dtype=torch.bfloat16, ratio=ratio)
    assert_near(train(optimizer, ours, steps), train(peer, theirs, steps), 1e-2)


@pytest.mark.parametrize("steps", [1, 50])
@pytest.mark.parametrize("method", METHOD_NAMES)
@pytest.mark.parametrize("ratio", ADJUSTMENTS)
def test_updates_in_float32_are_those_of_plain_loops_in_float64(ratio: str, method: str, steps: int):
    ours = weights()
    optimizer = muon(ours, ratio=ratio, method=METHODS[method])
    wanted = by_hand(ours, steps, ratio, method)
    assert_near(train(optimizer, ours, steps), wanted, 1e-5)


def test_float32_is_nearer_to_float64_than_pytorchs_bfloat16():
    ours, theirs = weights(), weights()
    wanted = by_hand(ours, 1, "original", "newton_schulz")
    peer = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, momentum=0.95)
    with pytest.raises(AssertionError):
        assert_near(train(peer, theirs, 1), wanted, 1e-3)
    assert_near(train(muon(ours), ours, 1), wanted, 1e-5)


@pytest.mark.parametrize("parts", [(16, 16, 16), (32, 8, 8), (24, 24)], ids=["q, k, v", "grouped", "gate, up"])
def test_matrices_in_one_weight_are_updated_as_if_they_lay_apart(parts: tuple[int, ...]):
    (packed,) = weights(shapes=[(48, 16)])
    split = [torch.nn.Parameter(part.clone()) for part in packed.detach().split(parts)]
    together = train(muon([packed], [parts]), [packed], 3)[0]
    assert_near([together], [torch.cat(train(muon(split), split, 3))], 1e-5)
    (whole,) = weights(shapes=[(48, 16)])
    difference = train(muon([whole]), [whole], 3)[0] - together
    assert difference.norm() > 0.1 * together.norm()


def test_it_takes_the_matrices_of_the_blocks_and_adamw_the_rest():
    model = GPT(SMALL)
    matrices = hidden_matrices(model)
    names = {id(p): name for name, p in model.named_parameters()}
    kinds = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert {names[id(p)] for p in matrices} == {f"h.{i}.{kind}.weight" for i in range(2) for kind in kinds}
    assert matrices[model.h[0].get_parameter("attn.c_attn.weight")] == (16, 8, 8)
    assert all(sum(parts) == len(p) for p, parts in matrices.items())
    optimizer = make_optimizer(model, SMALL)
    grouped = [p for group in optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, grouped)) == sorted(map(id, model.parameters()))
    kept = {names[id(p)]: set(optimizer.state[p]) for p in model.parameters()}
    for p in model.parameters():
        assert kept[names[id(p)]] == ({"momentum"} if p in matrices else {"step", "exp_avg", "exp_avg_sq"})


def test_a_model_without_matrices_is_refused():
    model = torch.nn.Sequential(torch.nn.Embedding(3, 4), torch.nn.Linear(4, 3))
    with pytest.raises(UsageError, match="`optimizer` muon trains the matrices of blocks, and this model has none"):
        make_optimizer(cast(GPT, model), SMALL)


def test_its_rate_follows_the_schedule_and_its_momentum_a_line():
    config = dataclasses.replace(
        SMALL, max_iters=100, warmup_iters=10, muon_lr=0.03, muon_momentum=0.9, muon_momentum_warmup=20
    )
    optimizer = cast(Muon, make_optimizer(GPT(config), config))
    for step in (0, 5, 10, 20, 60, 100):
        rate = learning_rate(step, config)
        set_learning_rate(optimizer, rate)
        set_momentum(optimizer, momentum(step, config))
        assert [group["lr"] for group in optimizer.adam_groups] == [rate, rate]
        assert optimizer.matrix_group["lr"] == pytest.approx(rate * 10, rel=1e-12)
        assert optimizer.matrix_group["momentum"] == pytest.approx(min(0.9, 0.85 + 0.05 * step / 20))
    assert momentum(0, dataclasses.replace(config, muon_momentum_warmup=0)) == 0.9
    assert momentum(0, dataclasses.replace(config, muon_momentum=0.5)) == 0.5


def test_a_step_trains_with_the_momentum_of_its_number():
    """Warm-up of the momentum changes the second step, from which on momentum counts."""
    losses = [steps(muon_momentum_warmup=count)[1] for count in (0, 100)]
    assert not all(torch.equal(*pair) for pair in zip(*losses, strict=True))


def steps(count: int = 2, **changes: Any) -> tuple[TrainStep, list[torch.Tensor]]:
    """A model after some training steps, and its weights."""
    config = dataclasses.replace(SMALL, **changes)
    torch.manual_seed(0)
    step = TrainStep(GPT(config), config, CPU, torch.float32)
    tokens = torch.randint(29, (2, 9), generator=torch.Generator().manual_seed(0))
    for number in range(count):
        step(number, [(tokens[:, :-1], tokens[:, 1:])] * config.gradient_accumulation_steps)
    return step, [p.detach().clone() for p in step.model.parameters()]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_skipped_step_leaves_momentum_and_weights_as_they_are(bad: float):
    matrices = weights()
    optimizer = muon(matrices)
    train(optimizer, matrices, 2)

    def everything() -> list[torch.Tensor]:
        return [t.detach().clone() for p in matrices for t in (p, *optimizer.state[p].values())]

    before = everything()
    for p in matrices:
        p.grad = torch.full_like(p, bad)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert all(map(torch.equal, before, everything()))
    optimizer.found_inf = torch.tensor(0.0)
    train(optimizer, matrices, 1)
    assert not any(map(torch.equal, before, everything()))


def test_a_step_waits_for_no_verdict():
    """No scalar of the device is read: with tensors on the meta device, reading one would raise."""
    matrices = [torch.nn.Parameter(torch.zeros(shape, device="meta")) for shape in SHAPES]
    optimizer = muon(matrices)
    optimizer.found_inf = torch.zeros((), device="meta")
    optimizer.adam_groups = ()
    for p in matrices:
        p.grad = torch.zeros_like(p)
    optimizer.step()


def test_reset_takes_the_state_before_the_first_step():
    matrices = weights()
    optimizer = muon(matrices)
    train(optimizer, matrices, 1)
    assert all(optimizer.state[p]["momentum"].any() for p in matrices)
    optimizer.reset()
    assert not any(value.any() for state in optimizer.state.values() for value in state.values())


def test_a_gradient_of_zeros_only_decays():
    matrices = weights()
    optimizer = muon(matrices)
    before = [p.detach().clone() for p in matrices]
    for p in (*matrices, optimizer.param_groups[0]["params"][0]):
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for old, p in zip(before, matrices, strict=True):
        torch.testing.assert_close(p.detach(), old * (1 - 0.02 * 0.1))


def test_accumulated_gradients_are_those_of_one_batch():
    one, four = (steps(gradient_accumulation_steps=count)[1] for count in (1, 4))
    for a, b in zip(one, four, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_checkpoint_has_the_bytes_that_the_disk_is_checked_for():
    step, _ = steps()
    tensors = store.capture(2, step.model, step.optimizer, {}).tensors
    sizes = [tensor.nbytes for part in tensors.values() for tensor in part.values()]
    counters = sum("step" in state for state in step.optimizer.state.values())
    assert sum(sizes) == run_folder.checkpoint_bytes(SMALL, step.model.num_parameters()) + 4 * counters


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"muon_lr": 0.0}, "`muon_lr` 0.0 must be above 0"),
        ({"muon_momentum": 1.0}, "`muon_momentum` 1.0 must be below 1"),
        ({"muon_momentum_warmup": -1}, "`muon_momentum_warmup` -1 must be at least 0"),
        ({"muon_adjust_lr": "orginal"}, "is not one of original, match_rms_adamw"),
        ({"muon_method": "svd"}, "is not one of newton_schulz, polar_express"),
        ({"optimizer": "moun"}, "is not one of adamw, muon"),
    ],
)
def test_bad_settings_are_named(changes: dict[str, Any], message: str):
    with pytest.raises(UsageError, match=message):
        validate(dataclasses.replace(SMALL, **changes))


def test_a_setting_of_muon_that_would_change_nothing_is_refused():
    with pytest.raises(UsageError, match=r"`muon_lr` 0\.01 changes nothing with `optimizer` adamw"):
        complete("mini", {"muon_lr": 0.01})
    config, _ = complete("mini", {"muon_lr": 0.01, "optimizer": "muon"})
    assert (config.optimizer, config.muon_lr) == ("muon", 0.01)


@pytest.mark.slow
def test_a_compiled_step_takes_any_rate_without_compiling_again(monkeypatch: pytest.MonkeyPatch):
    ours, compiled = weights(), weights()
    eager, other = muon(ours), muon(compiled, compiled=True)
    changes: list[list[torch.Tensor]] = [[], []]
    for number in range(4):
        if number == 1:
            monkeypatch.setattr(torch._dynamo.config, "error_on_recompile", True)
        for optimizer, matrices, change in zip((eager, other), (ours, compiled), changes, strict=True):
            set_learning_rate(optimizer, 1e-3 * (1 + number))
            set_momentum(optimizer, 0.85 + number / 50)
            optimizer.found_inf = torch.tensor(float(number == 2))
            change += train(optimizer, matrices, 1)
    assert_near([c for c in changes[1] if c.any()], [c for c in changes[0] if c.any()], 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_on_a_gpu_updates_are_those_of_the_cpu_and_wait_for_nothing(compiled: bool):
    ours, others = weights(), weights()
    wanted = train(muon(ours, dtype=torch.bfloat16), ours, 2)
    with torch.device("cuda"):
        on_gpu = [torch.nn.Parameter(p.detach().cuda()) for p in others]
        optimizer = muon(on_gpu, dtype=torch.bfloat16, compiled=compiled)
    optimizer.found_inf = torch.zeros((), device="cuda")
    random = torch.Generator().manual_seed(1)
    optimizer.adam_groups = ()
    for _ in range(2):
        for p in on_gpu:
            p.grad = torch.randn(p.shape, generator=random).cuda()
        torch.cuda.set_sync_debug_mode("default" if compiled else "error")
        optimizer.step()
        torch.cuda.set_sync_debug_mode("default")
    changes = [p.detach().cpu().double() - old.detach().double() for p, old in zip(on_gpu, others, strict=True)]
    assert_near(changes, wanted, 3e-2)
