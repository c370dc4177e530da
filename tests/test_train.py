"""A training run from its flags to its folder: the numbers against plain loops, and what it prints and leaves."""

import json
import math
import os
import random
import re
import shlex
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fastgpt import checkpoint, cli, generate, train
from fastgpt import tokenizer as tokenizers
from fastgpt.loader import Loader
from fastgpt.model import GPT
from fastgpt.optim import learning_rate
from fastgpt.signals import Signals

WORDS = "The quick brown fox jumps over a lazy dog while nine wise cats watch from häuser and trees"
TEXT = " ".join(random.Random(0).choices(WORDS.split(" "), k=900)) + " the end"
FLAGS = shlex.split(
    "--dataset text.txt --device cpu --dtype float32 --n_layer 2 --n_head 2 --n_embd 16 --block_size 8 --dropout 0 "
    "--batch_size 4 --gradient_accumulation_steps 2 --learning_rate 1e-2 --warmup_iters 2 --max_iters 6 "
    "--eval_interval 3 --eval_iters 2 --log_interval 1 --sample_interval 0"
)


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test trains in a folder of its own, which holds text.txt."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "SAMPLE_TOKENS", 20)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path


def run(flags: str = "", out_dir: str = "out") -> Path:
    """Train with the usual flags, changed by some; the run's folder."""
    assert cli.run(train.main, [*FLAGS, "--out_dir", out_dir, *shlex.split(flags)]) == 0
    return Path(out_dir)


def records(out_dir: Path, key: str = "loss") -> dict[int, float]:
    """{step: value} of metrics.jsonl, every line of which must be whole and strict JSON."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    lines = (out_dir / "metrics.jsonl").read_text().split("\n")
    assert lines.pop() == ""
    found = [(r["step"], r[key]) for line in lines if key in (r := json.loads(line, parse_constant=refuse))]
    assert len(dict(found)) == len(found), "a step stands there twice"
    return dict(found)


def tensors(out_dir: Path, file: str = checkpoint.MODEL, name: str = "latest") -> dict[str, torch.Tensor]:
    return load_file(checkpoint.find(out_dir, name) / file)


def gradients(out_dir: Path) -> torch.Tensor:
    """All gradients of a run of one step, after clipping, from AdamW's first moment."""
    return torch.cat([v.flatten() / 0.1 for k, v in tensors(out_dir, checkpoint.OPTIMIZER).items() if "avg." in k])


def parts(out_dir: Path, name: str) -> tuple[GPT, Loader, Loader]:
    """The model of a checkpoint, and loaders over the two splits made anew from the text."""
    config, _ = checkpoint.load_run(out_dir)
    tokenizer, cut = tokenizers.load(out_dir / "tokenizer.json"), int(0.9 * len(TEXT))
    generator = generate.load(out_dir, checkpoint_name=name, device="cpu")
    loaders = [
        Loader(
            tokenizer.encode(text).astype(np.uint16),
            config.block_size,
            tokenizer.vocab_size,
            seed=config.seed,
            device=torch.device("cpu"),
            name="the text",
        )
        for text in (TEXT[:cut], TEXT[cut:])
    ]
    return generator.model, *loaders


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
    config, _ = checkpoint.load_run(out)
    assert records(out, "lr") == {step: learning_rate(step - 1, config) for step in range(1, 11)}


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16"])
def test_it_learns_in_every_arithmetic_and_keeps_float32_weights(dtype: str):
    out = run(f"--dtype {dtype} --max_iters 60 --eval_interval 30 --dropout 0.1")
    losses = records(out)
    assert losses[60] < losses[1] - 0.3
    assert {tensor.dtype for tensor in tensors(out).values()} == {torch.float32}
    scaler = checkpoint.load_state(checkpoint.find(out, "latest"))["scaler"]
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


def test_a_fixed_evaluation_is_the_mean_over_the_same_batches():
    out = run("--eval_iters 3 --max_iters 5 --eval_interval 5 --dropout 0.2")
    model, _, loader = parts(out, "latest")
    with torch.no_grad():
        losses = [model(*batch).item() for batch in loader.fixed(3, 4)]
    assert records(out, "val_loss") == {5: pytest.approx(sum(losses) / 3, rel=1e-6)}


def test_an_evaluation_of_the_whole_split_is_a_plain_loop_over_its_windows():
    out = run("--eval_iters 0 --max_iters 5 --eval_interval 5 --dropout 0.2")
    model, _, loader = parts(out, "latest")
    text, T = torch.from_numpy(loader.tokens.astype(np.int64)), 8
    assert (len(text) - 1) % T, "the last window should be short"
    total = 0.0
    with torch.no_grad():
        for first in range(0, len(text) - 1, T):
            window = text[first : first + T + 1]
            logits = model(window[None, :-1])[0].double()
            total += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
    assert records(out, "val_loss") == {5: pytest.approx(total / (len(text) - 1), rel=1e-6)}


def test_evaluating_sampling_and_logging_do_not_change_the_run():
    often = run("--dropout 0.2 --eval_interval 1 --sample_interval 1", "often")
    rarely = run("--dropout 0.2 --eval_interval 6 --log_interval 3", "rarely")
    assert {step: records(often)[step] for step in (3, 6)} == records(rarely)
    assert all(torch.equal(tensors(often)[name], weight) for name, weight in tensors(rarely).items())


