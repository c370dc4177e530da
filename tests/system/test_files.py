"""Files are whole or absent, synced before they are renamed, and known by their hash."""

import hashlib
import os
from contextlib import suppress
from pathlib import Path

import pytest

from fastgpt.system import files
from fastgpt.system.files import TEMPORARY, sha256, temporary_sibling, write_atomic


class Killed(Exception):
    """The process ends here."""


@pytest.mark.parametrize("content", ["a é\n", b"\x00\xff", ""])
def test_text_and_bytes_are_written_as_they_are(tmp_path: Path, content: str | bytes):
    path = tmp_path / "file"
    for _ in range(2):  # anew, and in the place of another
        write_atomic(path, content)
        assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
        assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("there", "put", "left"),
    [
        (".", None, []),
        ("a", None, ["a"]),
        (".", "a/other", ["a", "a/other"]),
        (".", "a/b/target", ["a", "a/b", "a/b/target"]),
    ],
)
def test_parents_that_were_made_are_removed_if_they_are_empty(tmp_path: Path, there: str, put: str | None, left):
    (tmp_path / there).mkdir(exist_ok=True)
    with suppress(Killed), files.parents_of(tmp_path / "a" / "b" / "target"):
        assert (tmp_path / "a" / "b").is_dir()
        if put is not None:
            (tmp_path / put).write_text("")
        raise Killed
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")) == left


def test_parents_stay_after_a_success_and_none_are_left_of_a_failure_to_make_them(tmp_path: Path):
    with files.parents_of(tmp_path / "a" / "b" / "target"):
        pass
    assert (tmp_path / "a" / "b").is_dir()
    with pytest.raises(OSError), files.parents_of(tmp_path / "c" / ("x" * 300) / "target"):
        pass
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("there", [True, False])
def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch, call: str, there: bool):
    def deadly(*arguments):
        raise Killed

    path = tmp_path / "state.json"
    if there:
        write_atomic(path, "before")
    monkeypatch.setattr(os if call == "fsync" else Path, call, deadly)
    with pytest.raises(Killed):
        write_atomic(path, "after")
    assert (path.read_text() if path.exists() else None) == ("before" if there else None)
    (left,) = (other for other in tmp_path.iterdir() if other != path)
    assert left.name.startswith(TEMPORARY)
    monkeypatch.undo()
    write_atomic(path, "later")  # the same process, which takes the same temporary name
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_text() == "later"


def test_content_is_on_the_disk_before_the_name_and_then_the_folder(tmp_path: Path, monkeypatch):
    path, seen, fsync, replace = tmp_path / "file", [], os.fsync, Path.replace
    inodes = {}

    def watched(self: Path, target: Path):
        inodes.update({self.stat().st_ino: "content", tmp_path.stat().st_ino: "folder"})
        seen.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", lambda file: seen.append(os.fstat(file).st_ino) or fsync(file))
    monkeypatch.setattr(Path, "replace", watched)
    write_atomic(path, "text")
    assert [inodes.get(event, event) for event in seen] == ["content", "rename", "folder"]


def test_a_temporary_name_is_in_the_same_folder_and_of_this_process(tmp_path: Path):
    name = temporary_sibling(tmp_path / "config.json")
    assert name.parent == tmp_path
    assert name.name == f".fastgpt-tmp-config.json-{os.getpid()}"


@pytest.mark.parametrize("sizes", [[0], [3], [(1 << 20) + 1], [5, 0, 1 << 20, 7]], ids=str)
def test_the_hash_is_that_of_the_files_laid_end_to_end(tmp_path: Path, sizes: list[int]):
    paths, whole = [], b""
    for index, size in enumerate(sizes):
        paths.append(tmp_path / str(index))
        paths[-1].write_bytes(content := os.urandom(size))
        whole += content
    assert sha256(*paths) == hashlib.sha256(whole).hexdigest()


def test_files_and_folders_can_be_synced_and_what_is_missing_is_an_error(tmp_path: Path):
    (tmp_path / "file").touch()
    files.sync(tmp_path / "file")
    files.sync(tmp_path)
    with pytest.raises(FileNotFoundError):
        files.sync(tmp_path / "nothing")
