"""Each step of a save that reaches the disk, refused: the checkpoint before it stays."""

import errno
import itertools
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch

from fastgpt.checkpoint import store
from fastgpt.checkpoint.store import capture
from fastgpt.checkpoint.writer import BackgroundWriter, Writer
from fastgpt.config.training import TrainConfig
from fastgpt.evaluation import loss
from fastgpt.model.gpt import GPT
from fastgpt.training.optimizer import make_optimizer
from tests.helpers.covering import some
from tests.helpers.disks import Disk, err, in_child, train_here, whole_run
from tests.helpers.runs import contents, records, resume, run

pytestmark = [
    pytest.mark.usefixtures("workplace"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
]


def save_refused_at(moment: int, flags: str, which: int = 2, number: int = errno.ENOSPC) -> tuple[int, list[str]]:
    """Train, and refuse the n-th event of the `which`-th save; the exit code, and what was refused."""

    def start() -> int:
        count, saves = itertools.count(), itertools.count(1)
        writer: list[int] = []  # with --async_save the loop goes on to write metrics meanwhile
        disk = Disk("out", lambda event, path: threading.get_ident() in writer and next(count) == moment)
        write = Writer._outcome

        def watched(self, *arguments):
            writer[:] = [threading.get_ident()]
            disk.number = number if next(saves) == which else None
            before = contents(Path("out/step-000003")) if which == 2 else {}
            try:
                return write(self, *arguments)
            finally:
                disk.number = None
                Path("refused.txt").write_text("\n".join(disk.refused))
                if disk.refused and which == 2:
                    assert contents(Path("out/step-000003")) == before
                    store.verify(store.find(Path("out"), "latest"))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Writer, "_outcome", watched)
            # With one that does not fail, the next would hide what is lost.
            return train_here(f"--max_iters 6 --eval_interval 3 --dropout 0.1 {flags}")

    code = in_child(start)
    return code, Path("refused.txt").read_text().split("\n")


class TestEveryStepThatReachesTheDisk:
    def check(self, moment: int, flags: str, which: int) -> bool:
        """One event of one save is refused: nothing is lost that was there, and a resume makes up for the rest."""
        shutil.rmtree("out", ignore_errors=True)
        code, refused = save_refused_at(moment, flags, which)
        if refused == [""]:
            assert code == 0
            return False
        assert len(refused) == 1
        told = err()
        assert code == 1, (refused, told)
        (warning,) = [line for line in told if line.startswith("warning: ")]
        step = 3 * which
        lost = f"warning: step {step}: not saved, the checkpoint before it stays: [Errno 28] No space left on device"
        kept = f"warning: step {step}: old checkpoints were not deleted: [Errno 28] No space left on device"
        assert warning.startswith((lost, kept)), (refused, warning)
        out = Path("out")
        whole_run()
        latest = store.find(out, "latest").name
        late = Path(refused[0].split(" ")[1]).name  # the pointers come last: with either of them the folder is whole
        if which == 2 and warning.startswith(lost) and "best" not in late and late != "out":
            assert latest == "step-000003", refused
        else:
            assert latest == "step-000006" or (which == 2 and warning.startswith(lost)), refused
        if store.find(out, "latest").name == "step-000003" and which == 2:
            assert resume(flags) == 0
        else:
            assert resume(f"{flags} --max_iters 7") == 0
        assert not list(out.glob(".fastgpt-tmp-*"))
        whole_run()
        for s in (3, 6):
            if (folder := Path("whole") / f"step-{s:06d}").exists() and (out / folder.name).exists():
                assert all(
                    torch.equal(tensor, store.load_weights(out / folder.name)[name])
                    for name, tensor in store.load_weights(folder).items()
                )
        assert (out / "step-000006").exists()
        losses = records(out)
        assert {s: losses[s] for s in range(1, 7)} == records(Path("whole"))
        return True

    @pytest.mark.parametrize("flags", some(1, ["", "--async_save"]))
    def test_a_sample_of_them(self, flags: str):
        run("--max_iters 6 --eval_interval 3 --dropout 0.1", "whole")
        for moment in (7, 18, 25):
            assert self.check(moment, flags, which=2)
        assert self.check(9, flags, which=1)

    @pytest.mark.slow
    @pytest.mark.parametrize("which", [1, 2])
    @pytest.mark.parametrize("flags", ["", "--async_save"])
    def test_all_of_them(self, flags: str, which: int):
        run("--max_iters 6 --eval_interval 3 --dropout 0.1", "whole")
        moments = next(moment for moment in itertools.count() if not self.check(moment, flags, which))
        assert moments > 25


