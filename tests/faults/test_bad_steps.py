"""A bad step changes nothing, is told, and a row of them leads back: whole runs with what goes wrong put in."""

import errno
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastgpt import cli, train
from fastgpt.checkpoint import store
from fastgpt.config.training import OPTIMIZERS
from fastgpt.data import loader
from fastgpt.evaluation import loss as evaluation_loss
from fastgpt.training import run as run_module
from fastgpt.training import state as training_state
from fastgpt.training.run import Run
from fastgpt.training.step import TrainStep
from tests.helpers.runs import FLAGS, records, resume, run, tensors

pytestmark = pytest.mark.usefixtures("workplace")
LONG = "--max_iters 20 --eval_interval 4 --dropout 0.1"


def with_losses(monkeypatch, change: Callable[[int, torch.Tensor], torch.Tensor]) -> None:
    """Change the loss of each micro-batch, by the place of its step's batch in the data, counted from 0."""
    batch, loss = loader.Loader.batch, TrainStep._loss
    place = 0

    def remembering(self, step: int, *rest):
        nonlocal place
        place = step
        return batch(self, step, *rest)

    monkeypatch.setattr(loader.Loader, "batch", remembering)
    monkeypatch.setattr(TrainStep, "_loss", lambda self, x, y: change(place, loss(self, x, y)))


def bad_at(*places: int, bad: float = math.nan) -> Callable[[int, torch.Tensor], torch.Tensor]:
    return lambda place, loss: loss + bad if place in places else loss


def lines(out_dir: Path, key: str) -> list[dict]:
    """The records that have a key, without their wall time."""
    found = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: record[name] for name in record if name != "seconds"} for record in found if key in record]


def finite(out_dir: Path) -> bool:
    files = (store.MODEL, store.OPTIMIZER)
    return all(tensor.isfinite().all() for file in files for tensor in tensors(out_dir, file).values())


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("log_interval", [1, 3, 100])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.covering_array(1)
def test_bad_steps_are_skipped_and_told_with_their_batch(capfd, monkeypatch, dtype: str, log_interval: int, bad: float):
    with_losses(monkeypatch, bad_at(6, 7, 13, bad=bad))
    out = run(f"{LONG} --log_interval {log_interval} --dtype {dtype}")
    told = capfd.readouterr().err
    found = lines(out, "skipped")
    assert [(record["step"], record["batch"], record["tokens"]) for record in found] == [
        (step, step - 1, step * 64) for step in (7, 8, 14)
    ]
    assert {record["skipped"] for record in found} == {f"its loss is {bad}"}
    for step in (7, 8, 14):
        assert f"step {step}: skipped, because its loss is {bad} (batch {step - 1} of the data)" in told
    assert finite(out)
    state = store.load_state(store.find(out, "latest"))
    assert state["progress"]["skipped_batches"] == 0
    assert tensors(out, store.OPTIMIZER)["step.wte.weight"] == 17
    assert records(out, "val_loss").keys() == {4, 8, 12, 16, 20}
    losses = records(out)
    assert all(loss is not None for step, loss in losses.items() if step not in (7, 8, 14))
    if log_interval == 1:
        assert losses[7] is losses[8] is losses[14] is None


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_weights_are_those_of_a_run_in_which_the_bad_step_never_was(monkeypatch, optimizer: str):
    """The state before and after a skipped step, to the bit, in the middle of a run."""
    seen = {}
    step = Run.take_step

    def watched(self):
        before = [t.clone() for t in self.model.parameters()]
        moments = [v.clone() for p in self.model.parameters() for v in self.step.optimizer.state[p].values()]
        step(self)
        after = [v for p in self.model.parameters() for v in self.step.optimizer.state[p].values()]
        same = all(torch.equal(a, b) for a, b in zip(before, self.model.parameters(), strict=True))
        seen[self.state.progress.step] = same and all(torch.equal(a, b) for a, b in zip(moments, after, strict=True))

    monkeypatch.setattr(Run, "take_step", watched)
    with_losses(monkeypatch, bad_at(0, 5, 6))
    run(f"--max_iters 9 --optimizer {optimizer}")
    assert [step for step, same in seen.items() if same] == [1, 6, 7]


