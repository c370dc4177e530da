"""A disk that is full, read-only or too small, refused before the first step."""

import errno
import os
import shutil
from pathlib import Path

import pytest

from fastgpt import cli, generate
from fastgpt.checkpoint import store
from tests.helpers import runs
from tests.helpers.disks import Disk, err, in_child, limited, train_here
from tests.helpers.runs import contents, resume, run

pytestmark = [
    pytest.mark.usefixtures("workplace"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
]


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
        code = in_child(lambda: limited(70_000) or train_here("--n_layer 2 --n_embd 64"))
        self.refused(code, "a checkpoint has a file of 800 KiB", "may write 68 KiB", "ulimit -f")
        assert train_here("--max_iters 2") == 0  # the folder can be used

    def test_a_limit_on_files_that_nothing_but_the_messages_keeps(self):
        run("--max_iters 1", "other")  # so that the data is prepared
        self.refused(in_child(lambda: limited(10_000) or train_here()), "out cannot be written: File too large")

    @pytest.mark.slow
    def test_as_a_program(self):
        process = runs.spawn("--n_layer 2 --n_embd 64", preexec_fn=lambda: limited(70_000))
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
        code = in_child(lambda: train_here("--n_layer 2 --max_iters 9"))  # three checkpoints of 86 KB
        self.refused(code, "room for 3 checkpoints, 253 KiB, is needed", "make room", "--keep_last")
        assert in_child(lambda: train_here("--n_layer 2 --max_iters 6")) == 0  # two of them

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
