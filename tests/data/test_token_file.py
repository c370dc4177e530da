"""Token files are read whole when they are opened: every id, and the hash."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from fastgpt.data import prepared, token_file
from fastgpt.errors import UsageError
from fastgpt.system.units import counted
from fastgpt.tokenizer.byte import ByteTokenizer
from fastgpt.tokenizer.char import CharTokenizer
from tests.helpers.corpora import prepare, refused, text_of

TEXT = "It was the best of times, it was the worst of times.\n" * 20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A prepared text, text.txt."""
    (tmp_path / "text.txt").write_text(TEXT)
    return prepare(tmp_path / "text.txt", tmp_path).path


def rehash(folder: Path, file: str) -> None:
    """Make meta.json agree with a token file that was changed."""
    meta = json.loads((folder / "meta.json").read_text())
    meta[Path(file).stem]["sha256"] = hashlib.sha256((folder / file).read_bytes()).hexdigest()
    (folder / "meta.json").write_text(json.dumps(meta))


def change(path: Path, index: int, token: int, dtype: str = "uint16") -> None:
    np.memmap(path, dtype=dtype, mode="r+")[index] = token


@pytest.mark.parametrize("file", ["train.bin", "val.bin"])
@pytest.mark.parametrize("index", [0, 40, -1])
def test_a_change_is_refused_by_file(file: str, index: int, folder: Path, tmp_path: Path):
    tokens = np.fromfile(folder / file, dtype=np.uint16)
    change(folder / file, index, int(tokens[index]) ^ 1)
    message = refused(folder, tmp_path)
    assert f"{folder / file} changed since it was prepared" in message
    assert f"delete {folder} and prepare it again" in message


@pytest.mark.parametrize("file", ["train.bin", "val.bin"])
@pytest.mark.parametrize("index", [0, 40, -1])
def test_an_id_beyond_the_vocabulary_is_refused(file: str, index: int, folder: Path, tmp_path: Path):
    vocab_size = len(set(TEXT))
    change(folder / file, index, vocab_size)
    rehash(folder, file)
    message = refused(folder, tmp_path)
    assert f"{folder / file} holds token {vocab_size}, and its vocabulary has {vocab_size} tokens" in message
    change(folder / file, index, vocab_size - 1)
    rehash(folder, file)
    prepared.load(folder)


@pytest.mark.parametrize("file", ["train.bin", "val.bin"])
def test_a_missing_file_is_refused_by_name(file: str, folder: Path, tmp_path: Path):
    (folder / file).unlink()
    for dataset in (folder, folder.name):
        message = refused(dataset, tmp_path)
        assert f"{folder / file} cannot be read: No such file" in message
        assert "prepare the corpus again" in message


def test_a_changed_folder_is_not_reused_for_its_text(folder: Path, tmp_path: Path):
    change(folder / "train.bin", 7, 0)
    again = prepare(tmp_path / "text.txt", tmp_path)
    assert again.path == folder
    assert text_of(again) == TEXT


@pytest.mark.parametrize("hashes", [None, {}, 7, "0"])
def test_a_meta_without_its_hashes_is_refused(hashes: object, folder: Path, tmp_path: Path):
    meta = json.loads((folder / "meta.json").read_text())
    meta["val"]["sha256"] = hashes
    (folder / "meta.json").write_text(json.dumps(meta))
    assert str(folder) in refused(folder, tmp_path)
    del meta["val"]["sha256"]
    (folder / "meta.json").write_text(json.dumps(meta))
    assert "meta.json is damaged: it has no 'sha256'" in refused(folder, tmp_path)


@pytest.mark.parametrize("value", [1e999, "many", None, -1, 10**400])
def test_a_meta_with_absurd_counts_is_refused(value: object, folder: Path, tmp_path: Path):
    meta = json.loads((folder / "meta.json").read_text())
    for name in ("characters", "vocab_size"):
        (folder / "meta.json").write_text(json.dumps(meta | {name: value}))
        if name == "vocab_size" or value not in (-1, 10**400):
            assert f"{folder / 'meta.json'} is damaged" in refused(folder, tmp_path)
    (folder / "meta.json").write_text(json.dumps(meta | {"train": meta["train"] | {"tokens": value}}))
    assert str(folder) in refused(folder, tmp_path)