def test_a_bad_gradient_is_skipped_too(monkeypatch):
    def spoiled(place: int, loss: torch.Tensor) -> torch.Tensor:
        if place == 5:
            loss.register_hook(lambda gradient: gradient * math.inf)
        return loss

    with_losses(monkeypatch, spoiled)
    out = run(LONG)
    (record,) = lines(out, "skipped")
    assert (record["step"], record["batch"]) == (6, 5)
    assert record["skipped"].startswith("its gradient's norm is ")
    assert math.isfinite(records(out)[6])
    assert finite(out)


@pytest.mark.slow
def test_a_spike_of_10_deviations_is_skipped_where_asked_for(monkeypatch):
    flags = "--max_iters 90 --eval_interval 70 --log_interval 1"
    calm = run(f"{flags} --skip_loss_sigma 6", "calm")
    assert lines(calm, "skipped") == []
    known = store.load_state(calm / "step-000070")["guard"]
    spike = known["mean"] + 10 * math.sqrt(known["variance"]) - records(calm)[71]
    with_losses(monkeypatch, lambda place, loss: loss + spike if place == 70 else loss)
    asked, not_asked = run(f"{flags} --skip_loss_sigma 6", "asked"), run(flags, "not_asked")
    (record,) = lines(asked, "skipped")
    assert (record["step"], record["batch"]) == (71, 70)
    assert "6 standard deviations above those before it" in record["skipped"]
    assert lines(not_asked, "skipped") == []
    assert records(asked)[70].hex() == records(not_asked)[70].hex()
    assert records(asked)[72] != records(not_asked)[72]


@pytest.mark.parametrize("log_interval", [1, 2, 100])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.covering_array(1)
def test_a_row_of_bad_steps_leads_back_and_leaves_out_the_data(
    capfd, monkeypatch, log_interval: int, dtype: str, optimizer: str
):
    with_losses(monkeypatch, bad_at(9, 10, 11))
    flags = f"{LONG} --rollback_after 3 --log_interval {log_interval} --dtype {dtype} --optimizer {optimizer}"
    out = run(flags)
    assert "step 12: 3 steps in a row were skipped, the last because its loss is nan; back to step 8, " in (
        capfd.readouterr().err
    )
    (record,) = lines(out, "rolled_back_from")
    assert (record["step"], record["rolled_back_from"], record["batches"]) == (8, 12, [8, 11])
    state = store.load_state(store.find(out, "latest"))
    assert (state["progress"]["step"], state["progress"]["skipped_batches"]) == (20, 4)
    assert finite(out)
    assert list(records(out, "val_loss")) == [4, 8, 12, 16, 20]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_after_going_back_it_is_the_run_that_never_saw_the_data(monkeypatch, optimizer: str):
    flags = f"{LONG} --rollback_after 3 --optimizer {optimizer}"
    with monkeypatch.context() as patch:
        with_losses(patch, bad_at(9, 10, 11))
        out = run(flags)
    batch = loader.Loader.batch
    skipping = lambda self, step, *rest: batch(self, step + 4 * (step >= 8), *rest)  # noqa: E731
    monkeypatch.setattr(loader.Loader, "batch", skipping)
    other = run(flags, "other")
    assert all(torch.equal(tensor, tensors(other)[name]) for name, tensor in tensors(out).items())
    assert {step: loss.hex() for step, loss in records(out).items()} == {
        step: loss.hex() for step, loss in records(other).items()
    }


def test_a_row_of_bad_steps_before_the_first_checkpoint_leads_back_to_the_start(monkeypatch):
    flags = "--max_iters 8 --eval_interval 4 --rollback_after 2"
    with monkeypatch.context() as patch:
        with_losses(patch, bad_at(1, 2))
        out = run(flags)
    (record,) = lines(out, "rolled_back_from")
    assert (record["step"], record["rolled_back_from"], record["batches"]) == (0, 3, [0, 2])
    batch = loader.Loader.batch
    monkeypatch.setattr(loader.Loader, "batch", lambda self, step, *rest: batch(self, step + 3, *rest))
    other = run(flags, "other")
    assert all(torch.equal(tensor, tensors(other)[name]) for name, tensor in tensors(out).items())


def test_a_checkpoint_within_a_row_is_none_to_go_back_to(monkeypatch):
    with_losses(monkeypatch, bad_at(6, 7, 8))  # steps 7, 8 and 9, with a checkpoint at 8
    out = run(f"{LONG} --rollback_after 3")
    (record,) = lines(out, "rolled_back_from")
    assert (record["step"], record["rolled_back_from"], record["batches"]) == (4, 9, [4, 8])


