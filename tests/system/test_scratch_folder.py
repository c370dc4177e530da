"""Scratch folders: what a killed process left is deleted, and what a living one writes is not touched."""

import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from fastgpt.data import corpus
from fastgpt.system.scratch_folder import scratch_folder
from tests.helpers.corpora import prepare, text_of

HELD = """
import sys, time
from pathlib import Path
from fastgpt.system.scratch_folder import scratch_folder
with scratch_folder(Path(sys.argv[1])) as folder:
    (folder / "half").write_text("half")
    folder.with_name(folder.name + ".damaged").mkdir()
    print(folder, flush=True)
    time.sleep(600)
"""
# Prepares a text, and waits for its end when the first token file is being written.
PREPARING = """
import sys, time
from fastgpt.data import corpus
from fastgpt.data import token_file
def stuck(path, *rest):
    path.write_bytes(b"half")
    print(path.parent, flush=True)
    time.sleep(600)
token_file.write = stuck
corpus.prepare(sys.argv[1], data_dir=sys.argv[2], quiet=True)
"""


def start(code: str, *arguments: Path) -> tuple[subprocess.Popen, Path]:
    """A process that runs until it is killed, and the folder that it writes in."""
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = {sys.path!r}\n{code}", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def kill(process: subprocess.Popen) -> None:
    process.kill()
    process.wait(10)
    process.stdout.close()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("ending", ["renamed", "left", "raised"])
def test_nothing_is_left_but_what_was_renamed(ending: str, tmp_path: Path):
    target = tmp_path / "data" / "text"
    try:
        with scratch_folder(target) as folder:
            assert folder.parent == target.parent
            assert folder.name.startswith(".text.")
            (folder / "file").write_text("whole")
            (folder / "inner").mkdir()
            folder.with_name(folder.name + ".damaged").mkdir()
            if ending == "renamed":
                folder.rename(target)
            if ending == "raised":
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert names(tmp_path) == ([] if ending == "raised" else ["data"])
    assert ending == "raised" or names(target.parent) == (["text"] if ending == "renamed" else [])


def test_what_a_killed_process_left_is_deleted_and_what_a_living_one_writes_is_not(tmp_path: Path):
    living, its_folder = start(HELD, tmp_path / "data" / "a")
    killed, left = start(HELD, tmp_path / "data" / "b")
    try:
        before = names(its_folder.parent)
        kill(killed)
        assert names(left.parent) == before  # nobody has looked yet
        with scratch_folder(tmp_path / "data" / "c") as own:
            found = names(own.parent)
        assert not any(name.startswith(left.name) for name in found)
        assert (its_folder / "half").read_text() == "half"
        assert [name for name in before if name.startswith(its_folder.name)] == names(its_folder.parent)
    finally:
        for process in (living, killed):
            kill(process)
    with scratch_folder(tmp_path / "data" / "c"):
        pass
    assert names(its_folder.parent) == []


def test_a_preparation_that_was_killed_is_cleaned_up_by_the_next(tmp_path: Path):
    (tmp_path / "text.txt").write_text("some text, " * 50)
    killed, left = start(PREPARING, tmp_path / "text.txt", tmp_path / "data")
    kill(killed)
    assert (left / "train.bin").exists()
    prepared = prepare(tmp_path / "text.txt", tmp_path)
    assert names(tmp_path / "data") == [prepared.path.name]
    assert text_of(prepared) == "some text, " * 50


def test_somebody_elses_hidden_files_stay(tmp_path: Path):
    for name in (".git", ".text.scratch", ".cache.lock", "x.scratch"):
        (tmp_path / name).mkdir()
    with scratch_folder(tmp_path / "text"):
        pass
    assert names(tmp_path) == [".cache.lock", ".git", ".text.scratch", "x.scratch"]


def test_a_link_in_the_place_of_a_lock_harms_nobody(tmp_path: Path):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / ".x.scratch.lock").symlink_to(tmp_path / "precious")
    with scratch_folder(tmp_path / "text"):
        pass
    assert (tmp_path / "precious").read_text() == "precious"


def test_many_at_once_do_not_disturb_each_other(tmp_path: Path):
    """Every thread holds its own locks, as processes do."""
    stop, failures = time.monotonic() + 1.0, []

    def work(number: int) -> None:
        while time.monotonic() < stop:
            try:
                with scratch_folder(tmp_path / f"t{number}") as folder:
                    (folder / "file").write_text("whole")
                    time.sleep(0.002)
                    assert (folder / "file").read_text() == "whole"
                    folder.rename(tmp_path / f"t{number}")
                shutil.rmtree(tmp_path / f"t{number}")
            except BaseException as error:
                failures.append(error)
                raise

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert names(tmp_path) == []


def test_a_folder_that_was_in_use_a_moment_ago_is_not_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Between seeing a lock and taking it, its owner may be done: one that is made then would be the next owner's."""
    opened, made = Path.open, []

    def late(path: Path, *arguments, **options):
        monkeypatch.setattr(Path, "open", opened)
        path.unlink()
        file = opened(path, *arguments, **options)
        made.append(path)
        return file

    (tmp_path / ".text.0123abcd.scratch.lock").touch()
    monkeypatch.setattr(Path, "open", late)
    with scratch_folder(tmp_path / "text") as folder:
        assert names(tmp_path) == [folder.name, f"{folder.name}.lock"]
    assert not made


def test_a_failed_write_says_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    (tmp_path / "text.txt").write_text("some text")
    monkeypatch.setattr(corpus.token_file, "write", full)
    with pytest.raises(corpus.UsageError, match=r"`data_dir` .*: No space left on device"):
        prepare(tmp_path / "text.txt", tmp_path)
    assert names(tmp_path) == ["text.txt"]
