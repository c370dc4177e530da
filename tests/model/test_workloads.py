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
from fastgpt.model import workloads
from fastgpt.model.gpt import GPT
from fastgpt.model.int8 import quantize_model
from fastgpt.ops import table
from fastgpt.ops.table import TABLE
from fastgpt.ops.workload import checked_cases, timed_case
from fastgpt.system.device import autocast
from fastgpt.tokenizer.byte import ByteTokenizer

CPU = torch.device("cpu")
SHAPE: dict[str, Any] = {"n_layer": 3, "n_head": 4, "n_kv_head": 2, "n_embd": 32, "block_size": 20, "vocab_size": 256}


def watched() -> tuple[table.Ops, dict[str, list]]:
    """PyTorch's operations, and the (inputs, arguments) of every call of each."""
    ops, calls = table.resolve("torch"), {op: [] for op in TABLE}

    def watch(op):
        def watching(*inputs, **arguments):
            calls[op].append((inputs, arguments))
            return getattr(ops, op)(*inputs, **arguments)

        return watching

    return dataclasses.replace(ops, **{op: watch(op) for op in TABLE}), calls


def looks(values) -> list:
    """Shape, strides, dtype and need of a gradient of tensors; other values as they are."""
    grad = torch.is_grad_enabled()
    return [
        (t.shape, t.stride(), t.dtype, t.requires_grad and grad) if isinstance(t, torch.Tensor) else t for t in values
    ]


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"position": "rotary"}, {"pack": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_calls_are_the_models(dtype, options):
    config = TrainConfig(**SHAPE, batch_size=3, dropout=0.1, **options)
    ops, calls = watched()
    tokens = torch.randint(256, (3, 20))
    with autocast(CPU, dtype):
        GPT(config, ops)(tokens, tokens, doc_ids=torch.zeros_like(tokens) if config.pack else None)
    workload = workloads.training(config, dtype)
    assert {op for op in TABLE if calls[op]} == set(workload.ops)
    for op in workload.ops:
        case, (inputs, arguments) = timed_case(op, workload, CPU), calls[op][-1]
        if op == "linear_cross_entropy":  # what a product reads is cast by the operation before
            inputs = (inputs[0].to(dtype), *inputs[1:])
        assert looks(case.inputs) == looks(inputs), op
        assert case.arguments.keys() == arguments.keys(), op
        assert looks(case.arguments.values()) == looks(arguments.values()), op
        assert case.autocast == dtype


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("cache", ["dense", "paged"])
def test_generation_calls_are_the_models(cache, int8):
    config, (ops, calls) = ModelConfig(**SHAPE), watched()
    model = GPT.from_weights(config, ops, GPT(config).weights(), CPU, torch.bfloat16)
    if int8:
        quantize_model(model)
    generator, B = TextGenerator(model, ByteTokenizer()), 1 if cache == "dense" else 2
    if cache == "dense":
        generator.generate("a" * 19, max_new_tokens=2)
    else:
        generator.engine(prefix_cache=False, max_batch=B).generate(["a" * 19] * B, SamplingParams(max_new_tokens=2))
    workload = workloads.generation(config, torch.bfloat16, B, int8=int8)
    used = {op for op in TABLE if calls[op]}
    assert used | {"causal_attention", "paged_attention", "kv_write"} == set(workload.ops)
    assert ("linear_int8" in used) == int8
    for op in used:
        with torch.no_grad():
            ours = [(looks(case.inputs), case.arguments) for case in checked_cases(op, workload, CPU)]
        for inputs, arguments in calls[op][len(calls[op]) // 2 :]:  # the second pass, which decodes
            if op in ("paged_attention", "kv_write"):  # a pool and a table may be larger
                case = timed_case(op, workload, CPU)
                assert [(t.dtype, t.shape[1:], t.stride()) for t in case.inputs[:3]] == [
                    (t.dtype, t.shape[1:], t.stride()) for t in inputs[:3]
                ]
                assert looks(case.inputs[4:]) == looks(inputs[4:])
                assert op == "kv_write" or case.inputs[4].tolist() == inputs[4].tolist() == [20] * B
            else:
                with torch.no_grad():
                    assert (looks(inputs), arguments) in ours, op


@pytest.mark.parametrize("B", [1, 8])
def test_a_token_is_timed_and_prompts_are_checked_too(B):
    workload = workloads.generation(ModelConfig(**SHAPE), torch.float32, B, int8=True)
    timed, checked = workload.calls
    assert timed["causal_attention"].inputs[0].shape[:2] == (B, 1)
    assert timed["paged_attention"].inputs[0].shape[0] == B
    assert [t and t.shape for t in timed["linear_int8"].inputs] == [(B, 1, 32), (128, 32), (128,), (128,)]  # the MLP's
    few, tokens = min(B, 2), 20 if B == 1 else 21
    assert [call.inputs[0].shape[:2] for call in checked["causal_attention"]] == [(few, 1), (few, 20)]
    assert [call.inputs[0].shape[0] for call in checked["paged_attention"]] == [few, tokens]
    assert [call.inputs[0].shape[0] for call in checked["kv_write"]] == [few, tokens]
    assert {call.inputs[1].shape for call in checked["linear_int8"]} == {
        *((64, 32), (32, 32), (128, 32), (32, 128)),
        (256, 32),
    }


class WithAnotherNorm(GPT):
    """A model with one more operation: a norm of some channels of the embedding."""

    def embed(self, tokens, here):
        x, rotation = super().embed(tokens, here)
        return self.ops.layer_norm(x[..., :8], self.ln_f.weight[:8]).repeat(1, 1, x.shape[-1] // 8), rotation


def test_what_a_model_newly_calls_is_in_its_workloads(monkeypatch):
    config = TrainConfig(**SHAPE, batch_size=3)
    made = {
        "training": lambda: workloads.training(config, torch.float32),
        "generation": lambda: workloads.generation(config, torch.float32),
    }
    before = {name: len(make().calls.checked["layer_norm"]) for name, make in made.items()}
    monkeypatch.setattr(workloads, "GPT", WithAnotherNorm)
    for name, make in made.items():
        checked = make().calls.checked["layer_norm"]
        assert len(checked) == 2 * before[name]
        assert any(call.inputs[0].shape[-1] == 8 for call in checked)


def test_recording_draws_nothing_and_is_put_off():
    workload = workloads.training(PRESETS["gpt2"], torch.bfloat16)
    assert "calls" not in vars(workload)
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    assert workload.calls is workload.calls
    assert torch.equal(torch.rand(1), expected)


def test_packed_calls_are_checked_and_timed_with_several_documents():
    config = TrainConfig(**SHAPE, batch_size=3, pack=True)
    packed, usual = (
        workloads.training(dataclasses.replace(config, pack=pack), torch.float32) for pack in (True, False)
    )
    assert str(packed) == str(usual).replace("training, ", "training, packed, ")
    for case in (timed_case("causal_attention", packed, CPU), *checked_cases("causal_attention", packed, CPU)):
        assert case.arguments["doc_ids"].amax() >= 2
    assert timed_case("causal_attention", usual, CPU).arguments["doc_ids"] is None


def test_its_text_tells_workloads_apart():
    config = dataclasses.replace(PRESETS["gpt2"], dropout=0.1)
    sizes = "vocab_size 50257, block_size 1024, n_head 12, n_kv_head None, n_embd 768"
    text = str(workloads.training(config, torch.bfloat16))
    assert text.startswith(f"training, B 12, {sizes}, dropout 0.1, attention_dropout None, bias True, ")
    assert ", norm layernorm, norm_gain True, norm_eps 1e-05, mlp gelu, n_inner None, tie True, " in text
    assert text != str(workloads.training(dataclasses.replace(config, norm="rmsnorm"), torch.bfloat16))
    assert text.endswith(", bfloat16")
    assert str(workloads.generation(config, torch.float32, B=8)).startswith(f"generation, B 8, {sizes}, dropout 0.0,")
    quantized = str(workloads.generation(config, torch.float32, int8=True, compile=True))
    assert quantized.startswith("generation, matrices int8, B 1,")
    assert quantized.endswith(", float32, compiled")


def test_models_that_differ_in_depth_share_a_workload():
    config = TrainConfig(**SHAPE)
    assert workloads.training(config, torch.float32) == workloads.training(
        dataclasses.replace(config, n_layer=12), torch.float32
    )


def test_without_a_vocabulary_there_is_no_workload():
    with pytest.raises(UsageError, match="vocab_size is not set"):
        workloads.training(TrainConfig(), torch.float32)
