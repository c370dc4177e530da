"""Prompts that mean harm, or are only unusual, are continued like any other, or refused in one line."""

import io
import json
import shlex
import sys
import time
from pathlib import Path

import pytest

from fastgpt import cli, generate, train
from fastgpt.config.generation import SamplingParams
from fastgpt.generation import load, writing
from fastgpt.tokenizer import bpe, saved
from tests.helpers.corpora import KINDS, needs_gpt2
from tests.helpers.covering import some

WORDS = "The quick brown fox jumps over a lazy dog. "
SPECIAL = "<|endoftext|>"
TEN_MEGABYTES = 10_000_000
FLAGS = shlex.split(
    "--dataset text.txt --device cpu --dtype float32 --n_layer 1 --n_head 2 --n_embd 16 --block_size 32 --batch_size 2 "
    "--gradient_accumulation_steps 1 --max_iters 1 --eval_interval 1 --eval_iters 1 --sample_interval 0 "
    "--out_dir out --data_dir data"
)

# The kinds whose vocabularies can spell any text.
knowing_all = pytest.mark.parametrize("kind", ["byte", pytest.param("gpt2", marks=needs_gpt2), "bpe"])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory):
    """A folder for each kind of tokenizer, with a run of one step in `out`."""
    folders: dict[str, Path] = {}

    def of(kind: str) -> Path:
        if kind not in folders:
            folders[kind] = tmp_path_factory.mktemp(kind)
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folders[kind])
                Path("text.txt").write_text(WORDS * 100)
                size = ["--vocab_size", "300"] if kind == "bpe" else []
                assert cli.run(train.main, [*FLAGS, "--tokenizer", kind, *size]) == 0
        return folders[kind]

    return of


@pytest.fixture
def at(place, monkeypatch: pytest.MonkeyPatch):
    """Go to the folder of a kind of tokenizer."""
    return lambda kind: monkeypatch.chdir(place(kind))


def refusal(capsys, flags: list[str]) -> str:
    """The one line of a command that is refused; nothing goes to stdout."""
    capsys.readouterr()
    assert cli.run(generate.main, flags) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("error: ")
    return err


class TestSpecialTokens:
    @knowing_all
    @pytest.mark.parametrize(
        "text", [SPECIAL, f"a{SPECIAL}b", SPECIAL * 3, f" {SPECIAL}\n", "<|im_start|>", "[UNK]<s>"]
    )
    @pytest.mark.covering_array(1)
    def test_their_text_is_text(self, kind: str, text: str, place):
        vocabulary = saved.load(place(kind) / "out" / "tokenizer.json")
        ids = vocabulary.encode(text).tolist()
        assert vocabulary.decode(ids) == text
        assert len(ids) > text.count(SPECIAL)
        if kind == "gpt2":
            assert vocabulary.start_token not in ids

    def test_a_vocabulary_that_was_trained_on_their_text_has_none(self):
        vocabulary = bpe.BpeTokenizer.train([f"{SPECIAL} some words " * 50], 400)
        ids = vocabulary.encode(SPECIAL).tolist()
        assert vocabulary.decode(ids) == SPECIAL
        parts = [vocabulary.token_bytes(id) for id in range(vocabulary.vocab_size)]
        assert SPECIAL.encode() not in parts

    @knowing_all
    @pytest.mark.parametrize("cache", ["none", "dense", "paged"])
    def test_a_prompt_of_their_text_is_continued(self, kind: str, cache: str, at, capsys):
        at(kind)
        flags = [f"--prompt={SPECIAL}", "--max_new_tokens=3", "--device=cpu", f"--cache={cache}"]
        assert cli.run(generate.main, flags) == 0
        assert capsys.readouterr().out.startswith(SPECIAL)

    def test_a_char_vocabulary_without_its_characters_refuses_it(self, at, capsys):
        at("char")
        line = refusal(capsys, [f"--prompt={SPECIAL}", "--device=cpu"])
        assert "lacks '<' (U+003C), '>' (U+003E), 't' (U+0074), '|' (U+007C)" in line