def test_a_huge_or_deep_meta_is_refused(folder: Path, tmp_path: Path):
    (folder / "meta.json").write_bytes(b"[" * 200_000)
    assert "meta.json is damaged: it is nested too deep" in refused(folder, tmp_path)
    with (folder / "meta.json").open("wb") as file:
        file.truncate(1 << 40)
    assert "meta.json is damaged: it is larger than 64 MiB" in refused(folder, tmp_path)


def test_nanogpts_ids_are_checked(tmp_path: Path):
    pickle = pytest.importorskip("pickle")
    folder = tmp_path / "data" / "foreign"
    folder.mkdir(parents=True)
    (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 3, "itos": dict(enumerate("abc"))}))
    for file in ("train.bin", "val.bin"):
        for each in ("train.bin", "val.bin"):
            np.array([0, 1, 2] * 500, dtype=np.uint16).tofile(folder / each)
        change(folder / file, 700, 3)
        assert f"{folder / file} holds token 3, and its vocabulary has 3 tokens" in refused(folder, tmp_path)


@pytest.mark.parametrize("block", [4, 8, 1 << 20])
@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_a_scan_sees_every_token_whatever_the_block(block: int, dtype: str, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(token_file, "READ_BYTES", block)
    path = tmp_path / "x.bin"
    for place in range(7):
        tokens = np.zeros(7, dtype=dtype)
        tokens[place] = 99
        tokens.tofile(path)
        digest = hashlib.sha256()
        assert token_file.scan(path, dtype, 100, digest) == 7
        assert digest.hexdigest() == hashlib.sha256(path.read_bytes()).hexdigest()
        with pytest.raises(UsageError, match="holds token 99, and its vocabulary has 99"):
            token_file.scan(path, dtype, 99)
    for size in (0, 1, 7, 13):
        path.write_bytes(b"\1" * size)
        held = counted(size, "byte")
        with pytest.raises(UsageError, match=f"x.bin has {held}, which is no whole number of {dtype} tokens"):
            token_file.scan(path, dtype, 1 << 20)


class TestGivenVocabulary:
    def test_a_text_takes_it_and_replaces_no_other_folder(self, tmp_path: Path):
        (tmp_path / "text.txt").write_text(TEXT)
        first = prepare(tmp_path / "text.txt", tmp_path)
        given = CharTokenizer("".join(sorted(set(TEXT) | set("?!"))))
        second = prepare(tmp_path / "text.txt", tmp_path, vocabulary=given)
        assert second.tokenizer == given
        assert second.path.name == f"text-char-of-{given.sha256()[:8]}-{first.source_sha256[:8]}"
        assert second.source_sha256 == first.source_sha256
        assert text_of(second) == text_of(prepared.load(first.path)) == TEXT
        assert prepare(tmp_path / "text.txt", tmp_path, vocabulary=given) == second
        other = CharTokenizer("".join(sorted(set(TEXT) | set("?#"))))
        assert prepare(tmp_path / "text.txt", tmp_path, vocabulary=other).path not in (first.path, second.path)

    def test_its_kind_counts_and_not_the_flag(self, tmp_path: Path):
        (tmp_path / "text.txt").write_text(TEXT)
        prepared = prepare(tmp_path / "text.txt", tmp_path, vocabulary=ByteTokenizer())
        assert prepared.path.name.startswith("text-byte-of-")
        assert text_of(prepared) == TEXT

    def test_an_unknown_character_is_named(self, tmp_path: Path):
        (tmp_path / "text.txt").write_text(TEXT + "#")
        message = refused(tmp_path / "text.txt", tmp_path, vocabulary=CharTokenizer("".join(sorted(set(TEXT)))))
        assert "lacks '#' (U+0023)" in message
