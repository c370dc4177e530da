"""A training run from its flags to its folder: the numbers against plain loops, and what it prints and leaves."""

import json
import re
from pathlib import Path

import pytest
import torch

from fastgpt.checkpoint import run_folder, store
from fastgpt.config.training import PRESETS, TrainConfig
from fastgpt.data import corpus
from fastgpt.errors import UsageError
from fastgpt.training import start
from fastgpt.training.schedule import learning_rate
from tests.helpers import runs
from tests.helpers.covering import some
from tests.helpers.runs import TEXT, parts, records, run, tensors

pytestmark = pytest.mark.usefixtures("workplace")


def gradients(out_dir: Path) -> torch.Tensor:
    """All gradients of a run of one step, after clipping, from AdamW's first moment."""
    return torch.cat([v.flatten() / 0.1 for k, v in tensors(out_dir, store.OPTIMIZER).items() if "avg." in k])


def test_two_micro_batches_of_four_are_one_batch_of_eight():
    two = run("--no-bias --max_iters 4", "two")
    one = run("--no-bias --max_iters 4 --gradient_accumulation_steps 1 --batch_size 8", "one")
    assert records(two) == pytest.approx(records(one), rel=1e-6)
    assert records(two, "grad_norm") == pytest.approx(records(one, "grad_norm"), rel=1e-5)
    torch.testing.assert_close(tensors(two), tensors(one), rtol=0, atol=1e-5)


def test_the_logged_loss_is_the_mean_over_all_micro_batches():
    out = run("--max_iters 2 --eval_interval 1 --gradient_accumulation_steps 3")
    # The checkpoint after step 1 is what step 2 began with.
    run("--max_iters 1 --lr_decay_iters 2 --gradient_accumulation_steps 3", "first")
    model, loader, _ = parts(Path("first"), "latest")
    losses = [model(*loader.batch(1, micro, 3, 4)).item() for micro in range(3)]
    assert len(set(losses)) == 3
    assert records(out)[2] == pytest.approx(sum(losses) / 3, rel=1e-6)


def test_gradients_are_clipped_to_the_norm_and_logged_before_it():
    free = run("--max_iters 1 --grad_clip 0", "free")
    clipped = run("--max_iters 1 --grad_clip 0.01", "clipped")
    norm = records(free, "grad_norm")[1]
    assert records(clipped, "grad_norm")[1] == norm > 0.1
    assert gradients(free).norm().item() == pytest.approx(norm, rel=1e-4)
    assert gradients(clipped).norm().item() == pytest.approx(0.01, rel=1e-4)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
def test_every_step_is_taken_at_the_schedules_rate(schedule: str):
    out = run(f"--schedule {schedule} --max_iters 10 --lr_decay_iters 8 --eval_interval 10")
    config, _ = run_folder.load(out)
    assert records(out, "lr") == {step: learning_rate(step - 1, config) for step in range(1, 11)}


@pytest.mark.parametrize("dtype", some(2, ["auto", "float32", "bfloat16", "float16"]))
def test_it_learns_in_every_arithmetic_and_keeps_float32_weights(dtype: str):
    out = run(f"--dtype {dtype} --max_iters 60 --eval_interval 30 --dropout 0.1")
    losses = records(out)
    assert losses[60] < losses[1] - 0.3
    assert {tensor.dtype for tensor in tensors(out).values()} == {torch.float32}
    scaler = store.load_state(store.find(out, "latest"))["scaler"]
    assert bool(scaler) == (dtype == "float16")


def test_float16_takes_the_same_way_as_float32_within_its_rounding():
    half, single = run("--dtype float16", "half"), run("", "single")
    assert records(half) == pytest.approx(records(single), rel=2e-3)
    assert records(half, "grad_norm") == pytest.approx(records(single, "grad_norm"), rel=2e-2)


def test_float16_skips_the_steps_that_overflow_and_learns_after_them(monkeypatch):
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *a, **named: scaler(*a, **named, init_scale=2.0**30))
    out = run("--dtype float16 --max_iters 60 --eval_interval 30")
    skipped = [step for step, norm in records(out, "grad_norm").items() if norm is None]
    assert skipped[:5] == [1, 2, 3, 4, 5]  # the scale halves with each, and may meet its limit once more later
    assert len(skipped) < 20
    assert records(out)[60] < records(out)[1] - 0.3


@pytest.mark.slow
def test_a_compiled_run_is_the_same_run():
    compiled, eager = run("--compile --max_iters 3", "compiled"), run("--max_iters 3", "eager")
    assert records(compiled) == pytest.approx(records(eager), rel=1e-4)


def test_evaluating_sampling_and_logging_do_not_change_the_run():
    often = run("--dropout 0.2 --eval_interval 1 --sample_interval 1", "often")
    rarely = run("--dropout 0.2 --eval_interval 6 --log_interval 3", "rarely")
    assert {step: records(often)[step] for step in (3, 6)} == records(rarely)
    assert all(torch.equal(tensors(often)[name], weight) for name, weight in tensors(rarely).items())


def test_the_seed_decides_the_run():
    first, again, other = (run(f"--seed {seed}", str(i)) for i, seed in enumerate((1, 1, 2)))
    assert records(first) == records(again)
    assert records(first)[1] != records(other)[1]


