"""A disk that is full, read-only or too small: refused before the first step; later a warning, and nothing is lost."""

import errno
import itertools
import os
import resource
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastgpt import cli, generate, train
from fastgpt.checkpoint import store
from fastgpt.checkpoint.store import capture
from fastgpt.checkpoint.writer import BackgroundWriter, Writer
from fastgpt.config.training import TrainConfig
from fastgpt.evaluation import loss
from fastgpt.loggers import curves
from fastgpt.loggers.jsonl import read_metrics
from fastgpt.model.gpt import GPT
from fastgpt.training.optimizer import make_optimizer
from fastgpt.training.run import Run
from tests.helpers import runs
from tests.helpers.covering import some
from tests.helpers.runs import FLAGS, contents, records, resume, run, tensors

pytestmark = [
    pytest.mark.usefixtures("workplace", "no_picture"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
]
STEPS = "--max_iters 12 --eval_interval 3 --dropout 0.1"
DISK = {"open", "os.mkdir", "os.rename", "fastgpt.write", "fastgpt.sync"}


def in_child(action: Callable[[], int]) -> int:
    """The exit code of an action in a process of its own, whose streams are files here: out.txt and err.txt."""
    number = os.fork()
    if number == 0:
        for stream, name in ((1, "out.txt"), (2, "err.txt")):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        code = 99
        try:
            code = action()
        except BaseException as error:
            print(f"Traceback: {error!r}", file=sys.stderr)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


def err() -> list[str]:
    """What the last child said on stderr."""
    text = Path("err.txt").read_text()
    assert "Traceback" not in text, text
    return text.splitlines()


def train_here(flags: str = "", out_dir: str = "out") -> int:
    return cli.run(train.main, [*FLAGS, "--out_dir", out_dir, *shlex.split(flags)])


class Disk:
    """What the disk refuses, by an audit hook: while `number` is set, the events in a folder that `wants` names."""

    def __init__(self, folder: str, wants: Callable[[str, str], bool]):
        self.folder, self.wants, self.number = str(Path(folder).absolute()), wants, None
        self.refused: list[str] = []
        sys.addaudithook(self.hook)

    def hook(self, event: str, arguments: tuple) -> None:
        if self.number is None or event not in DISK or not isinstance(arguments[0], str | os.PathLike):
            return
        path = str(Path(arguments[0]).absolute())
        if event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        if (path + "/").startswith(self.folder + "/") and self.wants(event, path):
            self.refused.append(f"{event} {Path(path).name}")
            raise OSError(self.number, os.strerror(self.number), path)


def between_steps(patch: pytest.MonkeyPatch, what: Callable[[int], None]) -> None:
    """Let something happen before each step that is taken, and after the save before it; it is given the number."""
    step = Run.take_step

    def stepped(self) -> None:
        self.checkpoints.wait()
        what(self.state.progress.step + 1)
        step(self)

    patch.setattr(Run, "take_step", stepped)


def whole_run(out: Path = Path("out")) -> None:
    """Every checkpoint there is, and those that the pointers name, must be whole, and so every line of metrics."""
    for folder in store.folders(out):
        store.verify(folder)
    for name in ("latest", "best"):
        if (out / name).exists():
            store.verify(store.find(out, name))
    text = (out / "metrics.jsonl").read_text()
    assert text == "" or text.endswith("\n")
    assert len(read_metrics(out / "metrics.jsonl")) == text.count("\n")


def same(out: Path, other: Path) -> bool:
    theirs = tensors(other)
    return all(torch.equal(tensor, theirs[name]) for name, tensor in tensors(out).items())


def limited(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


class TestBeforeTheFirstStep:
    def refused(self, code: int, *words: str) -> None:
        """It ended with exit code 2 and one line, and no step was taken."""
        assert code == 2, err()
        *said, error = err()
        assert all(line.startswith(("preset ", "prepared ", "reused ")) for line in said)
        assert error.startswith("error: --out_dir out")
        assert all(word in error for word in words), error
        assert Path("out.txt").read_text() == ""
        assert not Path("out/metrics.jsonl").exists()
        assert not store.holds_run(Path("out"))
        assert not list(Path().glob("out/.fastgpt-tmp-*"))

    def test_a_limit_on_files_that_a_checkpoint_exceeds(self):
        code = in_child(lambda: limited(70_000) or train_here("--n_embd 64"))
        self.refused(code, "a checkpoint has a file of 1 MiB", "0 MiB", "ulimit -f")
        assert train_here("--max_iters 2") == 0  # the folder can be used

    def test_a_limit_on_files_that_nothing_but_the_messages_keeps(self):
        run("--max_iters 1", "other")  # so that the data is prepared
        self.refused(in_child(lambda: limited(10_000) or train_here()), "out cannot be written: File too large")

    @pytest.mark.slow
    def test_as_a_program(self):
        process = runs.spawn("--n_embd 64", preexec_fn=lambda: limited(70_000))
        out, error = process.communicate(timeout=60)
        assert process.returncode == 2
        assert out == ""
        assert "Traceback" not in error
        assert error.splitlines()[-1].endswith("raise that with ulimit -f")

    @pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EDQUOT, errno.EIO])
    @pytest.mark.parametrize("there", [True, False])
    def test_a_folder_that_cannot_be_written(self, number: int, there: bool):
        if there:
            Path("out").mkdir()

        def start() -> int:
            disk = Disk("out", lambda event, path: not (there and event == "os.mkdir"))
            disk.number = number
            return train_here()

        self.refused(in_child(start), f"out cannot be written: {os.strerror(number)}; name another")

    @pytest.mark.parametrize("name", ["-probe", "metrics.jsonl"])
    @pytest.mark.parametrize("event", ["open", "fastgpt.write", "fastgpt.sync"])
    def test_a_disk_that_takes_the_lock_and_nothing_else(self, name: str, event: str):
        if name == "metrics.jsonl" and event != "open":
            pytest.skip("not before the first step")

        def start() -> int:
            disk = Disk("out", lambda e, path: e == event and name in Path(path).name)
            disk.number = errno.ENOSPC
            return train_here()

        self.refused(in_child(start), "out cannot be written: No space left on device")

    @pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind root")
    def test_a_folder_that_may_not_be_written(self):
        Path("out").mkdir(mode=0o500)
        self.refused(in_child(train_here), "cannot be written: Permission denied; name another")

    def test_a_disk_that_is_too_small(self, monkeypatch):
        usage = shutil.disk_usage(".")._replace(free=200_000)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
        code = in_child(lambda: train_here("--max_iters 9"))  # three checkpoints of 86 KB
        self.refused(code, "room for 3 checkpoints, 0 MiB, is needed", "make room", "--keep_last")
        assert in_child(lambda: train_here("--max_iters 6")) == 0  # two of them

    def test_what_is_to_be_deleted_counts_as_room_in_a_resume(self, monkeypatch):
        out = run("--max_iters 9 --keep_last 1")
        held = sum(file.stat().st_size for file in (out / "step-000009").iterdir())
        assert len(store.folders(out)) == 1
        usage = shutil.disk_usage(".")._replace(free=2 * held)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
        assert resume("--max_iters 18") == 0

    @pytest.mark.parametrize("reason", ["limit", "probe"])
    def test_a_run_that_is_to_be_overwritten_stays_where_the_new_one_is_refused(self, reason: str):
        out = run()
        before = contents(out)

        def start() -> int:
            if reason == "limit":
                limited(70_000)
            else:
                Disk("out", lambda event, path: "probe" in path).number = errno.ENOSPC
            return train_here("--overwrite --n_embd 64")

        assert in_child(start) == 2, err()
        assert contents(out) == before

    def test_a_resume_is_refused_and_loses_nothing(self):
        out = run()
        before = contents(out)
        for number in (errno.EROFS, errno.ENOSPC):

            def start(number: int = number) -> int:
                Disk("out", lambda event, path: True).number = number
                return resume("--max_iters 12")

            assert in_child(start) == 2, err()
            assert err()[-1] == f"error: --out_dir out cannot be written: {os.strerror(number)}; name another"
            assert contents(out) == before
        assert resume("--max_iters 12") == 0

    def test_a_resume_that_cannot_mend_the_pointer_to_the_best_is_refused_in_one_line(self):
        out = run()
        best = (out / "best").read_text()
        (out / "best").unlink()

        def start() -> int:
            Disk("out", lambda event, path: "best" in Path(path).name).number = errno.ENOSPC
            return resume("--max_iters 12")

        code = in_child(start)
        assert err()[-1].startswith("error: --out_dir out cannot be written: No space left"), err()
        assert code == 2
        assert resume("--max_iters 12") == 0
        assert best

    def test_a_read_only_run_can_be_read(self):
        run()

        def read() -> int:
            Disk("out", lambda event, path: True).number = errno.EROFS
            return cli.run(generate.main, ["--device", "cpu", "--max_new_tokens", "3"])

        assert in_child(read) == 0, err()


