"""The PyTorch backend, the model and the loop on a GPU: `pytest -m gpu`."""

import pytest
import torch

from fastgpt.config.training import TrainConfig
from fastgpt.generation import load
from fastgpt.model.gpt import GPT
from fastgpt.system.files import sha256
from fastgpt.training.step import TrainStep
from fastgpt_kernels import reference, torch_ops
from fastgpt_kernels.dropout import dropout_mask
from tests.helpers.runs import train

pytestmark = pytest.mark.gpu


def test_dropout_mask_is_that_of_the_cpu():
    seed = torch.tensor(2**61 + 12345)
    shape = (2, 3, 65, 129, 0.3)
    assert torch.equal(dropout_mask(seed.cuda(), *shape).cpu(), dropout_mask(seed, *shape))


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize(("Tq", "Tk", "Hkv"), [(65, 65, 4), (1, 65, 2), (3, 65, 4)])
def test_attention_in_bfloat16_is_as_near_the_truth_as_the_reference_in_bfloat16(Tq, Tk, Hkv, dropout_p):
    q, k, v = (torch.randn(2, T, H, 64, device="cuda") for T, H in ((Tq, 4), (Tk, Hkv), (Tk, Hkv)))
    seed = torch.tensor(7, device="cuda")

    def error(backend, dtype) -> float:
        out = backend.causal_attention(*(t.to(dtype) for t in (q, k, v)), dropout_p=dropout_p, seed=seed)
        return ((out.double() - truth).norm() / truth.norm()).item()

    truth = reference.causal_attention(q.double(), k.double(), v.double(), dropout_p=dropout_p, seed=seed)
    assert error(torch_ops, torch.float32) < 1e-3  # TF32, where it is on
    assert error(torch_ops, torch.bfloat16) < 2 * error(reference, torch.bfloat16)


def test_training_in_bfloat16_learns_and_generates(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    config = TrainConfig(
        dataset=str(text),
        out_dir=str(tmp_path / "out"),
        data_dir=str(tmp_path / "data"),
        n_layer=2,
        n_head=2,
        n_embd=64,
        block_size=32,
        dropout=0.1,
        batch_size=16,
        gradient_accumulation_steps=2,
        max_iters=200,
        warmup_iters=10,
        eval_interval=100,
        eval_iters=0,
        learning_rate=3e-3,
        device="cuda",
    )
    summary = train(config)
    assert summary.best_val_loss < 1.0
    assert "fox" in load.load(tmp_path / "out").generate("the quick brown ", max_new_tokens=30, temperature=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_step_waits_for_nothing_and_a_bad_one_changes_nothing(dtype: torch.dtype):
    config = TrainConfig(vocab_size=65, block_size=32, n_layer=2, n_head=2, n_embd=64, skip_loss_sigma=6.0)
    with torch.device("cuda"):
        step = TrainStep(GPT(config), config, torch.device("cuda"), dtype)
        tokens = torch.randint(65, (4, 33))
    loss, batch = step._loss, [(tokens[:, :-1], tokens[:, 1:])]
    for number in range(3):  # allocate, and settle float16's scale
        step(number, batch)
    before = [p.detach().clone() for p in step.parameters]
    step._loss = lambda x, y: loss(x, y) * torch.full((), float("nan"), device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(3, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(before, step.parameters, strict=True))
    assert [bool(verdict.skipped) for verdict in step.guard.read()][-1]
    step._loss = loss
    step(4, batch)
    assert not all(torch.equal(a, b) for a, b in zip(before, step.parameters, strict=True))


def test_a_checkpoint_that_is_written_beside_training_is_that_which_training_waits_for(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    hashes = []
    for beside in (False, True):
        out = tmp_path / str(beside)
        config = TrainConfig(
            dataset=str(text),
            out_dir=str(out),
            data_dir=str(tmp_path / "data"),
            n_layer=2,
            n_head=2,
            n_embd=64,
            block_size=32,
            batch_size=16,
            gradient_accumulation_steps=1,
            max_iters=40,
            eval_interval=20,
            warmup_iters=10,
            dtype="float32",
            kernels="torch",
            async_save=beside,
        )
        train(config)
        hashes.append([sha256(out / step / "model.safetensors") for step in ("step-000020", "step-000040")])
    assert hashes[0] == hashes[1]
