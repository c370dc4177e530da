"""A disk that fails during a run: a warning, and nothing is lost."""

import errno
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fastgpt.checkpoint import store
from fastgpt.loggers import curves
from tests.helpers.disks import STEPS, Disk, between_steps, err, in_child, same, train_here, whole_run
from tests.helpers.runs import FLAGS, records, resume, run

pytestmark = [
    pytest.mark.usefixtures("workplace"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
]


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
        flags = shlex.join([*FLAGS, "--n_layer", "2", "--n_embd", "64"])  # checkpoints of 1.3 MB
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