CONFIG = TrainConfig(vocab_size=11, block_size=8, n_layer=1, n_head=2, n_embd=8)


class TestWriter:
    @pytest.fixture
    def parts(self) -> tuple[GPT, torch.optim.Optimizer]:
        model = GPT(CONFIG)
        return model, make_optimizer(model, CONFIG)

    @pytest.fixture(params=[Writer, BackgroundWriter])
    def writer(self, request, tmp_path: Path) -> Writer:
        return request.param(tmp_path / "run", 2)

    def test_what_is_no_error_of_the_disk_comes_out(self, writer: Writer, parts):
        def broken() -> None:
            raise ZeroDivisionError("a defect")

        writer.save(capture(1, *parts, {}), 0, broken)
        with pytest.raises(ZeroDivisionError, match="a defect"):
            writer.wait()
        assert writer.wait() is None  # it is told once
        writer.save(capture(2, *parts, {}), 0, lambda: None)
        assert writer.wait().saved

    def test_what_is_no_error_of_the_disk_comes_out_at_the_end_at_the_latest(self, writer: Writer, parts):
        def broken() -> None:
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError), writer:
            writer.save(capture(1, *parts, {}), 0, broken)

    def test_what_describes_the_run_comes_first_and_is_part_of_the_save(self, writer: Writer, parts):
        def full() -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        writer.save(capture(1, *parts, {}), 0, full)
        outcome = writer.wait()
        assert (outcome.step, outcome.saved, outcome.error.errno) == (1, False, errno.ENOSPC)
        assert not writer.out_dir.exists()

    def test_old_checkpoints_that_stay_are_no_lost_save(self, writer: Writer, parts, monkeypatch):
        def unable(path: Path) -> None:
            raise OSError(errno.EROFS, "Read-only file system")

        for step in (1, 2):
            writer.save(capture(step, *parts, {}), 0, lambda: None)
            assert writer.wait().error is None
        with monkeypatch.context() as patch:
            patch.setattr(store, "delete_folder", unable)
            writer.save(capture(3, *parts, {}), 0, lambda: None)
            outcome = writer.wait()
        assert (outcome.saved, outcome.error.errno) == (True, errno.EROFS)
        assert store.find(writer.out_dir, "latest") == outcome.folder == writer.out_dir / "step-000003"
        writer.save(capture(4, *parts, {}), 0, lambda: None)  # which makes up for it
        assert writer.wait().error is None
        assert [folder.name for folder in store.folders(writer.out_dir)] == ["step-000003", "step-000004"]

    def test_a_save_at_a_step_that_is_there_already_never_leaves_latest_without_one(self, parts, tmp_path: Path):
        """As after SIGUSR1 in an evaluation, which is saved again after it."""
        out = tmp_path / "run"

        def start(moment: int) -> int:
            store.save(out, capture(1, *parts, {"written": "first"}), best_step=1)
            count = itertools.count()
            disk = Disk(str(out), lambda event, path: next(count) == moment)
            disk.number = errno.ENOSPC
            try:
                store.save(out, capture(1, *parts, {"written": "again"}), best_step=1)
            except OSError:
                disk.number = None
                store.verify(store.find(out, "latest"))
                return 1
            return 0

        for moment in itertools.count():
            shutil.rmtree(out, ignore_errors=True)
            code = in_child(lambda moment=moment: start(moment))
            assert code in (0, 1), (moment, Path("err.txt").read_text())
            if code == 0:
                break
        assert moment > 12


