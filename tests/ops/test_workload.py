"""The calls that `--kernels auto` checks and times are those that the model makes."""

import dataclasses
from typing import Any

import pytest
import torch

from fastgpt.config.generation import SamplingParams
from fastgpt.config.model import ModelConfig
from fastgpt.config.training import PRESETS, TrainConfig
from fastgpt.errors import UsageError
from fastgpt.generation.generator import TextGenerator
from fastgpt.model.gpt import GPT
from fastgpt.model.int8 import quantize_model
from fastgpt.ops import table
from fastgpt.ops.table import TABLE
from fastgpt.ops.workload import Case, Workload, checked_cases, timed_case
from fastgpt.system.device import autocast
from fastgpt.tokenizer.byte import ByteTokenizer
from fastgpt_kernels import stock

CPU = torch.device("cpu")
SHAPE: dict[str, Any] = {"n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 32, "block_size": 20, "vocab_size": 256}
TRAINING = Workload.of_training(TrainConfig(**SHAPE, batch_size=3, dropout=0.1), torch.float32)
GENERATING = Workload.of_generation(ModelConfig(**SHAPE), torch.bfloat16, B=3)
QUANTIZED = dataclasses.replace(GENERATING, int8=True)
cases = pytest.mark.parametrize(
    ("workload", "op"),
    [(w, op) for w in (TRAINING, GENERATING) for op in w.ops] + [(QUANTIZED, "linear_int8")],
    ids=str,
)


def watched(column: str) -> tuple[table.Ops, dict[str, list]]:
    """The operations of a column, and the (inputs, arguments) of every call of each."""
    ops, calls = table.resolve(column), {op: [] for op in TABLE}

    def watch(op):
        def watching(*inputs, **arguments):
            calls[op].append((inputs, arguments))
            return getattr(ops, op)(*inputs, **arguments)

        return watching

    return dataclasses.replace(ops, **{op: watch(op) for op in TABLE}), calls


def tensors(case: Case) -> list[torch.Tensor]:
    """The inputs that are there."""
    return [t for t in case.inputs if t is not None]


def looks(inputs) -> list:
    """Shape, strides but for the first dimension, dtype and need of a gradient of each input."""
    return [t if t is None else (t.shape, t.stride()[1:], t.dtype, t.requires_grad) for t in inputs]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_calls_are_the_models(dtype, bias):
    config = TrainConfig(**SHAPE, batch_size=3, dropout=0.1, bias=bias)
    ops, calls = watched("torch")
    tokens = torch.randint(256, (3, 20))
    with autocast(CPU, dtype):
        GPT(config, ops)(tokens, tokens)
    workload = Workload.of_training(config, dtype)
    assert {op for op in TABLE if calls[op]} == set(workload.ops)
    for op in workload.ops:
        case, (inputs, arguments) = timed_case(op, workload, CPU), calls[op][-1]
        assert case.autocast == dtype
        given = {name: value for name, value in arguments.items() if value is not None}
        if op == "linear_cross_entropy":  # what a Linear would read is cast by the operation before
            *inputs, given["targets"] = inputs
            assert looks(case.inputs)[1] == looks(inputs)[1]
            assert tensors(case)[0].shape == inputs[0].shape
            assert case.arguments["targets"].shape == given["targets"].shape
        else:
            assert looks(case.inputs) == looks(inputs), op
        assert case.arguments.keys() == given.keys(), op
        for name in given.keys() & {"dropout_p", "valid_vocab"}:
            assert case.arguments[name] == given[name]


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("cache", ["dense", "paged"])
def test_generating_calls_are_the_models(cache, int8):
    config, (ops, calls) = ModelConfig(**SHAPE), watched("torch")
    model = GPT.from_weights(config, ops, GPT(config).weights(), CPU, torch.bfloat16)
    if int8:
        quantize_model(model)
    generator = TextGenerator(model, ByteTokenizer())
    if cache == "dense":
        generator.generate("a" * 19, max_new_tokens=2)
    else:
        generator.engine(prefix_cache=False).generate(["a" * 19] * 3, SamplingParams(max_new_tokens=2))
    workload = dataclasses.replace(GENERATING, B=1 if cache == "dense" else 3, int8=int8)
    used = {op for op in TABLE if calls[op]}
    assert used <= set(workload.ops)
    assert ("linear_int8" in used) == int8
    for op in used:
        ours, (inputs, _) = tensors(timed_case(op, workload, CPU)), calls[op][-1]
        if op == "linear_int8":  # one of its shapes, and the rows of a paged step lie side by side
            assert any(
                [t.shape[-2:] for t in ours[1:]] == [t.shape[-2:] for t in called[1:]]
                and [t.dtype for t in ours] == [t.dtype for t in called]
                and ours[0].numel() == called[0].numel()
                for called, _ in calls[op]
            )
        elif op == "paged_attention":  # a pool and a table may be larger
            assert [t.dtype for t in ours] == [t.dtype for t in inputs]
            assert ours[0].shape == inputs[0].shape
            assert [t.shape[1:] for t in ours[1:3]] == [t.shape[1:] for t in inputs[1:3]]
            assert ours[4].tolist() == inputs[4].tolist() == [20] * 3
        elif op == "kv_write":
            assert looks(ours[:2]) == looks(inputs[:2])
            assert ours[4].shape == inputs[4].shape
        elif cache == "dense":
            assert [t.shape for t in ours] == [t.shape for t in inputs], op
            assert {t.dtype for t in ours} == {t.dtype for t in inputs} == {torch.bfloat16}


@cases
def test_every_case_gives_finite_results_and_stays_as_it_is(workload, op):
    for case in checked_cases(op, workload, CPU):
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
def test_the_same_numbers_are_drawn_each_time(workload, op):
    torch.manual_seed(0)
    one, two = (tensors(timed_case(op, workload, CPU)) for _ in range(2))
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a, b)
    assert torch.initial_seed() == 0