def test_where_only_checkpoints_within_the_row_are_left_the_newest_will_do(monkeypatch):
    with_losses(monkeypatch, bad_at(6, 7, 8, 9))
    falling = itertools.count(-1, -1)  # so that the latest is always the best
    monkeypatch.setattr(evaluation_loss, "mean_loss", lambda *rest, **named: float(next(falling)))
    out = run("--max_iters 14 --eval_interval 1 --keep_last 1 --rollback_after 4")
    (record,) = lines(out, "rolled_back_from")
    assert (record["step"], record["rolled_back_from"], record["batches"]) == (9, 10, [9, 9])
    assert finite(out)


def test_a_run_that_is_killed_within_a_row_goes_back_as_well(monkeypatch):
    with_losses(monkeypatch, bad_at(6, 7, 8))
    flags = f"{LONG} --rollback_after 3"
    whole = run(flags, "whole")
    run(f"{flags} --max_iters 8 --lr_decay_iters 20")
    assert store.load_state(store.find(Path("out"), "latest"))["guard"]["in_row"] == 2
    assert resume("--max_iters 20") == 0
    assert all(torch.equal(tensor, tensors(whole)[name]) for name, tensor in tensors(Path("out")).items())


def test_a_resume_with_less_patience_goes_back_at_once(monkeypatch):
    with_losses(monkeypatch, bad_at(5, 6, 7))
    run(f"{LONG} --max_iters 8")
    assert store.load_state(store.find(Path("out"), "latest"))["guard"]["in_row"] == 3
    assert resume("--max_iters 20 --rollback_after 2") == 0
    (record,) = lines(Path("out"), "rolled_back_from")
    assert (record["step"], record["rolled_back_from"]) == (4, 9)
    assert record["skipped"] == "3 steps before it were"
    assert tensors(Path("out"), store.OPTIMIZER)["step.wte.weight"] == 20


def test_going_back_leads_to_no_checkpoint_of_a_time_that_was_undone(monkeypatch):
    run("--max_iters 12 --eval_interval 4")
    with_losses(monkeypatch, bad_at(9, 10, 11))
    flags = "--max_iters 20 --eval_interval 100 --rollback_after 3"
    assert cli.run(train.main, ["--init_from", "out/step-000004", *flags.split()]) == 0
    (record,) = lines(Path("out"), "rolled_back_from")
    assert (record["step"], record["rolled_back_from"]) == (4, 12)


def test_a_run_that_dies_after_going_back_need_not_find_out_again(monkeypatch):
    with_losses(monkeypatch, bad_at(9, 10, 11))
    flags = f"{LONG} --rollback_after 3"
    whole = run(flags, "whole")
    step = Run.take_step

    def dying(self):
        if (self.state.progress.step, self.state.progress.skipped_batches) == (9, 4):
            raise SystemExit(9)
        step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "take_step", dying)
        with pytest.raises(SystemExit):
            run(flags)
    assert store.load_state(Path("out/step-000008"))["progress"]["skipped_batches"] == 4
    assert resume() == 0
    assert lines(Path("out"), "skipped") == lines(whole, "skipped")
    assert len(lines(whole, "rolled_back_from")) == 1
    assert all(torch.equal(tensor, tensors(whole)[name]) for name, tensor in tensors(Path("out")).items())


def test_a_run_that_diverges_goes_back_beyond_the_checkpoint_that_shows_it(monkeypatch):
    losses = itertools.chain([3.0, math.nan], itertools.repeat(2.5))
    monkeypatch.setattr(evaluation_loss, "mean_loss", lambda *rest, **named: next(losses))
    with_losses(monkeypatch, bad_at(9, 10, 11))
    out = run(f"{LONG} --rollback_after 3")
    (record,) = lines(out, "rolled_back_from")
    assert record["step"] == 4  # step 8's val loss was no number
    assert "NaN" not in (store.find(out, "latest") / store.STATE).read_text()