class TestBest:
    @pytest.mark.parametrize("flags", ["", "--async_save"])
    def test_old_checkpoints_that_stay_are_told_and_make_the_exit_code_1(self, monkeypatch, capsys, flags: str):
        def unable(path: Path) -> None:
            raise OSError(errno.EROFS, "Read-only file system")

        monkeypatch.setattr(store, "delete_folder", unable)
        assert train_here(f"--max_iters 6 --eval_interval 2 --keep_last 1 {flags}") == 1
        said = capsys.readouterr().err
        assert "step 6: old checkpoints were not deleted: [Errno 30] Read-only file system" in said
        assert "step 6: val loss" in said
        assert "not saved" not in said
        assert len(store.folders(Path("out"))) == 3

    @pytest.mark.parametrize("flags", ["", "--async_save"])
    @pytest.mark.parametrize("late", [False, True], ids=["told at once", "told at the next save"])
    def test_a_best_step_whose_save_failed_does_not_stay_the_best(self, monkeypatch, capsys, flags: str, late: bool):
        """Of losses 3, 1 (which is not saved), 2.5 and 2.7, the best is the third."""
        losses, save = iter([3.0, 1.0, 2.5, 2.7]), store.save
        monkeypatch.setattr(loss, "mean_loss", lambda *rest, **named: next(losses))

        def full(out_dir: Path, snapshot: store.Snapshot, best_step: int) -> Path:
            if snapshot.step == 4:
                raise OSError(errno.ENOSPC, "No space left on device")
            return save(out_dir, snapshot, best_step)

        monkeypatch.setattr(store, "save", full)
        if late:  # the disk takes longer than the steps to the next evaluation
            monkeypatch.setattr(BackgroundWriter, "poll", lambda self: None)
        assert train_here(f"--max_iters 8 --eval_interval 2 {flags}") == 1
        assert (Path("out") / "best").read_text() == "step-000006\n"
        progress = store.load_state(store.find(Path("out"), "latest"))["progress"]
        assert (progress["best_step"], progress["best_val_loss"]) == (6, 2.5)
        captured = capsys.readouterr()
        assert "step 4: not saved" in captured.err
        assert "2.5000 at step 6" in captured.out

    def test_where_only_the_pointer_to_the_best_fails_the_best_is_the_one_it_names(self, monkeypatch):
        losses = iter([3.0, 1.0, 2.5])
        monkeypatch.setattr(loss, "mean_loss", lambda *rest, **named: next(losses))
        point = store.point

        def full(out_dir: Path, name: str, folder: Path) -> None:
            if (name, folder.name) == ("best", "step-000004"):
                raise OSError(errno.ENOSPC, "No space left on device")
            point(out_dir, name, folder)

        monkeypatch.setattr(store, "point", full)
        assert train_here("--max_iters 6 --eval_interval 2") == 1
        out = Path("out")
        progress = store.load_state(store.find(out, "latest"))["progress"]
        assert (out / "best").read_text() == f"step-{progress['best_step']:06d}\n"
        store.verify(store.find(out, "best"))


def test_a_temporary_folder_makes_room_when_a_save_fails(tmp_path: Path):
    """The half that was written would keep the disk full."""
    model = GPT(CONFIG)
    snapshot = capture(1, model, make_optimizer(model, CONFIG), {})

    def start() -> int:
        Disk("run", lambda event, path: Path(path).name == store.STATE).number = errno.ENOSPC
        with pytest.raises(OSError, match="No space"):
            store.save(Path("run"), snapshot)
        return 0 if list(Path("run").iterdir()) == [] else 1

    assert in_child(start) == 0