class TestDuringTraining:
    """The first checkpoint, of step 3, is taken; what comes after is not."""

    def fails_after_step_3(self, flags: str = "", until: int = 10**6, number: int = errno.ENOSPC) -> int:
        """The exit code of a training whose disk takes nothing from step 4 until a step."""

        def start() -> int:
            disk = Disk("out", lambda event, path: True)
            with pytest.MonkeyPatch.context() as patch:
                between_steps(patch, lambda step: setattr(disk, "number", number if 4 <= step < until else None))
                return train_here(f"{STEPS} {flags}")

        return in_child(start)

    @pytest.mark.parametrize("flags", ["", "--async_save"])
    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
    @pytest.mark.covering_array(1)
    def test_nothing_more_is_taken(self, flags: str, number: int):
        whole = run(STEPS, "whole")
        assert self.fails_after_step_3(flags, number=number) == 1
        told = err()
        reason = os.strerror(number)
        for step in (6, 9, 12):
            said = f"warning: step {step}: not saved, the checkpoint before it stays: [Errno {number}] {reason}"
            assert sum(line.startswith(said) for line in told) == 1, told
        assert any(line.startswith("step 12/12") for line in told)  # it went on to the end
        assert "times the disk did not take what was written" in Path("out.txt").read_text()
        assert [folder.name for folder in store.folders(Path("out"))] == ["step-000003"]
        assert store.find(Path("out"), "latest") == store.find(Path("out"), "best") == Path("out/step-000003")
        whole_run()
        assert resume() == 0
        assert same(Path("out"), whole)
        assert records(Path("out")) == records(whole)

    @pytest.mark.parametrize("flags", ["", "--async_save"])
    def test_the_next_interval_tries_again(self, flags: str):
        whole = run(STEPS, "whole")
        assert self.fails_after_step_3(flags, until=11) == 1  # though the last save works
        assert not any(line.startswith("warning: step 12") for line in err())
        assert store.find(Path("out"), "latest").name == "step-000012"
        whole_run()
        assert same(Path("out"), whole)
        assert (Path("out") / "best").read_text() == f"step-{self.best(Path('out')):06d}\n"

    @staticmethod
    def best(out: Path) -> int:
        """The best step of those whose checkpoint was written."""
        progress = store.load_state(store.find(out, "latest"))["progress"]
        losses = records(out, "val_loss")
        assert progress["best_val_loss"] == losses[progress["best_step"]]
        return progress["best_step"]

    @pytest.mark.parametrize(
        ("flags", "raised"),
        [
            ("", True),
            ("", False),
            ("--async_save", True),
            ("--async_save", False),
        ],
    )
    @pytest.mark.slow
    def test_a_limit_on_the_size_of_files(self, flags: str, raised: bool):
        """As a program: the kernel itself refuses, in the middle of a file, and cuts a line of metrics short."""
        code = (
            "import resource, sys; from fastgpt import cli, train\n"
            "from fastgpt.training.run import Run; step = Run.take_step\n"
            "def limit(size): resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))\n"
            "def stepped(self):\n"
            "    self.checkpoints.wait()\n"
            "    if self.state.progress.step == 4: limit(1000)\n"
            f"    if self.state.progress.step == 10 and {raised}: limit(resource.RLIM_INFINITY)\n"
            "    step(self)\n"
            "Run.take_step = stepped\n"
            "sys.exit(cli.run(train.main))"
        )
        whole = run(STEPS, "whole")
        command = [sys.executable, "-c", code, *FLAGS, *shlex.split(f"{STEPS} {flags}")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 1, done.stderr
        assert "Traceback" not in done.stderr
        assert "warning: step 6: not saved, the checkpoint before it stays: [Errno 27] File too large" in done.stderr
        assert "metrics.jsonl misses a line of step" in done.stderr
        assert (Path("out/metrics.jsonl").stat().st_size > 1000) == raised
        latest = store.find(Path("out"), "latest")
        assert latest.name == ("step-000012" if raised else "step-000003")
        whole_run()
        assert resume(f"--max_iters {12 if not raised else 15}") == 0
        if not raised:
            assert same(Path("out"), whole)

    @pytest.mark.parametrize("what", ["metrics.jsonl", "loss.png"])
    def test_each_thing_that_was_not_written_makes_the_exit_code_1(self, monkeypatch, what: str):
        whole = run(STEPS, "whole")

        def unable(out_dir: Path) -> Path:
            raise OSError(errno.ENOSPC, "No space left on device")

        def start() -> int:
            if what == "loss.png":
                monkeypatch.setattr(curves, "plot_loss", unable)
            disk = Disk("out", lambda event, path: Path(path).name == what and event == "fastgpt.write")
            with pytest.MonkeyPatch.context() as patch:
                between_steps(patch, lambda step: setattr(disk, "number", errno.ENOSPC if step == 5 else None))
                return train_here(STEPS)

        assert in_child(start) == 1
        assert "1 time the disk did not take" in Path("out.txt").read_text()
        assert same(Path("out"), whole)
        assert list(records(Path("out"))) == [s for s in range(1, 13) if s != 5 or what != "metrics.jsonl"]
        whole_run()


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


def in_small_disk(size: str, script: str) -> subprocess.CompletedProcess:
    """Run a shell script in a namespace where out/ is a disk of this size; skips where there are no namespaces."""
    Path("out").mkdir(exist_ok=True)
    mount = f"mount -t tmpfs -o size={size} small out"
    try:
        able = subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True).returncode == 0
    except FileNotFoundError:
        able = False
    if not able:
        pytest.skip("no file system can be mounted here")
    command = ["unshare", "-rm", "sh", "-c", f"{mount} && {script}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux's namespaces")
