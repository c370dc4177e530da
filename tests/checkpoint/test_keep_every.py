"""`keep_every` keeps its steps for good: which checkpoints a run leaves, and how many the disk needs room for."""

import dataclasses
import math
import shutil
from pathlib import Path

import pytest

from fastgpt import cli, train, verify
from fastgpt.checkpoint import run_folder, store
from fastgpt.config.training import TrainConfig
from fastgpt.errors import UsageError
from fastgpt.training.run import Run
from fastgpt.training.step import TrainStep
from tests.helpers.runs import FLAGS, records, resume, run, tensors

pytestmark = pytest.mark.usefixtures("workplace")
KEPT = "--max_iters 12 --eval_interval 5 --keep_last 1 --keep_every 3"


def steps(out: Path) -> list[int]:
    return [store.step_of(folder) for folder in store.folders(out)]


def judge(monkeypatch, best: int) -> None:
    """Let the evaluation after one step be the best of a run."""
    monkeypatch.setattr(
        "fastgpt.training.validation.Validation.measure",
        lambda self, stopping: 1.0 if self.state.progress.step == best else 2.0,
    )


@pytest.mark.parametrize("saving", ["", "--async_save"])
def test_a_run_leaves_its_multiples_the_best_and_the_last(monkeypatch, saving: str):
    judge(monkeypatch, best=5)
    out = run(f"{KEPT} --max_iters 13 {saving}")
    assert steps(out) == [3, 5, 6, 9, 12, 13]
    assert records(out, "val_loss").keys() == {5, 10, 13}
    assert verify.main([str(out)]) == 0


def test_steps_between_evaluations_change_no_weight_and_hold_the_run_of_that_length():
    out, without = run(KEPT), run(f"{KEPT} --keep_every 0", "without")
    assert all(tensors(out)[name].equal(weight) for name, weight in tensors(without).items())
    part = run(f"{KEPT} --max_iters 3 --lr_decay_iters 12", "part")
    kept = store.load_weights(out / "step-000003")
    assert all(kept[name].equal(weight) for name, weight in tensors(part).items())


def test_a_resume_keeps_them_and_may_change_the_number(monkeypatch):
    judge(monkeypatch, best=10)
    out = run(f"{KEPT} --max_iters 7")
    assert steps(out) == [3, 5, 6, 7]
    assert resume("--max_iters 12") == 0
    assert steps(out) == [3, 6, 9, 10, 12]
    assert resume("--max_iters 14 --keep_every 4") == 0
    assert steps(out) == [10, 12, 14]
    assert cli.run(train.main, ["--init_from", str(out / "step-000010"), "--max_iters", "12"]) == 0
    assert steps(out) == [10, 12]  # what was beyond step 10 no longer counted


def test_a_rollback_deletes_the_kept_steps_that_it_undoes(monkeypatch):
    judge(monkeypatch, best=5)
    loss, seen = TrainStep._loss, []

    def bad_from_step_6(self, x, y):
        seen.append(0)
        return loss(self, x, y) + (math.nan if 10 < len(seen) <= 16 else 0.0)  # two micro-batches a step

    monkeypatch.setattr(TrainStep, "_loss", bad_from_step_6)
    left, save = [], Run._log

    def watched(self, verdict):
        left.append((self.state.progress.step, steps(self.setup.out_dir)))
        save(self, verdict)

    monkeypatch.setattr(Run, "_log", watched)
    out = run(f"{KEPT} --rollback_after 3 --log_interval 1 --max_iters 9 --keep_every 2")
    before = left.index((7, [2, 4, 5, 6]))  # step 6 was skipped, and its checkpoint kept
    assert left[before + 1] == (6, [2, 4, 5])  # back at step 5, whose checkpoint was written again
    assert steps(out) == [2, 4, 5, 6, 8, 9]


@pytest.mark.parametrize(
    ("step", "every", "last", "most"),
    [
        (0, 0, 3, 5),  # the last three, the one that is written, and the best
        (0, 10, 3, 10),  # each of them is kept for good
        (0, 20, 3, 8),  # five are; of the last four 70 and 90 are not, and the best is not
        (0, 15, 1, 8),
        (40, 20, 1, 5),
        (95, 20, 3, 1),  # the one at the end
        (0, 1000, 1, 3),
        (0, 10**18, 10**18, 10),
    ],
)
def test_the_most_checkpoints_at_once(step: int, every: int, last: int, most: int):
    config = TrainConfig(max_iters=100, eval_interval=10, keep_last=last, keep_every=every)
    assert run_folder.most_checkpoints(config, step) == most == counted_one_by_one(config, step)


def counted_one_by_one(config: TrainConfig, start: int) -> int:
    """The most folders at any save, whichever checkpoint is the best by then."""
    every = [n for n in (config.eval_interval, config.keep_every, config.max_iters) if n]
    saves = [s for s in range(start + 1, config.max_iters + 1) if any(s % n == 0 for n in every)]
    most = 0
    for count in range(1, len(saves) + 1):
        kept = {s for s in saves[:count] if config.keep_every and s % config.keep_every == 0}
        kept |= set(saves[:count][-config.keep_last - 1 :])
        most = max(most, *(len(kept | {best}) for best in saves[:count]))
    return most


def test_steps_that_stay_are_no_room_for_the_checkpoints_to_come(tmp_path: Path, monkeypatch):
    for step in (2, 4, 6, 8):
        store.folder_of(tmp_path, step).mkdir()
        (store.folder_of(tmp_path, step) / store.MODEL).write_bytes(bytes(12_000))
    usage = shutil.disk_usage(tmp_path)._replace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    config = TrainConfig(max_iters=10, eval_interval=2, keep_last=1)  # from step 6 on: 8 and 10, each 12,000 bytes
    run_folder.check_disk(tmp_path, config, 1000, step=6)
    needed = "room for 2 checkpoints, 23 KiB, is needed, and its disk has 12 KiB; .*or raise `keep_every`"
    with pytest.raises(UsageError, match=needed):  # 2, 4 and 6 stay; 8 is written again
        run_folder.check_disk(tmp_path, dataclasses.replace(config, keep_every=2), 1000, step=6)


def test_a_dry_run_counts_them(capsys):
    assert cli.run(train.main, [*FLAGS, *KEPT.split(), "--dry_run"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "at most 6 checkpoints at once" in printed  # 3 6 9 12, 10 as one of the last two, and 5 as the best
