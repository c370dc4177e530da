"""Prepared corpora: written, reused, opened and refused."""

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fastgpt import cli
from fastgpt.data import corpus, prepared, sources
from fastgpt.errors import UsageError
from fastgpt.tokenizer import gpt2
from fastgpt.tokenizer.byte import ByteTokenizer
from fastgpt.tokenizer.char import CharTokenizer
from fastgpt.tokenizer.gpt2 import Gpt2Tokenizer
from tests.helpers.corpora import (
    KINDS,
    SHAKESPEARE,
    TEXT,
    every_kind,
    needs_gpt2,
    needs_shakespeare,
    prepare,
    refused,
    text_of,
)
from tests.helpers.covering import some
from tests.helpers.places import ROOT


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "my text.txt"
    path.write_bytes(TEXT.encode())
    return path


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

    def test_bpe_learns_from_the_training_part_alone(self, tmp_path: Path):
        (tmp_path / "x.txt").write_text("ab " * 900 + "zq " * 100)
        learned = prepare(tmp_path / "x.txt", tmp_path, tokenizer="bpe").tokenizer
        assert len(learned.encode(" ab")) == 1
        assert len(learned.encode(" zq")) == 3

    def test_more_than_65536_tokens_take_uint32(self, tmp_path: Path):
        text = "".join(chr(code) for code in range(1, 0x20001) if not 0xD800 <= code < 0xE000)
        (tmp_path / "x.txt").write_bytes(text.encode())
        prepared = prepare(tmp_path / "x.txt", tmp_path)
        assert (prepared.dtype, prepared.val().dtype) == ("uint32", np.uint32)
        assert int(prepared.val().max()) == 0x20000 - 0x800 - 1
        assert text_of(prepared) == text

    def test_exactly_65536_tokens_take_uint16(self, tmp_path: Path):
        text = "".join(chr(code) for code in range(1, 0x10801) if not 0xD800 <= code < 0xE000)
        (tmp_path / "x.txt").write_bytes(text.encode())
        prepared = prepare(tmp_path / "x.txt", tmp_path)
        assert (prepared.tokenizer.vocab_size, prepared.dtype) == (1 << 16, "uint16")
        assert int(prepared.val().max()) == (1 << 16) - 1

    def test_odd_but_valid_text(self, tmp_path: Path):
        for name, text in {"bom": "\ufeff\ufeffab", "crlf": "a\r\nb\rc\n\r"}.items():
            (tmp_path / name).write_bytes(text.encode())
            assert text_of(prepare(tmp_path / name, tmp_path)) == text.removeprefix("\ufeff")
        assert text_of(prepare(tmp_path / "bom", tmp_path, reading=1)) == "\ufeff\ufeffab"

    @pytest.mark.parametrize("kind", some(1, KINDS))
    def test_one_enormous_line(self, kind: str, tmp_path: Path):
        (tmp_path / "line.txt").write_text("ab" * 600_000)
        assert text_of(prepare(tmp_path / "line.txt", tmp_path, tokenizer=kind)) == "ab" * 600_000

    @pytest.mark.parametrize("kind", some(1, KINDS))
    def test_a_line_of_ten_megabytes(self, kind: str, tmp_path: Path):
        text = "The quick brown fox " * 500_000
        (tmp_path / "line.txt").write_text(text)
        prepared = prepare(tmp_path / "line.txt", tmp_path, tokenizer=kind)
        assert (prepared.characters, prepared.bytes) == (len(text), len(text))
        assert prepared.tokenizer.decode(prepared.val()) == text[-1_000_000:]

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

        monkeypatch.setattr(corpus, "publish", stopped)
        with pytest.raises(KeyboardInterrupt):
            prepare(text_file, tmp_path)
        assert list(tmp_path.iterdir()) == [text_file]

    def test_two_processes_at_once(self, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        publish = corpus.publish

        def overtaken(temporary: Path, target: Path, *rest):
            shutil.copytree(temporary, target)
            (target / "train.bin").touch()
            publish(temporary, target, *rest)

        monkeypatch.setattr(corpus, "publish", overtaken)
        prepared = prepare(text_file, tmp_path)
        assert text_of(prepared) == TEXT
        assert [p.name for p in (tmp_path / "data").iterdir()] == [prepared.path.name]

    def test_a_source_that_grows_meanwhile(self, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        measure = corpus._measure

        def grown(*given):
            statistics = measure(*given)
            text_file.write_bytes(text_file.read_bytes() + b"more")
            return statistics

        monkeypatch.setattr(corpus, "_measure", grown)
        assert "changed while it was read" in refused(text_file, tmp_path)

    @needs_gpt2
    def test_a_given_vocabulary_is_compared(self, text_file: Path, tmp_path: Path):
        first = prepare(text_file, tmp_path, tokenizer="gpt2")
        assert prepare(text_file, tmp_path, tokenizer="gpt2") == first
        assert "`gpt2_vocab`" in refused(text_file, tmp_path, tokenizer="gpt2", gpt2_vocab=str(tmp_path / "no"))
        # The same merges with the ids of two bytes exchanged.
        own, package = tmp_path / "own", gpt2._find_gpt2_files(None)
        ids = json.loads((package / "encoder.json").read_text(encoding="utf-8"))
        own.mkdir()
        (own / "encoder.json").write_text(json.dumps(ids | {"!": ids['"'], '"': ids["!"]}), encoding="utf-8")
        shutil.copy(package / "vocab.bpe", own)
        second = prepare(text_file, tmp_path, tokenizer="gpt2", gpt2_vocab=str(own))
        assert second.tokenizer == Gpt2Tokenizer.from_files(own)
        assert second.tokenizer != first.tokenizer
        assert text_of(second) == TEXT


class TestBadInput:
    def test_too_short(self, tmp_path: Path):
        (tmp_path / "x.txt").touch()
        assert "x.txt' is empty" in refused(tmp_path / "x.txt", tmp_path)
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
        assert "`dataset` ''" in refused("", tmp_path)
        assert "no file or folder" in refused(tmp_path / "missing.txt", tmp_path)
        assert "`dataset`" in refused("x" * 5000, tmp_path)

    def test_arguments_that_do_not_go_together(self, text_file: Path, tmp_path: Path):
        assert "`tokenizer` 'word' is not one of char, byte, gpt2, bpe" in refused(
            text_file, tmp_path, tokenizer="word"
        )
        for kind in ("char", "byte", "gpt2"):
            assert f"`tokenizer` {kind} has its own" in refused(text_file, tmp_path, tokenizer=kind, vocab_size=300)
        assert prepare(text_file, tmp_path, tokenizer="byte", vocab_size=256).tokenizer == ByteTokenizer()
        for size in (-1, 0, 256):
            message = refused(text_file, tmp_path, tokenizer="bpe", vocab_size=size)
            assert f"`vocab_size` {size} is too small" in message
        message = refused("pydocs", tmp_path, corpus_file=str(text_file))
        assert f"use `dataset` {text_file}" in message

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
    def test_neither_file_nor_folder(self, tmp_path: Path):
        os.mkfifo(tmp_path / "pipe")
        assert "neither a regular file nor a folder" in refused(tmp_path / "pipe", tmp_path)

    def test_data_dir_that_cannot_be_written(self, text_file: Path):
        with pytest.raises(UsageError, match=r"`data_dir` .*cannot write my_text-char"):
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
        assert "`dataset` PATH" in message
        (cache / "tinyshakespeare.txt").write_text("no")
        assert "delete it" in refused("shakespeare", tmp_path)
        assert "`corpus_file` nowhere: no such file" in refused("shakespeare", tmp_path, corpus_file="nowhere")


class TestPreparedFolders:
    def test_ours_by_path_and_by_name(self, text_file: Path, tmp_path: Path):
        first = prepare(text_file, tmp_path)
        assert prepare(first.path, tmp_path) == first
        assert prepare(first.path.name, tmp_path) == first
        assert prepared.load(first.path) == first

    def test_ours_keeps_its_tokenizer(self, text_file: Path, tmp_path: Path):
        first = prepare(text_file, tmp_path, tokenizer="byte")
        assert prepare(first.path, tmp_path).tokenizer == ByteTokenizer()
        assert "already prepared with byte" in refused(first.path, tmp_path, tokenizer="gpt2")

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

    @pytest.mark.parametrize("flag", ["dataset", "data_dir", "corpus_file", "gpt2_vocab"])
    @pytest.mark.parametrize("value", ["", "x" * 300, "a\0b"])
    def test_a_name_that_no_file_can_have(self, main, flag: str, value: str, capsys: pytest.CaptureFixture[str]):
        assert cli.run(main, [f"--{flag}={value}"]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert err.startswith(f"error: --{flag} ")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["char", pytest.param("gpt2", marks=needs_gpt2)])
def test_memory_does_not_grow_with_the_text(kind: str, tmp_path: Path):
    pytest.importorskip("resource")
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    line = ("It was the best of times, it was the worst of times: 안녕 é " * 3 + "\n").encode()
    code = (
        "import resource, sys; from fastgpt.data import corpus; "
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
