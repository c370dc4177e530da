"""Corpora of documents: their shards, their splits, the same bytes by any way there, and what is refused."""

import errno
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import fastgpt
from fastgpt import cli, train, verify
from fastgpt import prepare as command
from fastgpt.data import corpus, document_corpus, documents, prepared, token_file
from fastgpt.data.prepared import Corpus
from fastgpt.data.sharded_tokens import ShardedTokens
from fastgpt.errors import UsageError
from fastgpt.system import lock
from fastgpt.tokenizer.byte import ByteTokenizer
from tests.helpers.corpora import needs_gpt2
from tests.helpers.killed import is_killed_at
from tests.helpers.places import ROOT
from tests.helpers.runs import FLAGS, at_call, resume

WORDS = ["the", "quick", "brown", "fox,", "häuser,", "안녕", "and", "<|endoftext|>\n"]
RANDOM = random.Random(0)
TEXTS = [" ".join(RANDOM.choices(WORDS, k=RANDOM.randint(1, 30))) + f" {number}" for number in range(120)]
SHARE = 0.3
ending = pytest.mark.parametrize("kind", ["byte", pytest.param("gpt2", marks=needs_gpt2), "bpe"])


def is_val(text: str, share: float = SHARE) -> bool:
    return int(hashlib.blake2b(text.encode(), digest_size=8).hexdigest(), 16) / 2**64 < share


def write_lines(path: Path, texts: list[str], key: str = "text") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"n": 1, key: text}) + "\n" for text in texts), encoding="utf-8")


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "PART_BYTES", 3000)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """120 documents in files of two kinds, in the order of `TEXTS`, an empty one of each kind, and another file."""
    folder = tmp_path / "docs"
    write_lines(folder / "a.jsonl", [*TEXTS[:60], ""])
    (folder / "b").mkdir()
    for number, text in enumerate([*TEXTS[60:80], ""], 10):
        (folder / "b" / f"{number}.TXT").write_bytes(text.encode())
    write_lines(folder / "c.jsonl", TEXTS[80:])
    (folder / "README.md").write_text("no document")
    return folder


def prepare(source: Path, tmp_path: Path, **options) -> Corpus:
    given = {"tokenizer": "byte", "val_share": SHARE, "jobs": 1, "data_dir": str(tmp_path / "data"), "quiet": True}
    return document_corpus.prepare(str(source), **given | options)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def texts_of(tokens, vocabulary) -> list[str]:
    ids = np.asarray(tokens)
    ends = np.flatnonzero(ids == vocabulary.end_token)
    assert ends[-1] == len(ids) - 1
    return [vocabulary.decode(part[part != vocabulary.end_token]) for part in np.split(ids, ends + 1)[:-1]]