@pytest.mark.parametrize(
    ("rollbacks", "clip", "advice"),
    [
        (0, "1", "lower --grad_clip 1,"),
        (1, "0", "--grad_clip 0 does not: set it to 1,"),
        (2, "1", "lower --grad_clip 1,"),
    ],
)
def test_going_back_in_vain_ends_with_one_line_and_code_1(capsys, monkeypatch, rollbacks: int, clip: str, advice: str):
    with_losses(monkeypatch, lambda place, loss: loss + math.nan if place >= 6 else loss)
    flags = f"{LONG} --rollback_after 3 --max_rollbacks {rollbacks} --grad_clip {clip}"
    code = cli.run(train.main, [*FLAGS, *flags.split()])
    assert code == 1
    err = capsys.readouterr().err
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "3 steps in a row were skipped" in line
    assert f"{rollbacks} return{'' if rollbacks == 1 else 's'} to step 4 did not help" in line
    assert all(word in line for word in ("lower --learning_rate 0.01", advice, "look at batch "))
    assert "Traceback" not in err
    folder = store.find(Path("out"), "latest")
    store.verify(folder)
    assert finite(Path("out"))


@pytest.mark.parametrize("flags", ["", "--async_save"])
def test_going_back_in_vain_ends_where_the_disk_is_full_too(capsys, monkeypatch, flags: str):
    """How often it went back is kept in a checkpoint, and here none is taken after the first."""
    save = store.save

    def full(out_dir: Path, *rest):
        if store.folders(out_dir):
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(out_dir, *rest)

    monkeypatch.setattr(store, "save", full)
    with_losses(monkeypatch, lambda place, loss: loss + math.nan if place >= 6 else loss)
    assert cli.run(train.main, [*FLAGS, *f"{LONG} --rollback_after 3 --max_rollbacks 2 {flags}".split()]) == 1
    err = capsys.readouterr().err
    assert err.count("; back to step 4, ") == 2
    assert "2 returns to step 4 did not help" in err.splitlines()[-1]
    assert finite(Path("out"))


def test_a_skipped_step_is_told_with_its_tokens_whatever_the_batches_before_it_were(monkeypatch):
    run("--max_iters 4")
    with_losses(monkeypatch, bad_at(5))
    assert resume("--max_iters 8 --batch_size 8") == 0
    tokens = {step: 4 * 64 + (step - 4) * 128 for step in (5, 6, 7, 8)}
    found = {record["step"]: record["tokens"] for record in lines(Path("out"), "loss")}
    assert {step: found[step] for step in tokens} == tokens
    assert [record["tokens"] for record in lines(Path("out"), "skipped")] == [tokens[6]]


def test_float16s_own_skips_are_no_bad_steps(monkeypatch):
    def overflowing(place: int, loss: torch.Tensor) -> torch.Tensor:
        if place in range(4, 12):
            loss.register_hook(lambda gradient: gradient * math.inf)
        return loss

    with_losses(monkeypatch, overflowing)
    out = run(f"{LONG} --dtype float16 --rollback_after 3")
    assert lines(out, "skipped") == []
    state = store.load_state(store.find(out, "latest"))
    assert state["scaler"]["scale"] == 65536 / 2**8
    assert tensors(out, store.OPTIMIZER)["step.wte.weight"] == 12


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_val_loss_that_is_not_finite_is_never_the_best(monkeypatch, bad: float):
    losses = iter([bad, 3.0, bad, 2.5, 2.75])
    monkeypatch.setattr(evaluation_loss, "mean_loss", lambda *rest, **named: next(losses))
    out = run(LONG)
    assert store.find(out, "best").name == "step-000016"
    assert list(records(out, "val_loss").values()) == [None, 3.0, None, 2.5, 2.75]


def test_no_reading_waits_between_log_intervals(monkeypatch):
    """The verdicts are read when the run logs, evaluates or saves, and not between."""
    read_at = []
    read = training_state.TrainStep

    class Watched(read):
        def __init__(self, *rest):
            super().__init__(*rest)
            own = self.guard.read
            self.guard.read = lambda: read_at.append(len(self.guard.unread)) or own()

    monkeypatch.setattr(training_state, "TrainStep", Watched)
    run("--max_iters 20 --log_interval 5 --eval_interval 8")
    assert read_at == [5, 3, 2, 5, 1, 4]
    read_at.clear()
    monkeypatch.setattr(run_module, "MOST_UNREAD", 7)
    run("--max_iters 20 --log_interval 1000 --eval_interval 1000", "other")
    assert read_at == [7, 7, 6]
