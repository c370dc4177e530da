"""Conversions on disks that refuse, and conversions that are killed: there is the whole result, or nothing."""

import errno
import itertools
import os
import shutil
import sys
from pathlib import Path

import pytest

from fastgpt.checkpoint.source import open_model
from tests.helpers.conversions import FORMATS, UNVERIFIED, call
from tests.helpers.covering import some
from tests.helpers.disks import Disk, in_child, limited
from tests.helpers.runs import contents

pytestmark = pytest.mark.usefixtures("here")
OS_CODES = {"full": errno.ENOSPC, "read-only": errno.EROFS, "failing": errno.EIO}


class TestDisks:
    @pytest.mark.parametrize("way", OS_CODES)
    @pytest.mark.parametrize("format", ["huggingface", "fastgpt"])
    @pytest.mark.covering_array(1)
    def test_a_disk_that_refuses_leaves_nothing(self, here: Path, way: str, format: str):
        for number in range(0, 9, 4):
            disk, count = Disk(str(here), lambda event, path: True), iter(range(99))
            disk.wants = lambda event, path, count=count, number=number: next(count) >= number and "err" not in path

            def action(disk: Disk = disk) -> int:
                disk.number = OS_CODES[way]
                return call(f"hf new --format {format} {UNVERIFIED}")

            assert in_child(action) == 2
            said = Path("err.txt").read_text()
            assert said == f"error: --dst new cannot be written: {os.strerror(OS_CODES[way])}; name another\n"
            assert sorted(path.name for path in here.iterdir()) == ["err.txt", "hf", "out.txt"]

    @pytest.mark.parametrize("format", FORMATS)
    def test_a_file_that_may_not_grow_leaves_nothing(self, here: Path, format: str):
        def action() -> int:
            limited(4096)
            return call(f"hf new --format {format} {UNVERIFIED}")

        assert in_child(action) == 2
        said = Path("err.txt").read_text()
        assert said == "error: --dst new cannot be written: File too large; name another\n"
        assert sorted(path.name for path in here.iterdir()) == ["err.txt", "hf", "out.txt"]

    @pytest.mark.parametrize(
        ("format", "old"),
        some(1, [*itertools.product(FORMATS, [True, False])]),
    )
    def test_a_killed_conversion_is_whole_or_nothing_and_the_next_one_cleans_up(
        self, here: Path, format: str, old: bool
    ):
        """Killed at every operation that changes the folder, one after another, until it gets to its end."""
        if old:
            assert call(f"hf kept --format {format} {UNVERIFIED}") == 0
            shutil.copytree("kept", "new")
        before = {name.removeprefix("new"): data for name, (data, _) in contents(Path("new")).items()}
        for number in range(0, 200, 3):
            if killed_at(number, f"hf new --format {format} --dtype bfloat16 --overwrite {UNVERIFIED}") == 0:
                break
            found = {name.removeprefix("new"): data for name, (data, _) in contents(Path("new")).items()}
            if Path("new").exists():
                assert found == before or open_model(Path("new")).format == format
            assert call(f"hf new --format {format} --overwrite {UNVERIFIED}") == 0
            assert sorted(p.name for p in here.iterdir() if p.name[0] == ".") == []
            shutil.rmtree("new")
            if old:
                shutil.copytree("kept", "new")
        else:
            raise AssertionError("it never got to its end")
        assert number >= 9

    def test_what_was_put_aside_is_put_back(self, capsys, here: Path):
        """Killed between the two renames of a replacement, it leaves the old result aside."""
        assert call(f"hf new --format huggingface {UNVERIFIED}") == 0
        before = contents(Path("new"))
        Path("new").rename(".fastgpt-tmp-aside-new-123")
        Path(".fastgpt-tmp-aside-newer-123").mkdir()  # another's
        capsys.readouterr()
        assert call(f"hf new --format huggingface {UNVERIFIED}") == 2
        assert "--dst new exists" in capsys.readouterr().err
        assert contents(Path("new")) == before
        assert sorted(path.name for path in here.iterdir()) == [".fastgpt-tmp-aside-newer-123", "hf", "new"]


def killed_at(number: int, flags: str) -> int:
    """The exit code of a conversion in a process of its own that is killed at an operation on the disk; 0: it ended."""

    def action() -> int:
        left = iter(range(number))

        def hook(event: str, arguments: tuple) -> None:
            writes = event == "open" and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            changes = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "fastgpt.write", "fastgpt.sync")
            if (writes or changes) and next(left, None) is None:
                os.kill(os.getpid(), 9)

        sys.addaudithook(hook)
        return call(flags)

    return in_child(action)
