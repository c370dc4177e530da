"""A profile names every operation that a model calls, and its parts add up to the whole."""

import dataclasses
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastgpt.config.inspection import ProfileConfig
from fastgpt.errors import UsageError
from fastgpt.inspection import least_work, profile, scopes
from fastgpt.inspection.profile import Profile, Row
from fastgpt.inspection.profile_view import modules
from fastgpt.inspection.scopes import BACKWARD, FORWARD, GRADIENT, IDLE, OP, OTHER, PHASE, STEP, Place, attribute
from fastgpt.ops.ceilings import Ceilings
from fastgpt.ops.counts import Count

CPU = torch.device("cpu")
LAYERS = 3
SMALL = ProfileConfig(
    n_layer=LAYERS,
    n_head=4,
    n_kv_head=2,
    n_embd=16,
    block_size=32,
    vocab_size=50,
    batch_size=4,
    dropout=0.1,
    device="cpu",
    dtype="float32",
    threads=1,
)
LINEARS = ("qkv", "attention projection", "MLP up", "MLP down")
CALLS = {"layer_norm": 1, "add_layer_norm": 2 * LAYERS, "causal_attention": LAYERS, "activation": LAYERS}
CALLS |= dict.fromkeys(LINEARS, LAYERS)


@pytest.fixture(scope="module", autouse=True)
def short():
    """Measurements of a moment."""
    monkeypatch = pytest.MonkeyPatch()
    for name, value in {"SECONDS": 0.0, "MOST": 4, "MOST_TOKENS": 16, "FEWEST": 4, "SMALL": 0.0}.items():
        monkeypatch.setattr(profile, name, value)
    yield
    monkeypatch.undo()


def quiet(line: str) -> None:
    """Says nothing."""


def trained(**changes) -> Profile:
    (found,) = profile.training(dataclasses.replace(SMALL, **changes), None, quiet).profiles
    return found


@pytest.fixture(scope="module")
def step() -> Profile:
    return trained()


def row(found: Profile, name: str) -> Row:
    return next(row for row in found.rows if row.name == name)


def limit_of(found: Profile, name: str) -> tuple[str, float]:
    limit = row(found, name).limit
    assert limit is not None
    return limit.by, limit.seconds


def test_parts_add_up_to_the_step(step: Profile):
    assert step.kept >= 2
    assert sum(row.total for row in step.rows) == pytest.approx(step.seconds)
    assert sum(step.places.values()) == pytest.approx(step.seconds)
    assert sum(sum(times.values()) for times in modules(step).values()) == pytest.approx(step.seconds)


def test_every_operation_of_a_step_has_its_calls_and_both_directions(step: Profile):
    calls = CALLS | {"embedding": 1, "linear_cross_entropy": 1, "dropout": 2 * LAYERS + 1}
    for name, count in calls.items():
        found = row(step, name)
        assert found.calls == count, name
        assert found.seconds[FORWARD] > 0, name
        assert found.seconds[BACKWARD] > 0, name
        assert found.work is not None
        assert found.work.calls == count, name
    for name in ("optimizer", "clip"):
        assert row(step, name).total > 0
    assert {row.name for row in step.rows} == {
        *calls, "heads", "optimizer", "clip", "guard", "gradients freed", "gradients kept", OTHER
    }  # fmt: skip


def test_a_modern_model_and_muon_have_rows_of_their_own():
    found = trained(
        norm="rmsnorm", qk_norm=True, mlp="swiglu", position="rotary", tie=False, optimizer="muon", n_kv_head=1
    )
    calls = {"rms_norm": 1, "add_rms_norm": 2 * LAYERS, "query and key norms": LAYERS, "activation": LAYERS}
    assert {name: row(found, name).calls for name in calls} == calls
    assert all(row(found, name).work is not None for name in (*calls, "optimizer", "MLP up"))
    assert not {"layer_norm", "swiglu"} & {one.name for one in found.rows}
    works = [row(one, "optimizer").work for one in (found, trained(optimizer="adamw"))]
    muon, adamw = (work.counts["update"].flops for work in works if work is not None)
    assert muon > adamw > 0
    assert sum(one.total for one in found.rows) == pytest.approx(found.seconds)


def test_modules_have_their_own_time(step: Profile):
    layers = {f"h.{layer}.{part}" for layer in range(LAYERS) for part in ("norms", "attn", "mlp")}
    found = modules(step)
    assert layers | {"embedding", "ln_f", "head", "optimizer"} <= found.keys()
    attention = sum(found[f"h.{layer}.attn"][BACKWARD] for layer in range(LAYERS))
    parts = [row(step, name).seconds[BACKWARD] for name in ("causal_attention", "qkv", "attention projection", "heads")]
    assert attention == pytest.approx(sum(parts))


@pytest.mark.parametrize("changes", [{"position": "rotary", "dropout": 0.0, "bias": False}, {"pack": True}])
def test_other_models_have_the_same_rows(changes):
    found = trained(**changes)
    assert {name: row(found, name).calls for name in CALLS} == CALLS
    assert found.works.keys() <= {row.name for row in found.rows}
    assert ("dropout" in found.works) == (changes.get("dropout") != 0)


def test_a_token_and_its_prefill():
    config = dataclasses.replace(SMALL, dropout=0.0)
    prefill, token = profile.generation(config, None, quiet).profiles
    for found in (prefill, token):
        calls = CALLS | {"cache": LAYERS, "embedding": 1, "logits": 1, "sampling": 1}
        assert {name: row(found, name).calls for name in calls} == calls
        assert not any(place.direction == BACKWARD for place in found.places)
        assert sum(row.total for row in found.rows) == pytest.approx(found.seconds)
    assert (prefill.what, token.what) == ("prefill of 16 tokens", "token after 16 to 31 others")
    # one query of 4 heads of 4 numbers with 24 keys in the cache and its own
    assert token.works["causal_attention"].counts[FORWARD].flops == 4 * 4 * 4 * 25