class TestDocuments:
    @ending
    def test_each_is_in_one_split_in_order_and_ends(self, kind: str, source: Path, tmp_path: Path):
        made = prepare(source, tmp_path, tokenizer=kind, vocab_size=300 if kind == "bpe" else None)
        train, val = made.train(), made.val()
        assert isinstance(train, ShardedTokens)
        assert len(made.train_files) > 3
        assert texts_of(train, made.tokenizer) == [text for text in TEXTS if not is_val(text)]
        assert texts_of(val, made.tokenizer) == [text for text in TEXTS if is_val(text)]
        assert (made.documents, made.name, made.tokenizer.kind) == (True, "docs", kind)
        assert (made.train_tokens, made.val_tokens) == (len(train), len(val))
        assert made.val_bytes == sum(len(text.encode()) for text in TEXTS if is_val(text))
        assert (made.characters, made.bytes) == (len("".join(TEXTS)), len("".join(TEXTS).encode()))

    def test_what_meta_json_says(self, source: Path, tmp_path: Path):
        made = prepare(source, tmp_path)
        meta = json.loads((made.path / "meta.json").read_text())
        files = {"meta.json"}
        for split, wanted in (("train", False), ("val", True)):
            shards = meta[split]["shards"]
            assert meta[split]["documents"] == sum(is_val(text) is wanted for text in TEXTS)
            for count in ("tokens", "bytes"):
                assert meta[split][count] == sum(shard[count] for shard in shards)
            for shard in shards:
                content = (made.path / shard["file"]).read_bytes()
                assert (len(content), hashlib.sha256(content).hexdigest()) == (2 * shard["tokens"], shard["sha256"])
                files.add(shard["file"])
        assert {path.name for path in made.path.iterdir()} == files
        assert [path.name for path in (tmp_path / "data").iterdir()] == [made.path.name]

    def test_rows_of_parquet(self, source: Path, tmp_path: Path):
        pyarrow = pytest.importorskip("pyarrow", reason="needs the extra parquet")
        pytest.importorskip("pyarrow.parquet")
        (tmp_path / "rows").mkdir()
        table = pyarrow.table({"n": list(range(120)), "body": TEXTS})
        pyarrow.parquet.write_table(table, tmp_path / "rows" / "x.parquet", row_group_size=17)
        made = prepare(tmp_path / "rows", tmp_path, text_key="body")
        assert texts_of(made.train(), made.tokenizer) == [text for text in TEXTS if not is_val(text)]
        assert len(made.train_files) > 1
        assert prepare(tmp_path / "rows" / "x.parquet", tmp_path, text_key="body").train_tokens == made.train_tokens

    @pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
    def test_a_hash_of_the_text_alone_chooses_the_split(self, share: float, tmp_path: Path):
        write_lines(tmp_path / "one" / "x.jsonl", TEXTS)
        write_lines(tmp_path / "other" / "x.jsonl", TEXTS[::-1])
        write_lines(tmp_path / "other" / "copies.jsonl", TEXTS)
        one, other = (prepare(tmp_path / name, tmp_path, val_share=share) for name in ("one", "other"))
        wanted = {text for text in TEXTS if is_val(text, share)}
        assert set(texts_of(one.val(), one.tokenizer)) == set(texts_of(other.val(), other.tokenizer)) == wanted
        assert other.val_tokens == 2 * one.val_tokens

    def test_a_part_without_a_document_of_a_split_has_no_shard_of_it(self, tmp_path: Path):
        write_lines(tmp_path / "docs" / "x.jsonl", sorted(TEXTS, key=is_val))
        made = prepare(tmp_path / "docs", tmp_path)
        assert made.train_files[0] == "train-00000.bin"
        assert made.val_files[0] != "val-00000.bin"

    def test_a_bpe_is_trained_on_documents_of_the_train_split(self, tmp_path: Path):
        write_lines(
            tmp_path / "docs" / "x.jsonl",
            [text for n in range(300) for text in (f"zyzyzy {n}", f"abab {n}") if is_val(text) is text.startswith("z")],
        )
        made = prepare(tmp_path / "docs", tmp_path, tokenizer="bpe", vocab_size=270)
        known = {made.tokenizer.token_bytes(id) for id in range(made.tokenizer.vocab_size)}
        assert b"abab" in known
        assert b"zy" not in known


