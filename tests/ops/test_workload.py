"""The cases that `--kernels auto` checks and times: their numbers, their results, and what they write."""

from typing import Any

import pytest
import torch

from fastgpt.config.model import ModelConfig
from fastgpt.config.training import TrainConfig
from fastgpt.model import workloads
from fastgpt.ops.recorder import Recorder
from fastgpt.ops.table import TABLE
from fastgpt.ops.workload import Call, Case, TensorSpec, checked_cases, smaller, timed_case
from fastgpt_kernels import torch_ops

CPU = torch.device("cpu")
SHAPE: dict[str, Any] = {"n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 32, "block_size": 20, "vocab_size": 256}
TRAINING = workloads.training(TrainConfig(**SHAPE, batch_size=3, dropout=0.1), torch.float32)
GENERATION = workloads.generation(ModelConfig(**SHAPE), torch.bfloat16, B=3, int8=True)
# Operations of options that the default model does not take.
OPTIONAL = ("rms_norm", "add_rms_norm", "swiglu", "relu2")
USED = {
    "training": (TRAINING, ("layer_norm", "add_layer_norm", "causal_attention", "linear_cross_entropy")),
    "generation": (GENERATION, tuple(op for op in TABLE if op not in ("linear_cross_entropy", *OPTIONAL))),
}
cases = pytest.mark.parametrize(("work", "op"), [(work, op) for work, (_, ops) in USED.items() for op in ops])


def tensors(case: Case) -> list[torch.Tensor]:
    """The inputs that are there."""
    return [t for t in case.inputs if t is not None]


@pytest.mark.parametrize("work", USED)
def test_each_operation_that_is_used_has_cases(work):
    workload, ops = USED[work]
    assert workload.ops == ops
    assert workload.calls.timed.keys() == workload.calls.checked.keys() == set(ops)


@cases
def test_every_case_gives_finite_results_and_stays_as_it_is(work, op):
    for case in checked_cases(op, USED[work][0], CPU):
        before = [t.detach().clone() for t in tensors(case)]
        first, again = case.results(TABLE[op].torch), case.results(TABLE[op].torch)
        assert first
        for name, t in first.items():
            assert t.isfinite().all(), name
            assert torch.equal(t, again[name]), name
        for t, old in zip(tensors(case), before, strict=True):
            assert torch.equal(t, old)
        wide = case.in_float64().results(TABLE[op].reference)
        assert wide.keys() == first.keys()
        assert {t.dtype for t in wide.values()} == {torch.float64}


@cases
def test_what_is_recorded_in_place_of_results_is_like_them(work, op):
    """So that a new operation whose results are not like its first input is found here; see `recorder.RESULTS`."""
    for case in checked_cases(op, USED[work][0], CPU):
        if case.arguments.get("reduction") == "none":  # which the model does not ask for
            continue
        stand_in = getattr(Recorder().ops, op)
        on_meta = tuple(t if t is None else t.to("meta") for t in case.inputs)
        results = TABLE[op].torch(*case.inputs, **case.arguments), stand_in(*on_meta, **case.arguments)
        real, recorded = (out if isinstance(out, tuple) else (out,) for out in results)
        for a, b in zip(real, recorded, strict=True):
            assert (a is None) == (b is None)
            assert a is None or (a.shape, a.dtype) == (b.shape, b.dtype)


@cases
def test_the_same_numbers_are_drawn_each_time(work, op):
    torch.manual_seed(0)
    one, two = (tensors(timed_case(op, USED[work][0], CPU)) for _ in range(2))
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a, b)
    assert torch.initial_seed() == 0


def test_a_write_is_seen_in_copies_of_the_pages():
    for case in checked_cases("kv_write", GENERATION, CPU):
        k, v, *pages, slots = tensors(case)
        found = case.results(torch_ops.kv_write)
        for written, pool, t in zip(found.values(), pages, (k, v), strict=True):
            assert torch.equal(written.flatten(0, 1)[slots], t)
            assert not torch.equal(written, pool)


def test_views_of_one_storage_are_drawn_so_and_content_is_kept():
    table = torch.tensor([[2, 0]], dtype=torch.int32)
    q = TensorSpec((2, 3), (8, 1), torch.bfloat16, False, storage=0, offset=0)
    k = TensorSpec((2, 4), (8, 1), torch.bfloat16, False, storage=0, offset=4)
    pages = TensorSpec((1, 2), (2, 1), torch.int32, False, storage=1, offset=0, content=table.numpy().tobytes())
    case = Call("paged_attention", (q, k, None, pages), (("scale", 2.0),), None, torch.float32).case(CPU)
    assert [t if t is None else (t.shape, t.stride()) for t in case.inputs] == [
        ((2, 3), (8, 1)),
        ((2, 4), (8, 1)),
        None,
        ((1, 2), (2, 1)),
    ]
    left, right, given = tensors(case)
    assert right.data_ptr() - left.data_ptr() == 4 * left.element_size()
    assert torch.equal(given, table)
    assert case.arguments == {"scale": 2.0}


def test_logits_and_quantized_weights_are_a_few_units_wide():
    x, weight, _ = tensors(timed_case("linear_cross_entropy", TRAINING, CPU))
    assert 1 < (x @ weight.T).std() < 4
    x, weight, scale, _ = tensors(timed_case("linear_int8", GENERATION, CPU))
    assert 0.5 < (weight * scale[:, None]).abs().max() < 8
    assert scale.min() > 0


@pytest.mark.parametrize(("T", "small"), [(1, 1), (256, 256), (257, 257), (384, 256), (1000, 360), (16384, 256)])
def test_what_is_checked_is_small_and_ends_in_the_same_part_of_a_tile(T, small):
    assert smaller(64, T) == (2, small)
    assert smaller(1, T) == (1, small)