def test_a_write_is_seen_in_copies_of_the_pages():
    (case,) = checked_cases("kv_write", GENERATING, CPU)
    k, v, *pages, slots = tensors(case)
    found = case.results(stock.kv_write)
    for written, pool, t in zip(found.values(), pages, (k, v), strict=True):
        assert torch.equal(written.flatten(0, 1)[slots], t)
        assert not torch.equal(written, pool)


@pytest.mark.parametrize(("T", "small"), [(1, 1), (256, 256), (257, 257), (384, 256), (1000, 360), (16384, 256)])
def test_what_is_checked_is_small_and_ends_in_the_same_part_of_a_tile(T, small):
    long = dataclasses.replace(TRAINING, T=T, B=64)
    assert long.smaller() == dataclasses.replace(TRAINING, T=small, B=2)
    assert dataclasses.replace(long, B=1).smaller().B == 1


def test_its_text_tells_workloads_apart():
    config = dataclasses.replace(PRESETS["gpt2"], dropout=0.1)
    assert str(Workload.of_training(config, torch.bfloat16)) == (
        "training, bfloat16, B 12, T 1024, H 12, Hkv 12, D 64, V 50304, valid_vocab 50257, dropout 0.1, bias True"
    )
    assert str(Workload.of_generation(config, torch.float32, B=8)) == (
        "generating, float32, B 8, T 1024, H 12, Hkv 12, D 64, V 50304, valid_vocab 50257, dropout 0.0, bias True"
    )
    assert str(Workload.of_generation(config, torch.float32, int8=True)).startswith(
        "generating, float32, matrices int8, B 1"
    )


def test_without_a_vocabulary_there_is_no_workload():
    with pytest.raises(UsageError, match="vocab_size is not set"):
        Workload.of_training(TrainConfig(), torch.float32)