def test_limits_are_those_of_made_ceilings(step: Profile):
    by_memory = step.against(Ceilings(1e9, 1e9, {"float32": 1e30}))
    by_arithmetic = step.against(Ceilings(1e30, 1e30, {"float32": 1e9}))
    N, C, inner = 4 * 32, 16, 64
    moved = (N * C + C * inner + inner + N * inner) + (2 * N * C + 2 * C * inner + inner + N * inner)
    computed = 3 * 2 * N * C * inner + 2 * N * inner
    assert limit_of(by_memory, "MLP up") == ("memory", pytest.approx(LAYERS * moved * 4 / 1e9))
    assert limit_of(by_arithmetic, "MLP up") == ("arithmetic", pytest.approx(LAYERS * computed / 1e9))
    parameters = 50 * 16 + 32 * 16  # of the embeddings; the vocabulary of 50 is padded
    assert limit_of(by_memory, "optimizer")[1] > 7 * 4 * parameters / 1e9
    assert row(by_memory, OTHER).limit is None
    assert by_memory.least == pytest.approx(sum(row.limit.seconds for row in by_memory.rows if row.limit))


def test_the_most_to_win_is_farthest_above_its_limit():
    def made(name: str, seconds: float, flops: float) -> Row:
        return Row(name, 1, {FORWARD: seconds}, least_work.Work(1, {FORWARD: Count(flops, 0)}))

    rows = [made("slow", 10.0, 9e9), made("far", 5.0, 1e9), made("fast", 1.0, 2e9), Row(OTHER, 0, {"": 20.0})]
    works = {row.name: row.work for row in rows if row.work}
    found = Profile("step", 36.0, 35.0, 1, 1, rows, {}, works).against(Ceilings(1e9, 1e9, {"float32": 1e9}))
    assert found.most_to_win is not None
    assert (found.most_to_win.name, found.most_to_win.gain) == ("far", 4.0)
    assert [row.reached for row in found.rows] == [0.9, 0.2, 2.0, None]
    assert found.rows[2].gain == 0.0  # faster than the ceilings allow: its data were in the caches
    assert dataclasses.replace(found, rows=found.rows[:2]).most_to_win is None  # as in compiled code


def event(name: str, start: float, end: float, *children, number: int = -1, kernels=()) -> Any:
    """An event of a made profile, times in microseconds."""
    made = SimpleNamespace(
        name=name,
        device_type=scopes.DeviceType.CPU,
        sequence_nr=number,
        time_range=SimpleNamespace(start=start, end=end),
        cpu_parent=None,
        cpu_children=list(children),
        kernels=[SimpleNamespace(name=kernel, duration=duration) for kernel, duration in kernels],
    )
    for child in children:
        child.cpu_parent = made
    return made


def test_a_gpus_kernels_count_and_gradients_come_from_another_thread():
    launched = event("aten::mm", 12, 20, number=7, kernels=[("gemm", 100.0)])
    call = event(PHASE + FORWARD, 10, 30, event(OP + "qkv", 11, 25, event("aten::t", 11, 12, number=7), launched))
    step = event(STEP, 0, 1000, call)
    gradient = event(GRADIENT + "MmBackward0", 400, 500, number=7, kernels=[("gemm", 200.0), ("add", 50.0)])
    (found,) = attribute([step, call, launched, gradient], on_gpu=True)
    seconds = {
        Place(FORWARD, "", "qkv"): 100e-6, Place(BACKWARD, "", "qkv"): 250e-6, Place(op=IDLE): 650e-6
    }  # fmt: skip
    assert found.seconds == pytest.approx(seconds)
    assert (found.total, found.calls["qkv"]) == (pytest.approx(1000e-6), 1)
    (named,) = attribute([step, call, launched, gradient], on_gpu=True, by_name=True)
    by_name = Counter(
        {place.op: round(1e6 * seconds) for place, seconds in named.seconds.items() if not place.direction}
    )
    assert by_name == {IDLE: 650}
    assert named.seconds[Place(BACKWARD, "", "gemm")] == pytest.approx(200e-6)


def test_time_on_a_cpu_goes_to_the_innermost_scope_of_the_last_call_with_a_number():
    norm = event("aten::layer_norm", 12, 15, number=7)  # makes nothing, and so has the next one's number
    first = event(OP + "layer_norm", 11, 16, norm)
    second = event(OP + "qkv", 17, 25, event("aten::mm", 18, 24, number=7))
    gradient = event(GRADIENT + "MmBackward0", 40, 50, event("aten::mm", 41, 49), number=7)
    step = event(STEP, 0, 60, event(PHASE + FORWARD, 10, 30, first, second), gradient)
    (found,) = attribute([step])
    micro = {place: round(1e6 * seconds) for place, seconds in found.seconds.items() if seconds > 1e-9}
    assert micro == {
        Place(FORWARD, "", "layer_norm"): 5,
        Place(FORWARD, "", "qkv"): 8,
        Place(BACKWARD, "", "qkv"): 10,
        Place(FORWARD, "", OTHER): 7,
        Place("", "", OTHER): 30,
    }


def test_a_batch_that_cannot_fit_is_refused():
    with pytest.raises(UsageError, match="`batch_size` 10000000 with `block_size` 32 does not fit"):
        trained(batch_size=10**7, n_embd=1024)
    with pytest.raises(UsageError, match="`compile` with `generate`"):
        profile.generation(dataclasses.replace(SMALL, compile=True), None, quiet)