class TestSameBytes:
    @pytest.mark.parametrize("jobs", [2, pytest.param(3, marks=pytest.mark.slow)])
    @pytest.mark.parametrize("kind", ["byte", pytest.param("bpe", marks=pytest.mark.slow)])
    def test_by_any_number_of_processes(self, jobs: int, kind: str, source: Path, tmp_path: Path):
        size = 300 if kind == "bpe" else None
        one = prepare(source, tmp_path, tokenizer=kind, vocab_size=size)
        several = prepare(
            source, tmp_path, tokenizer=kind, vocab_size=size, jobs=jobs, data_dir=str(tmp_path / "other")
        )
        assert contents(one.path) == contents(several.path)
        assert one.path.name == several.path.name

    def test_the_second_time_nothing_is_written(self, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        first = prepare(source, tmp_path)
        monkeypatch.setattr(token_file, "write", None)
        assert prepare(source, tmp_path) == first
        shutil.copytree(source, tmp_path / "elsewhere" / "docs")
        assert prepare(tmp_path / "elsewhere" / "docs", tmp_path) == first

    def test_a_damaged_corpus_is_replaced(self, source: Path, tmp_path: Path):
        first = prepare(source, tmp_path)
        before = contents(first.path)
        (first.path / first.val_files[1]).write_bytes(b"\0\0")
        assert contents(prepare(source, tmp_path).path) == before
        assert [path.name for path in (tmp_path / "data").iterdir()] == [first.path.name]

    @pytest.mark.parametrize("change", [{"val_share": 0.4}, {"text_key": "other"}, {"tokenizer": "gpt2"}, "a text"])
    def test_other_settings_or_texts_are_another_corpus(self, change, source: Path, tmp_path: Path):
        if change == {"tokenizer": "gpt2"}:
            pytest.importorskip("tiktoken", reason="needs the extra gpt2")
        write_lines(source / "a.jsonl", TEXTS[:60])
        content = (source / "a.jsonl").read_text()
        (source / "a.jsonl").write_text(content.replace('"n": 1', '"other": "a"'))
        (source / "c.jsonl").write_text(content.replace('"n": 1', '"other": "a"'))
        first = prepare(source, tmp_path)
        if change == "a text":
            (source / "a.jsonl").write_text(content.replace('"n": 1', '"other": "b"'))
            change = {}
        second = prepare(source, tmp_path, **change)
        assert second.path != first.path
        assert prepared.load(first.path) == first


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
class TestKilled:
    def test_finished_parts_are_kept(self, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
        whole = prepare(source, tmp_path, data_dir=str(tmp_path / "whole"))
        assert is_killed_at(150, lambda: prepare(source, tmp_path))
        (left,) = (tmp_path / "data").iterdir()
        assert left.name == f".{whole.path.name}.unfinished"
        finished = len(list(left.glob("0*.json")))
        assert finished > 1
        damaged = left / "corpus" / "train-00000.bin"
        kept = (left / "corpus" / "train-00001.bin").stat().st_ino
        damaged.write_bytes(b"\0" + damaged.read_bytes()[1:])
        made = prepare(source, tmp_path, quiet=False)
        assert f"going on with {finished} of " in capsys.readouterr().err
        assert (made.path / "train-00001.bin").stat().st_ino == kept
        assert contents(made.path) == contents(whole.path)
        assert [path.name for path in (tmp_path / "data").iterdir()] == [made.path.name]

    @pytest.mark.parametrize("every", [23, pytest.param(1, marks=pytest.mark.slow)])
    def test_at_any_step_that_reaches_the_disk(self, every: int, source: Path, tmp_path: Path):
        whole = contents(prepare(source, tmp_path, data_dir=str(tmp_path / "whole")).path)
        for step in range(0, 10_000, every):
            killed = is_killed_at(step, lambda: prepare(source, tmp_path))
            assert all(contents(path) == whole for path in (tmp_path / "data").glob("[!.]*")), step
            made = prepare(source, tmp_path)
            assert contents(made.path) == whole, step
            assert [path.name for path in (tmp_path / "data").iterdir()] == [made.path.name], step
            shutil.rmtree(tmp_path / "data")
            if not killed:
                break
        assert step > 100

    @pytest.mark.slow
    def test_with_workers_that_are_busy(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.undo()  # the command has parts of the usual size
        write_lines(tmp_path / "docs" / "x.jsonl", [f"{number} {' '.join(TEXTS)}" for number in range(6000)])
        whole = contents(prepare(tmp_path / "docs", tmp_path, data_dir=str(tmp_path / "whole")).path)
        assert len(whole) > 7
        data = tmp_path / "data"
        words = [sys.executable, "-m", "fastgpt.prepare", str(tmp_path / "docs"), "--tokenizer", "byte", "--jobs", "3"]
        words += ["--val_share", str(SHARE), "--data_dir", str(data)]
        for finished in (0, 1, 3):
            child = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL)
            while len(list(data.glob(".*.unfinished/0*.json"))) < finished or not data.exists():
                assert child.poll() is None
                time.sleep(0.01)
            child.kill()
            child.wait()
            assert list(data.glob("[!.]*")) == []
            assert contents(prepare(tmp_path / "docs", tmp_path, jobs=2).path) == whole
            shutil.rmtree(data)

    def test_a_second_process_is_refused(self, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        name = prepare(source, tmp_path).path.name
        shutil.rmtree(tmp_path / "data")
        (tmp_path / "data" / f".{name}.unfinished").mkdir(parents=True)
        monkeypatch.setattr(lock, "PATIENCE_SECONDS", 0.1)
        message = rf"process {os.getpid()} is preparing {name} there; wait for it"
        with (
            lock.held(tmp_path / "data" / f".{name}.unfinished" / ".lock"),
            pytest.raises(UsageError, match=message),
        ):
            prepare(source, tmp_path)

    def test_a_full_disk_keeps_finished_parts(self, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        def full() -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            at_call(patch, token_file, "write", 7, full)
            with pytest.raises(
                UsageError, match=r"No space left on device; name another, or make room there: the same"
            ):
                prepare(source, tmp_path)
        (left,) = (tmp_path / "data").iterdir()
        assert len(list(left.glob("0*.json"))) == 3
        kept = (left / "corpus" / "train-00002.bin").stat().st_ino
        assert (prepare(source, tmp_path).path / "train-00002.bin").stat().st_ino == kept

    def test_a_vocabulary_of_another_start_begins_anew(self, source: Path, tmp_path: Path):
        assert is_killed_at(40, lambda: prepare(source, tmp_path))
        (left,) = (tmp_path / "data").iterdir()
        ByteTokenizer().save(left / "tokenizer.json")
        assert prepare(source, tmp_path).tokenizer == ByteTokenizer(ends=True)


class TestRefused:
    """Each in one line that names the file, and nothing is left."""

    def refused(self, source: Path, tmp_path: Path, **options) -> str:
        with pytest.raises(UsageError) as error:
            prepare(source, tmp_path, **options)
        assert "\n" not in str(error.value)
        assert not (tmp_path / "data").exists()
        return str(error.value)

    def test_no_folder_above_is_left(self, source: Path, tmp_path: Path):
        (source / "c.jsonl").write_text("[1, 2]\n")
        (tmp_path / "data").mkdir()
        with pytest.raises(UsageError, match="is a list"):
            prepare(source, tmp_path, data_dir=str(tmp_path / "data" / "is" / "deep"))
        assert list((tmp_path / "data").iterdir()) == []

    def test_a_line_that_is_no_object(self, source: Path, tmp_path: Path):
        with (source / "c.jsonl").open("a") as file:
            file.write("[1, 2]\n")
        message = f"{source / 'c.jsonl'}, line 41 is a list, not an object"
        assert message in self.refused(source, tmp_path)
        assert message in self.refused(source, tmp_path, jobs=2)

    def test_a_text_that_is_not_utf8(self, source: Path, tmp_path: Path):
        (source / "b" / "x.txt").write_bytes(b"ab\ncd\xff")
        assert f"{source / 'b' / 'x.txt'} is not UTF-8: invalid start byte at byte 5 (0xff, line 2)" in self.refused(
            source, tmp_path
        )

    @pytest.mark.parametrize(
        ("texts", "share", "message"),
        [
            ([], 0.5, "is empty"),
            (["", ""], 0.5, "has 0 documents with text, and a corpus needs one to train on"),
            (["a"], 0.5, "has 1 document with text, and a corpus needs one"),
            (
                ["a", "b"],
                0.001,
                "has 2 documents with text, and none in the val split by `val_share` 0.001; try a larger",
            ),
            (["a", "b"], 0.999, "none in the train split by `val_share` 0.999; try a smaller"),
        ],
    )
    def test_too_few_documents(self, texts: list[str], share: float, message: str, tmp_path: Path):
        write_lines(tmp_path / "docs" / "x.jsonl", texts)
        assert message in self.refused(tmp_path / "docs", tmp_path, val_share=share)

    def test_no_source(self, tmp_path: Path):
        assert "'nowhere' is no file or folder" in self.refused(Path("nowhere"), tmp_path)
        (tmp_path / "docs").mkdir()
        (tmp_path / "docs" / "x.md").write_text("a")
        assert "the folder holds no .txt, .jsonl, .parquet; prepare other text files with `dataset`" in self.refused(
            tmp_path / "docs", tmp_path
        )
        assert "is not one of .txt, .jsonl, .parquet" in self.refused(tmp_path / "docs" / "x.md", tmp_path)
        (tmp_path / "docs" / "x.txt").symlink_to("nothing")
        assert "is a link to nothing" in self.refused(tmp_path / "docs", tmp_path)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"tokenizer": "char"}, "`tokenizer` char has no end-of-text token, which follows each document; use"),
            ({"tokenizer": "word"}, "`tokenizer` 'word' is not one of"),
            ({"vocab_size": 256}, "`vocab_size` 256 is for `tokenizer` bpe"),
            ({"tokenizer": "bpe", "vocab_size": 3}, "`vocab_size` 3 is too small"),
            ({"tokenizer": "gpt2", "gpt2_vocab": "nowhere"}, "`gpt2_vocab` nowhere lacks"),
        ],
    )
    def test_settings(self, options: dict, message: str, source: Path, tmp_path: Path):
        assert message in self.refused(source, tmp_path, **options)

    def test_a_source_that_changes_meanwhile(self, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        at_call(monkeypatch, token_file, "write", 5, lambda: write_lines(source / "c.jsonl", ["changed"]))
        assert "changed while it was read; run again" in self.refused(source, tmp_path)

    def test_a_folder_that_cannot_be_written(self, source: Path, tmp_path: Path):
        (tmp_path / "file").write_text("")
        with pytest.raises(
            UsageError, match=r"`data_dir` .*file: cannot write docs-byte-.*Not a directory; name another"
        ):
            prepare(source, tmp_path, data_dir=str(tmp_path / "file"))

    def test_parquet(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        pyarrow = pytest.importorskip("pyarrow", reason="needs the extra parquet")
        pytest.importorskip("pyarrow.parquet")
        path = tmp_path / "docs" / "x.parquet"
        path.parent.mkdir()

        def write(column) -> None:
            pyarrow.parquet.write_table(pyarrow.table({"text": column, "n": [1, 2, 3]}), path, row_group_size=2)

        write(["a", "b", None])
        assert f"{path}, row 3 has no text in column 'text'" in self.refused(path, tmp_path)
        assert f"{path} has no column 'body', only ['text', 'n']" in self.refused(path, tmp_path, text_key="body")
        assert f"{path} has int64 in column 'n', not text" in self.refused(path, tmp_path, text_key="n")
        path.write_bytes(path.read_bytes()[:-30])
        assert f"{path} cannot be read as Parquet: " in self.refused(path, tmp_path)
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        assert "needs pyarrow; pip install 'fastgpt-engine[parquet]'" in self.refused(path, tmp_path)


class TestOpening:
    def spoiled(self, made: Corpus, change: Callable[[dict], object]) -> str:
        meta = json.loads((made.path / "meta.json").read_text())
        change(meta)
        (made.path / "meta.json").write_text(json.dumps(meta))
        with pytest.raises(UsageError) as error:
            prepared.load(made.path)
        return str(error.value)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda meta: meta["val"].pop("shards"), "is damaged: it has no 'shards'"),
            (lambda meta: meta["val"].update(shards=[]), "it has no shards of the val split"),
            (lambda meta: meta["val"].update(shards=7), "is damaged"),
            (lambda meta: meta["val"]["shards"].pop(), "the shards do not hold as many tokens as their split"),
            (lambda meta: meta["val"]["shards"][0].update(file="../x.bin"), "'../x.bin' is no file in the folder"),
            (lambda meta: meta["val"]["shards"][0].update(file="x.bin"), "x.bin cannot be read"),
            (lambda meta: meta["val"]["shards"][0].update(sha256="0"), "changed since it was prepared"),
        ],
    )
    def test_a_description_that_is_wrong(self, change, message: str, source: Path, tmp_path: Path):
        assert message in self.spoiled(prepare(source, tmp_path), change)

    def test_every_shard_is_checked(self, source: Path, tmp_path: Path):
        made = prepare(source, tmp_path)
        for name in (made.train_files[2], made.val_files[-1]):
            content = (made.path / name).read_bytes()
            (made.path / name).write_bytes(content[:-2] + b"\1\0")
            with pytest.raises(UsageError, match=f"{name} changed since it was prepared"):
                prepared.load(made.path)
            (made.path / name).write_bytes(content)
        assert prepared.load(made.path) == made

    def test_a_folder_of_shards_is_no_text(self, source: Path, tmp_path: Path):
        made = prepare(source, tmp_path)
        shutil.copytree(made.path, source / "tokens")
        shutil.rmtree(tmp_path / "data")
        assert prepare(source, tmp_path) == made


def test_a_run_on_documents_is_trained_resumed_and_generated_from(source: Path, workplace: Path, capsys):
    assert cli.run(command.main, [str(source), "--tokenizer", "byte", "--val_share", "0.3", "--jobs", "1"]) == 0
    out, err = capsys.readouterr()
    (folder,) = Path("data").iterdir()
    assert all(text in out for text in ("257 (byte, uint16)", str(folder), "shards"))
    assert err == "left out 1 file of other kinds than .txt, .jsonl, .parquet\n"
    assert cli.run(train.main, [*FLAGS, "--dataset", folder.name]) == 0
    assert resume("--max_iters 7") == 0
    assert verify.main([]) == 0
    assert fastgpt.load("out", device="cpu").generate("", max_new_tokens=3, temperature=0)
    opened = corpus.prepare(str(folder), quiet=True)
    assert opened.documents
    assert opened.tokenizer.start_token == 256
    assert not corpus.prepare("text.txt", quiet=True).documents
