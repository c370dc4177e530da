"""The statistics of `log_stats` are those of an independent computation, and change nothing that a run computes."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fastgpt.config.training import TrainConfig
from fastgpt.data.loader import Batch
from fastgpt.data.packing import document_ids
from fastgpt.fit import fit
from fastgpt.model.gpt import GPT
from fastgpt.training import step as step_module
from fastgpt.training.step import TrainStep
from tests.helpers.runs import records, resume, run, tensors

CPU = torch.device("cpu")
ACCURACY = 1e-3  # relative: records are rounded to four digits
END = 0  # the token that ends a document
CONFIG = TrainConfig(
    **{"vocab_size": 20, "block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 32, "mlp": "relu", "bias": True},
    **{"batch_size": 8, "gradient_accumulation_steps": 2, "grad_clip": 0.01, "dropout": 0.0},
    **{"learning_rate": 1e-2, "schedule": "constant", "warmup_iters": 0, "log_stats": True, "log_interval": 1},
)


def a_step(dtype: torch.dtype = torch.float32, end: int | None = None, **changes) -> tuple[TrainStep, list[Batch]]:
    """A step whose second block has dead units, some of which a few tokens wake, and its micro-batches."""
    torch.manual_seed(0)
    config = dataclasses.replace(CONFIG, **changes)
    step = TrainStep(GPT(config), config, CPU, dtype, end)
    bias = step.model.h[1].mlp.c_fc.bias
    bias.data.copy_(torch.linspace(-1, 0.2, len(bias)))
    tokens = torch.randint(20, (2, 8, 17))
    return step, [(micro[:, :-1].contiguous(), micro[:, 1:].contiguous()) for micro in tokens]


def by_layer(model: GPT, tensors: dict[str, torch.Tensor]) -> list[float]:
    """The norms of embeddings, blocks and final LayerNorm, by the names of their tensors."""
    groups = [("wte.", "wpe."), *(f"h.{layer}." for layer in range(len(model.h))), "ln_f."]
    return [
        math.sqrt(sum(t.double().square().sum().item() for name, t in tensors.items() if name.startswith(group)))
        for group in groups
    ]


def activations(model: GPT, tokens: torch.Tensor, doc_ids: torch.Tensor | None = None) -> tuple[list, list]:
    """The rms of the residual stream, and each block's share of dead units, computed without the model's own blocks."""
    here = slice(0, tokens.shape[1])
    if doc_ids is not None:
        here = torch.stack([torch.cat([torch.arange(n) for n in row.unique(return_counts=True)[1]]) for row in doc_ids])
    x, (C,) = model.wte.weight[tokens] + model.wpe.weight[here], model.ln_f.weight.shape
    streams, dead = [x], []
    for block in model.h:
        y = F.layer_norm(x, (C,), block.ln_1.weight, block.ln_1.bias)
        x = x + block.attn(y, None, None, doc_ids, None)
        y = F.layer_norm(x, (C,), block.ln_2.weight, block.ln_2.bias)
        hidden = F.relu(F.linear(y, block.mlp.c_fc.weight, block.mlp.c_fc.bias))
        x = x + F.linear(hidden, block.mlp.c_proj.weight, block.mlp.c_proj.bias)
        streams.append(x)
        dead.append((hidden.abs().amax((0, 1)) < 1e-3).double().mean().item())
    return [stream.square().mean().sqrt().item() for stream in streams], dead


def check_activations(stats: dict[str, list], model: GPT, batches: Sequence[torch.Tensor], end: int | None) -> None:
    """Check what was measured before the update that `model` has not seen."""
    tokens = torch.cat(list(batches))
    with torch.no_grad():
        rms, dead = activations(model, tokens, document_ids(tokens, end))
    assert 0.1 < dead[1] < 0.9
    assert stats["activation_rms"] == [*map(near, rms), None]
    assert stats["dead_units"] == [None, *map(near, dead), None]


def near(value: float):
    return pytest.approx(value, rel=ACCURACY)


@pytest.mark.parametrize("end", [None, END])
@pytest.mark.parametrize("count", [1, 2])
def test_the_values_are_those_of_an_independent_computation(count: int, end: int | None):
    step, batches = a_step(end=end)
    before, batches = a_step()[0].model, batches[:count]
    losses = [before(x, y, doc_ids=document_ids(x, end)) for x, y in batches]
    names = [name for name, _ in before.named_parameters()]
    gradients = dict(zip(names, torch.autograd.grad(sum(losses) / count, list(before.parameters())), strict=True))
    step(0, batches)
    stats = step.statistics.read()
    weights = before.weights()
    changes = {name: weight - weights[name] for name, weight in step.model.weights().items()}
    norms = by_layer(before, weights)
    assert stats["grad_norm"] == [*map(near, by_layer(before, gradients))]
    assert stats["weight_norm"] == [*map(near, norms)]
    ratios = [change / norm for change, norm in zip(by_layer(before, changes), norms, strict=True)]
    assert stats["update_ratio"] == [*map(near, ratios)]
    check_activations(stats, before, [x for x, _ in batches], end)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_are_those_before_clipping_and_without_the_loss_scale(dtype: torch.dtype):
    step, batches = a_step(dtype)
    _, norm, _ = step(0, batches)
    assert norm > 10 * CONFIG.grad_clip
    stats = step.statistics.read()
    assert math.hypot(*stats["grad_norm"]) == near(norm.item())
    assert 0.1 < stats["dead_units"][2] < 0.9


def test_a_skipped_step_updates_nothing_and_unknown_numbers_are_null():
    step, batches = a_step()
    step.model.ln_f.bias.data[0] = math.nan
    step(0, batches)
    stats = step.statistics.read()
    assert stats["update_ratio"] == [0.0, 0.0, 0.0, None]  # NaN of NaN
    assert stats["grad_norm"] == [None] * 4
    assert stats["weight_norm"][3] is None
    json.dumps(stats, allow_nan=False)


def test_nothing_is_measured_between_log_lines_or_hooked_after_a_step(monkeypatch):
    step, batches = a_step(log_interval=2)
    step(0, batches)
    assert step.statistics is None
    step(1, batches)
    assert step.statistics is not None
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in step.model.modules())
    step.accumulate(3, batches, lambda done: True)
    step.abandon()  # as where a signal cuts a step short: its part is no record
    assert step.statistics is None

    def refuse(model: GPT) -> None:
        raise AssertionError("`log_stats` is off")

    monkeypatch.setattr(step_module, "Statistics", refuse)
    off, batches = a_step(log_stats=False)
    off(0, batches)
    assert off.statistics is None


@pytest.mark.usefixtures("workplace")
def test_a_run_with_statistics_has_the_bits_of_one_without():
    flags = "--n_layer 2 --dropout 0.2 --log_interval 2 --max_iters 5"
    off, on = run(flags, "off"), run(f"{flags} --log_stats", "on")
    for file in ("model.safetensors", "optim.safetensors"):
        assert all(tensor.equal(tensors(off, file)[name]) for name, tensor in tensors(on, file).items())
    assert records(on) == records(off)
    assert records(off, "stats") == {}
    stats = records(on, "stats")
    assert stats.keys() == {2, 4}  # 3 and 5 are logged for their evaluations
    assert {key: len(values) for key, values in stats[2].items()} == dict.fromkeys(
        ["grad_norm", "weight_norm", "update_ratio", "activation_rms", "dead_units"], 4
    )
    assert max(map(len, (on / "metrics.jsonl").read_text().splitlines())) < 600
    assert resume("--max_iters 8", "on") == 0
    assert records(on, "stats").keys() == {2, 4, 6, 8}


@pytest.mark.usefixtures("workplace")
def test_the_history_of_fit_has_them_and_the_update_is_that_of_the_checkpoints():
    settings = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 8, "batch_size": 4, "eval_iters": 1}
    summary = fit(
        preset="cpu", dataset="text.txt", device="cpu", max_iters=3, eval_interval=1, log_interval=3, log_stats=True,
        out_dir="out", kernels="torch", dtype="float32", **settings,
    )  # fmt: skip
    (record,) = [record for record in summary.history if "stats" in record]
    model = {n: tensors(Path("out"), name=f"step-00000{n}") for n in (2, 3)}
    block = [torch.cat([t.flatten() for name, t in model[n].items() if name.startswith("h.0.")]) for n in (2, 3)]
    assert record["step"] == 3
    assert not block[0].equal(block[1])
    assert record["stats"]["update_ratio"][1] == near(((block[1] - block[0]).norm() / block[0].norm()).item())


@pytest.mark.slow
def test_a_compiled_step_is_not_compiled_again_and_keeps_its_bits():
    on, batches = a_step(compile=True, dropout=0.1, log_interval=2)
    off, _ = a_step(compile=True, dropout=0.1, log_stats=False)
    for step in (on, off):
        step(0, batches)
    with torch.compiler.set_stance("fail_on_recompile"):
        for number in (1, 2):
            for step in (on, off):
                step(number, batches)
            assert all(a.equal(b) for a, b in zip(on.parameters, off.parameters, strict=True))
    plain, batches = a_step(compile=True)
    model = a_step()[0].model
    plain(0, batches)
    check_activations(plain.statistics.read(), model, [batches[0][0][:4]], None)  # of 16 sequences a quarter