class TestSmallDisk:
    """A real file system that is full."""

    @pytest.mark.slow
    def test_a_model_whose_checkpoints_do_not_fit_is_refused(self):
        flags = shlex.join([*FLAGS, "--n_embd", "64"])  # checkpoints of 1.3 MB
        done = in_small_disk("2m", f"{sys.executable} -m fastgpt.train {flags}; echo code $?; ls -A out")
        assert done.stdout.split() == ["code", "2", ".lock"], done.stderr
        assert "Traceback" not in done.stderr
        assert done.stderr.splitlines()[-1].startswith("error: --out_dir out: room for 2 checkpoints, 2 MiB, is needed")

    @pytest.mark.slow
    def test_a_disk_that_somebody_else_fills_during_training(self):
        code = (
            "import os, sys; from fastgpt import cli, train\n"
            "from fastgpt.training.run import Run; step = Run.take_step\n"
            "def stepped(self):\n"
            "    if self.state.progress.step == 4:\n"
            "        with open('out/filler', 'wb', buffering=0) as file:\n"
            "            try:\n"
            "                while True: file.write(bytes(4096))\n"
            "            except OSError: pass\n"
            "    step(self)\n"
            "Run.take_step = stepped\n"
            "sys.exit(cli.run(train.main))"
        )
        flags = shlex.join([*FLAGS, *shlex.split(STEPS)])
        python = shlex.quote(sys.executable)
        script = (
            f"{python} -c {shlex.quote(code)} {flags}; echo code $?; ls out; cat out/latest; "
            f"{python} -m fastgpt.verify out; echo code $?; rm out/filler; "
            f"{python} -m fastgpt.train --init_from resume; echo code $?; cp -r out kept"
        )
        whole = run(STEPS, "whole")
        done = in_small_disk("1m", script)
        codes = [line for line in done.stdout.splitlines() if line.startswith("code ")]
        assert codes == ["code 1", "code 0", "code 0"], done.stderr
        assert "Traceback" not in done.stderr
        for step in (6, 9, 12):
            said = (
                f"warning: step {step}: not saved, the checkpoint before it stays: [Errno 28] No space left on device"
            )
            assert said in done.stderr
        assert "step-000003" in done.stdout.splitlines()
        assert same(Path("kept"), whole)
        records(Path("kept"))
        assert not list(Path("kept").glob(".fastgpt-tmp-*"))


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
