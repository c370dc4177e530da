"""Our tokenizer of a byte-level vocabulary in another program's file, which spells bytes as GPT-2's files do."""

from collections.abc import Mapping, Sequence
from typing import Any

from fastgpt.tokenizer.base import ENDOFTEXT, Tokenizer
from fastgpt.tokenizer.bpe import BpeTokenizer
from fastgpt.tokenizer.byte import ByteTokenizer
from fastgpt.tokenizer.byte_pairs import bytes_of, spelling_of
from fastgpt.tokenizer.char import CharTokenizer
from fastgpt.tokenizer.gpt2 import GPT2_MERGES, Gpt2Tokenizer

Merges = Sequence[tuple[str, str]]
BYTES = [spelling_of(bytes([value])) for value in range(256)]


def tokenizer_of(
    vocab: Mapping[str, int], merges: Merges, special: Mapping[str, int], end: int | None, start: int | None = None
) -> Tokenizer:
    """The tokenizer with these tokens: of the kind that has them by itself, otherwise a `BpeTokenizer`.

    Args:
        vocab: ids of the tokens, special ones among them or not, by their spelling.
        special: ids of the tokens to which no text is encoded, by their names.
        end, start: the ids that end a document and that generation starts from, where they are known.

    Raises:
        ValueError: it is no byte-level vocabulary, or one with which text would be lost.
        UsageError: a library is missing.
    """
    plain = {spelled: id for spelled, id in vocab.items() if spelled not in special}
    return starting(_tokenizer(plain, merges, special, end), start)


def starting(tokenizer: Tokenizer, start: int | None) -> Tokenizer:
    """The tokenizer, with which generation starts from a token if that is one, and not so already."""
    if start is None or start == tokenizer.start_token or not 0 <= start < tokenizer.vocab_size:
        return tokenizer
    return tokenizer.starting_from(start)


def _tokenizer(plain: Mapping[str, int], merges: Merges, special: Mapping[str, int], end: int | None) -> Tokenizer:
    spelled = [token for token, _ in sorted(plain.items(), key=lambda entry: entry[1])]
    in_order = sorted(plain.values()) == list(range(len(plain)))
    ends = dict(special) == {ENDOFTEXT: len(plain)}
    if in_order and not merges:
        if spelled == BYTES and (ends or not special):
            return ByteTokenizer(ends)
        if not special and all(len(token := bytes_of(text)) == 1 and token.isascii() for text in spelled):
            return CharTokenizer("".join(bytes_of(text).decode() for text in spelled))
    if in_order and ends and len(merges) == GPT2_MERGES and ["".join(pair) for pair in merges] == spelled[256:]:
        return Gpt2Tokenizer([bytes_of(text) for text in spelled])
    description = library_description(plain, merges)
    if in_order and ends:
        return BpeTokenizer(description, ends=True)
    # Some settings name GPT-2's end, their default, beside a vocabulary of their own.
    return BpeTokenizer(description, special=special, end=end if end in special.values() else None)


def library_description(vocab: Mapping[str, int], merges: Merges) -> dict[str, Any]:
    """A byte-level BPE as the tokenizers library writes it in tokenizer.json, without special tokens."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": dict(sorted(vocab.items(), key=lambda entry: entry[1])),
        "merges": [list(pair) for pair in merges],
    }
    return library_json(byte_level, {**byte_level, "add_prefix_space": True}, model)


def library_json(pre_tokenizer: dict[str, Any], decoder: dict[str, Any], model: dict[str, Any]) -> dict[str, Any]:
    """The content of tokenizer.json with these parts, and no others, in the library's own order."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": model,
    }