def test_the_best_and_the_last_three_checkpoints_are_kept_and_no_other():
    out = run("--max_iters 40 --eval_interval 20")
    run("--init_from resume --max_iters 60 --eval_interval 5 --learning_rate 3 --schedule constant --grad_clip 0")
    losses = records(out, "val_loss")
    best = min(losses, key=losses.__getitem__)
    assert best != 60
    assert store.find(out, "best").name == f"step-{best:06d}"
    assert [path.name for path in store.folders(out)] == [f"step-{s:06d}" for s in (best, 50, 55, 60)]
    state = store.load_state(store.find(out, "latest"))
    assert state["progress"].pop("val_set").startswith("8 windows of 8 in ")
    assert state["progress"] == {
        "step": 60,
        "tokens": 60 * 2 * 4 * 8,
        "val_loss": losses[60],
        "evaluated_step": 60,
        "best_val_loss": losses[best],
        "best_step": best,
        "rollbacks": 0,
        "skipped_batches": 0,
    }


def test_progress_is_plain_lines_with_everything_in_them(capsys):
    run("--log_interval 2")
    lines = [line for line in capsys.readouterr().err.splitlines() if re.match(r"step \d+/6 ", line)]
    number, rest = (
        r"[\d.,]+",
        r"\d+:\d\d left  {0} tokens/s  {0} ms  lr \d\.\d\de-\d\d  norm {0}  (MFU {0}%  )?{0} [MG]iB",
    )
    guess = r" \(ln V, a uniform guess, is 3\.37\)"  # ln 29
    for line, (step, val) in zip(lines, [(2, "-"), (3, "-"), (4, number), (6, number)], strict=True):
        first = rf"step {step}/6  loss {number}{guess if step == 2 else ''}  val {val}  "
        assert re.fullmatch(first + rest.format(number), line), line


def test_metrics_have_a_line_a_log_interval_and_two_an_evaluation():
    out = run("--max_iters 7 --log_interval 2 --eval_interval 3")
    assert list(records(out)) == [2, 3, 4, 6, 7]
    assert list(records(out, "val_loss")) == [3, 6, 7]
    for line in (out / "metrics.jsonl").read_text().splitlines():
        assert (record := json.loads(line))["tokens"] == record["step"] * 2 * 4 * 8


def test_the_first_step_is_not_timed_and_a_run_of_one_step_has_no_speed():
    out = run("--max_iters 3")
    assert records(out, "ms")[1] is None is records(out, "tokens_per_second")[1]
    assert all(records(out, "ms")[step] > 0 for step in (2, 3))
    config = TrainConfig(**vars(run_folder.load(out)[0]) | {"max_iters": 1, "out_dir": "one"})
    assert runs.train(config).tokens_per_second is None


def test_a_configuration_made_in_python_is_validated():
    with pytest.raises(UsageError, match="`n_head` 5 does not divide `n_embd` 32"):
        runs.train(TrainConfig(n_head=5, n_embd=32))
    assert not Path("out").exists()


def test_a_summary_says_how_the_run_ended():
    config, _ = run_folder.load(run())
    summary = runs.train(TrainConfig(**vars(config) | {"out_dir": "again"}))
    losses = records(Path("again"), "val_loss")
    assert (summary.steps, summary.finished, summary.stopped_by) == (6, True, None)
    assert (summary.val_loss, summary.best_val_loss) == (losses[6], min(losses.values()))
    assert summary.bits_per_byte > 0 < summary.tokens_per_second


class TestStartingPoint:
    @pytest.mark.parametrize(("kind", "fitting"), [("cpu", "modern-cpu"), ("cuda", "baby")])
    def test_without_a_preset_the_device_decides(self, monkeypatch, kind: str, fitting: str):
        monkeypatch.setattr(start, "resolve_device", lambda name: torch.device(kind))
        found, why = start.of_preset(None, {})
        assert found == PRESETS[fitting]
        assert fitting in why

    def test_a_start_from_other_weights_has_rates_that_do_not_undo_them(self, monkeypatch):
        monkeypatch.setattr(start, "resolve_device", lambda name: torch.device("cpu"))
        assert start.of_preset(None, {}, imports=True)[0] == PRESETS["cpu"]

    def test_a_prepared_folder_keeps_its_tokenizer(self):
        Path("text.txt").write_text(TEXT)
        folder = corpus.prepare("text.txt", tokenizer="byte").path
        for dataset, tokenizer in ((str(folder), "char"), (folder.name, "char"), ("text.txt", "bpe")):
            found, _ = start.of_preset("modern-cpu", {"dataset": dataset})
            assert (found.tokenizer, found.vocab_size) == (
                tokenizer,
                PRESETS["modern-cpu"].vocab_size if tokenizer == "bpe" else None,
            )

    def test_another_width_brings_its_own_mlp(self):
        assert start.of_preset("modern-cpu", {})[0].n_inner == 256
        for given in ({"n_embd": 256}, {"mlp": "gelu"}):
            assert start.of_preset("modern-cpu", given)[0].n_inner is None

    def test_another_tokenizer_brings_its_own_vocabulary(self):
        assert start.of_preset("gpt2", {})[0].vocab_size == 50257
        assert start.of_preset("gpt2", {"tokenizer": "byte"})[0].vocab_size is None

    def test_a_resume_starts_at_the_runs_own_settings(self):
        run("--beta1 0.8", "mine")
        asked = start.asked_start({"init_from": "resume", "out_dir": "mine"})
        found, why = start.of_resumed_run(None, asked)
        assert (found.beta1, found.out_dir, found.init_from) == (0.8, "mine", "scratch")
        assert "mine" in why
        with pytest.raises(UsageError, match="`preset` mini: `init_from` resume keeps the run's own settings"):
            start.of_resumed_run("mini", asked)
