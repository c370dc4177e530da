"""Training and generating through our own kernels, in Triton's interpreter where there is no GPU."""

import json
import re

import pytest
import torch

from fastgpt import cli, train
from fastgpt.config.model import ModelConfig
from fastgpt.generation import load
from fastgpt.model.gpt import GPT
from fastgpt.ops.table import TABLE, resolve
from tests.helpers.covering import some
from tests.helpers.places import ROOT
from tests.helpers.runs import FLAGS, records, resume, run, tensors

pytestmark = pytest.mark.usefixtures("workplace")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Small, as the interpreter takes a second for a few hundred programs.
TOY = (
    f"--device {DEVICE} --n_layer 1 --block_size 4 --batch_size 2 --gradient_accumulation_steps 1 "
    "--max_iters 5 --eval_interval 5 --eval_iters 1 --warmup_iters 0"
)


@pytest.mark.parametrize(
    ("options", "compiled"),
    [
        ("--dropout 0.2 --n_kv_head 1 --no-bias --position rotary --learning_rate 2e-2", ""),
        pytest.param("--n_layer 2 --block_size 8 --batch_size 4", "", marks=pytest.mark.slow),
        pytest.param("--dropout 0.2", "", marks=pytest.mark.slow),
        pytest.param("", "--compile", marks=pytest.mark.slow),
        pytest.param("--dropout 0.2", "--compile", marks=pytest.mark.slow),
    ],
)
def test_five_steps_have_the_losses_of_the_torch_backend(options: str, compiled: str):
    ours = run(f"{TOY} {options} {compiled} --kernels triton", "ours")
    theirs = run(f"{TOY} {options} --kernels torch", "theirs")
    assert records(ours).keys() == {1, 2, 3, 4, 5}
    assert records(ours)[5] < records(ours)[1] - 0.1
    assert records(ours) == pytest.approx(records(theirs), rel=0, abs=1e-4)
    assert records(ours, "grad_norm") == pytest.approx(records(theirs, "grad_norm"), rel=1e-3)
    assert records(ours, "val_loss") == pytest.approx(records(theirs, "val_loss"), rel=0, abs=1e-4)


@pytest.mark.slow
def test_float16_with_its_loss_scale_follows_the_torch_backend():
    ours, theirs = (run(f"{TOY} --dtype float16 --dropout 0.2 --kernels {c}", c) for c in ("triton", "torch"))
    assert records(ours) == pytest.approx(records(theirs), rel=0, abs=5e-3)


@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU bfloat16 is right")
def test_the_interpreter_takes_float32_of_its_own_accord_and_refuses_bfloat16(capsys):
    out = run(f"{TOY} --max_iters 1 --dtype auto --kernels triton")
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"
    assert "kernels     triton (--kernels triton, in Triton's interpreter)" in capsys.readouterr().err
    assert cli.run(train.main, [*FLAGS, "--out_dir", "other", "--dtype", "bfloat16", "--kernels", "triton"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: --dtype bfloat16: Triton's interpreter computes it wrongly; use --dtype float32"
    )


@pytest.mark.slow
def test_a_resumed_run_keeps_its_kernels_and_repeats_the_uninterrupted_one(capsys):
    flags = f"{TOY} --dropout 0.2 --kernels triton --eval_interval 2 --lr_decay_iters 3"
    whole = run(f"{flags} --max_iters 3", "whole")
    run(f"{flags} --max_iters 2", "parted")
    capsys.readouterr()
    assert resume("--max_iters 3 --kernels auto", "parted") == 0
    assert "kernels     triton (as this run began" in capsys.readouterr().err
    for name, tensor in tensors(whole).items():
        assert torch.equal(tensors(whole.parent / "parted")[name], tensor), name


@pytest.mark.parametrize("cache", some(1, ["dense", "none"]))
def test_it_generates_what_the_torch_backend_generates(cache: str):
    run(f"{TOY} --kernels torch")
    ours, theirs = (
        load.load("out", kernels=backend, device=DEVICE, dtype="float32").generate(
            "The quick ", max_new_tokens=12, temperature=0, cache=cache
        )
        for backend in ("triton", "torch")
    )
    assert ours == theirs


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.slow
def test_the_model_compiles_in_one_graph(dropout: float):
    shape = ModelConfig(vocab_size=11, block_size=8, n_layer=2, n_head=2, n_embd=16, dropout=dropout)
    model = GPT(shape, resolve("triton", DEVICE)).to(DEVICE)
    assert model.ops.backends == dict.fromkeys(TABLE, "triton")
    tokens = torch.randint(11, (2, 9), device=DEVICE)
    losses = []
    for function in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(0)
        model.zero_grad()
        loss = function(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        losses.append([loss, *(p.grad.clone() for p in model.parameters())])
    for eager, compiled in zip(*losses, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)


def test_the_readmes_example_runs():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(from fastgpt_kernels import .*?)```", readme, re.DOTALL)
    B, T, H, D, V = 2, 5, 3, 8, 11
    C = H * D
    shapes = {"x": (B, T, C), "branch": (B, T, C), "weight": (C,), "bias": (C,), "embedding": (V, C)}
    names = {name: torch.randn(shape, device=DEVICE, requires_grad=True) for name, shape in shapes.items()}
    names["qkv"] = torch.randn(B, T, 3 * C, device=DEVICE, requires_grad=True)
    leaves = list(names.values())
    names |= {"B": B, "T": T, "H": H, "D": D, "seed": torch.tensor(1, device=DEVICE)}
    names["doc_ids"] = torch.zeros(B, T, dtype=torch.int64, device=DEVICE)
    names["targets"] = torch.randint(V, (B, T), device=DEVICE)
    exec(example, names)
    assert names["out"].shape == (B, T, H, D)
    (names["loss"] + names["out"].sum()).backward()
    assert names["loss"].item() > 0
    assert all(t.grad.isfinite().all() and t.grad.any() for t in leaves)