class TestTenMegabytes:
    """The window slides to the end of the text; only reading the text takes longer."""

    @pytest.fixture(params=some(1, ["no space", "words"]))
    def text(self, request) -> str:
        part = {"words": WORDS, "no space": "fox"}[request.param]
        return part * (TEN_MEGABYTES // len(part))

    @pytest.mark.parametrize("cache", some(1, ["paged", "dense", "none"]))
    def test_from_a_file(self, cache: str, text: str, at, tmp_path: Path, capsys):
        at("char")
        (tmp_path / "prompt.txt").write_text(text)
        capsys.readouterr()
        began = time.perf_counter()
        flags = ["--device=cpu", f"--cache={cache}", "--max_new_tokens=5", f"--prompt=FILE:{tmp_path / 'prompt.txt'}"]
        assert cli.run(generate.main, flags) == 0
        assert time.perf_counter() - began < 20
        out = capsys.readouterr().out
        assert out.startswith(text)
        assert len(out) == len(text) + 5 + 1

    def test_it_is_continued_as_its_last_window_is(self, text: str, place):
        generator = load.load(place("char") / "out", device="cpu")
        for cache in ("none", "dense"):
            parts, greedy = (text[-32:], text), {"temperature": 0, "max_new_tokens": 8}
            short, long = (generator.generate(part, cache=cache, **greedy) for part in parts)
            assert short == long
        engine = generator.engine(kv_memory=1 << 20, slide=True)
        one, other = engine.generate([text[-32:], text], SamplingParams(**greedy))
        assert (one.text, one.tokens) == (other.text, other.tokens) == (short, one.tokens)
        assert other.prompt == text

    def test_in_a_file_of_prompts(self, text: str, at, tmp_path: Path, capsys):
        at("char")
        (tmp_path / "prompts.txt").write_text(f"The fox\n{text}\nThe dog\n")
        capsys.readouterr()
        began = time.perf_counter()
        flags = ["--device=cpu", "--max_new_tokens=5", f"--prompts={tmp_path / 'prompts.txt'}"]
        assert cli.run(generate.main, flags) == 0
        assert time.perf_counter() - began < 20
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [line["prompt"] for line in lines] == ["The fox", text, "The dog"]
        assert [len(line["tokens"]) for line in lines] == [5, 5, 5]

    def test_an_engine_without_a_sliding_window_refuses_it_and_answers_the_others(self, text: str, place):
        engine = load.load(place("char") / "out", device="cpu").engine(kv_memory=1 << 20)
        first, refused, last = engine.generate(["The fox", text, "The dog"], SamplingParams(max_new_tokens=3))
        assert (first.error, last.error) == (None, None)
        assert "tokens, and the model's context (block_size) 32" in (refused.error or "")

    def test_many_continuations_do_not_copy_it(self, place):
        tracemalloc = pytest.importorskip("tracemalloc")
        engine = load.load(place("char") / "out", device="cpu").engine(kv_memory=1 << 20, slide=True)
        tokens = [1, 2, 3] * 100_000
        tracemalloc.start()
        try:
            done = engine.generate([tokens], SamplingParams(max_new_tokens=2, num_samples=32))
            assert tracemalloc.get_traced_memory()[1] < 3 * 8 * len(tokens) + (8 << 20)
        finally:
            tracemalloc.stop()
        assert len(done) == 32

    @pytest.mark.parametrize("kind", some(1, KINDS))
    def test_every_vocabulary_reads_it_in_little_time(self, kind: str, text: str, place):
        vocabulary = saved.load(place(kind) / "out" / "tokenizer.json")
        began = time.perf_counter()
        ids = vocabulary.encode(text)
        assert time.perf_counter() - began < 20
        assert text.endswith(vocabulary.decode(ids[-500:].tolist()))


class TestLoneSurrogates:
    @pytest.mark.parametrize("text", ["\ud800", "The \udcff fox", "\udfff\ud800"])
    def test_the_command_refuses_them_before_it_loads_anything(self, text: str, at, capsys, monkeypatch):
        at("char")
        monkeypatch.setattr(writing, "load", None)
        for flags in ([], ["--cache=paged"], ["--interactive"], ["--num_samples=2", "--cache=dense"]):
            line = refusal(capsys, [f"--prompt={text}", *flags])
            assert line.startswith("error: --prompt is not valid Unicode: a lone surrogate, U+D")

    def test_a_file_of_prompts_answers_the_others(self, at, tmp_path: Path, capsys):
        at("byte")
        objects = [{"prompt": "The "}, {"prompt": "a\ud800"}, {"prompt": "fox"}]
        (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, objects)))
        for cache in ("paged", "dense", "none"):
            output = tmp_path / f"{cache}.jsonl"
            flags = ["--device=cpu", "--max_new_tokens=3", f"--cache={cache}", f"--output={output}"]
            assert cli.run(generate.main, [*flags, f"--prompts={tmp_path / 'prompts.jsonl'}"]) == 1
            lines = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
            assert [line["finish_reason"] for line in lines] == ["length", "error", "length"]
            assert "a lone surrogate, U+D800" in lines[1]["error"]
            assert lines[1]["prompt"] == "a\ud800"

    def test_bytes_that_are_not_utf8_are_located(self, at, tmp_path: Path, capsys, monkeypatch):
        at("byte")
        (tmp_path / "p.txt").write_bytes(b"abc\xed\xa0\x80")
        assert "p.txt is not UTF-8: byte 3 is 0xed" in refusal(capsys, [f"--prompt=FILE:{tmp_path / 'p.txt'}"])
        assert "p.txt is not UTF-8: byte 3 is 0xed" in refusal(capsys, [f"--prompts={tmp_path / 'p.txt'}"])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"abc\xff")))
        assert "stdin is not UTF-8: byte 3 is 0xff" in refusal(capsys, ["--prompt=-"])


class TestNul:
    @pytest.mark.parametrize("cache", ["none", "dense", "paged"])
    def test_it_is_a_character_like_any_other(self, cache: str, at, tmp_path: Path, capsys):
        at("byte")
        (tmp_path / "p.txt").write_bytes(b"The\0fox")
        flags = ["--device=cpu", "--max_new_tokens=3", f"--cache={cache}"]
        for prompt in ("The\0fox", f"FILE:{tmp_path / 'p.txt'}"):
            capsys.readouterr()
            assert cli.run(generate.main, [*flags, f"--prompt={prompt}"]) == 0
            assert capsys.readouterr().out.startswith("The\0fox")

    def test_a_char_vocabulary_without_it_refuses_it(self, at, capsys):
        at("char")
        assert r"lacks '\x00' (U+0000)" in refusal(capsys, ["--prompt=The\0fox", "--device=cpu"])

    def test_no_file_has_it_in_its_name(self, at, capsys):
        at("byte")
        assert r"--prompt 'FILE:a\x00b' cannot be read: embedded null byte" in refusal(capsys, ["--prompt=FILE:a\0b"])
        assert r"--prompts 'a\x00b' holds a NUL character" in refusal(capsys, ["--prompts=a\0b"])