def test_the_seed_decides_the_run():
    first, again, other = (run(f"--seed {seed}", str(i)) for i, seed in enumerate((1, 1, 2)))
    assert records(first) == records(again)
    assert records(first)[1] != records(other)[1]


def test_the_best_and_the_last_checkpoint_are_kept_and_no_other():
    out = run("--max_iters 40 --eval_interval 20")
    run("--init_from resume --max_iters 60 --eval_interval 5 --learning_rate 3 --schedule constant --grad_clip 0")
    losses = records(out, "val_loss")
    best = min(losses, key=losses.__getitem__)
    assert best != 60
    assert checkpoint.find(out, "best").name == f"step-{best:06d}"
    assert [path.name for path in checkpoint.steps(out)] == [f"step-{best:06d}", "step-000060"]
    state = checkpoint.load_state(checkpoint.find(out, "latest"))
    assert (state["best_step"], state["best_val_loss"], state["val_loss"]) == (best, losses[best], losses[60])


def test_max_minutes_stops_evaluates_and_saves():
    out = run("--max_minutes 1e-9 --max_iters 1000")
    assert checkpoint.find(out, "latest").name == "step-000001"
    assert list(records(out)) == list(records(out, "val_loss")) == [1]


def test_progress_is_plain_lines_with_everything_in_them(capsys):
    run("--log_interval 2")
    lines = [line for line in capsys.readouterr().err.splitlines() if re.match(r"step \d+/6 ", line)]
    number, rest = (
        r"[\d.,]+",
        r"lr \d\.\d\de-\d\d  norm {0}  {0} ms  {0} tokens/s  (MFU {0}%  )?{0} [MG]iB  \d+:\d\d left",
    )
    for line, (step, val) in zip(lines, [(2, "-"), (4, number), (6, number)], strict=True):
        assert re.fullmatch(rf"step {step}/6  loss {number}  val {val}  " + rest.format(number), line), line


def test_metrics_have_a_line_a_log_interval_and_one_an_evaluation():
    out = run("--max_iters 7 --log_interval 2 --eval_interval 4")
    assert list(records(out)) == [2, 4, 6, 7]
    assert list(records(out, "val_loss")) == [4, 7]
    for line in (out / "metrics.jsonl").read_text().splitlines():
        assert (record := json.loads(line))["tokens"] == record["step"] * 2 * 4 * 8


def test_samples_and_the_summary_go_to_stdout(capsys):
    out = run("--sample_interval 2 --eval_iters 0")
    text = capsys.readouterr().out
    assert re.findall(r"^--- sample (.*)$", text, re.M) == ["at step 2", "at step 4", "after step 6"]
    best = min(records(out, "val_loss").values())
    val = TEXT[int(0.9 * len(TEXT)) :]
    bits = best / math.log(2) * len(val) / len(val.encode())
    assert len(val.encode()) > len(val)
    assert f"{best:.4f} at step 6, {bits:.4f} bits per byte" in text
    assert re.search(r"^speed +[\d,]+ tokens/s", text, re.M)
    assert re.search(r"^peak memory +[\d.]+ [MG]iB$", text, re.M)
    assert (out / "plots" / "loss.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert "\r" not in text


@pytest.mark.parametrize("out_dir", ["out", "my run"])
@pytest.mark.parametrize("text", [TEXT, TEXT.lower()])
def test_the_next_command_runs(capsys, out_dir: str, text: str):
    Path("text.txt").write_text(text, encoding="utf-8")
    run(out_dir=out_dir)
    (command,) = re.findall(r"^next:  python -m fastgpt\.generate(.*)$", capsys.readouterr().out, re.M)
    assert cli.run(generate.main, [*shlex.split(command), "--max_new_tokens", "3"]) == 0


def test_a_signal_is_noted_and_a_second_one_ends_at_once(capsys):
    handler = signal.getsignal(signal.SIGINT)
    with Signals() as signals:
        assert signals.caught is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.caught == signal.SIGTERM
        with pytest.raises(SystemExit) as stopped:
            os.kill(os.getpid(), signal.SIGINT)
    assert stopped.value.code == 130
    assert signal.getsignal(signal.SIGINT) == handler
    assert "once more stops at once" in capsys.readouterr().err


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file's bytes and time of change."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def test_a_folder_that_holds_a_run_is_refused_and_stays_as_it_was(capsys):
    out = run()
    before = contents(out)
    assert cli.run(train.main, [*FLAGS, "--max_iters", "9"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: --out_dir out already holds a run")
    assert all(way in error for way in ("--init_from resume", "another --out_dir", "--overwrite"))
    assert contents(out) == before


def test_overwrite_deletes_the_runs_files_and_no_others():
    out = run()
    for name in ("notes.txt", "step-by-step.md", "plots/mine.png"):
        (out / name).write_text("mine")
    run("--overwrite --max_iters 2 --n_layer 1")
    assert [path.name for path in checkpoint.steps(out)] == ["step-000002"]
    assert list(records(out)) == [1, 2]
    assert all((out / name).read_text() == "mine" for name in ("notes.txt", "step-by-step.md", "plots/mine.png"))


@pytest.mark.parametrize("mistake", ["--dataset nowhere.txt", "--block_size 100000", "--tokenizer bpe --vocab_size 3"])
def test_overwrite_deletes_nothing_when_the_new_run_cannot_start(mistake: str):
    out = run()
    before = contents(out)
    assert cli.run(train.main, [*FLAGS, "--overwrite", *shlex.split(mistake)]) == 2
    assert contents(out) == before
