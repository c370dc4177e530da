"""Reads and writes the vocabulary in a GGUF file's metadata.

GPT-2's, a trained BPE and bytes are GGUF's model gpt2, a byte-level BPE. Characters are its model rwkv, which takes the
longest token at each place and spells any bytes: with gpt2 a character of several bytes would need merges, and
llama.cpp would take character 11 for the end of a text.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgpt.errors import UsageError, shown
from fastgpt.interchange.byte_level import starting, tokenizer_of
from fastgpt.interchange.gguf_header import Header
from fastgpt.interchange.huggingface_tokenizer import vocabulary_and_merges
from fastgpt.tokenizer.base import ENDOFTEXT, Tokenizer
from fastgpt.tokenizer.bpe import BpeTokenizer
from fastgpt.tokenizer.byte import ByteTokenizer
from fastgpt.tokenizer.byte_pairs import spelling_of
from fastgpt.tokenizer.char import CharTokenizer
from fastgpt.tokenizer.gpt2 import Gpt2Tokenizer

KEYS = "tokenizer.ggml."
BYTE_PAIRS, LONGEST_FIRST, NO_VOCABULARY = "gpt2", "rwkv", ("none", "no_vocab")
PARTINGS = ("gpt-2", "default")  # how a text is cut before its bytes are merged
NORMAL, CONTROL = 1, 3  # types of tokens; to all but NORMAL no text is encoded
# llama.cpp demands merges, and gguf drops an empty list. No byte is spelled by this character: the merge never applies.
NO_MERGES = ("⁂", "⁂")
NEVER = spelling_of(b"\xff")  # a byte that UTF-8 never has
ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|(.))", re.DOTALL)
ESCAPED = {"t": b"\t", "n": b"\n", "r": b"\r"}


@dataclass(frozen=True)
class Vocabulary:
    """A vocabulary as GGUF holds it: `spelled` and `types` by id, and the ids that begin and end a text."""

    model: str
    spelled: list[str]
    types: list[int]
    merges: list[tuple[str, str]]
    start: int | None
    end: int | None


def load(path: Path, header: Header) -> Tokenizer | None:
    """The tokenizer of a file; None if it has none. Raises `UsageError` for another kind, or one that loses text."""
    model = header.values.get(f"{KEYS}model", NO_VOCABULARY[0])
    if model in NO_VOCABULARY:
        return None
    try:
        vocabulary = _vocabulary(model, header)
        return _characters(vocabulary) if model == LONGEST_FIRST else _byte_pairs(vocabulary)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UsageError(f"{path}: its tokenizer is not supported: {error}") from None


def _vocabulary(model: str, header: Header) -> Vocabulary:
    """The vocabulary in the metadata. Raises ValueError for other models, and for arrays that do not fit each other."""
    if model not in (BYTE_PAIRS, LONGEST_FIRST):
        raise ValueError(f"its model is {shown(model)}, and only {BYTE_PAIRS} and {LONGEST_FIRST} are read")
    parting = header.values.get(f"{KEYS}pre", PARTINGS[-1])
    if model == BYTE_PAIRS and parting not in PARTINGS:
        raise ValueError(f"its text is parted as by {shown(parting)}; only {' and '.join(PARTINGS)} are known")
    spelled = header.arrays.get(f"{KEYS}tokens", [])
    if not isinstance(spelled, list) or len(set(spelled)) < len(spelled):
        raise ValueError(f"its {KEYS}tokens are no texts, or one is there twice")
    end, start = (header.values.get(f"{KEYS}{name}_token_id") for name in ("eos", "bos"))
    types = [int(kind) for kind in header.arrays.get(f"{KEYS}token_type", [])]
    if not types:
        types = [CONTROL if id == end else NORMAL for id in range(len(spelled))]
    if len(types) != len(spelled):
        raise ValueError(f"it has {len(spelled):,} tokens, and types of {len(types):,}")
    merges = [_pair(merge) for merge in header.arrays.get(f"{KEYS}merges", [])]
    return Vocabulary(
        model,
        spelled,
        types,
        [] if merges == [NO_MERGES] else merges,
        start if type(start) is int else None,
        end if type(end) is int else None,
    )


def _pair(merge: Any) -> tuple[str, str]:
    first, second = str(merge).split(" ")
    return first, second


def _byte_pairs(vocabulary: Vocabulary) -> Tokenizer:
    ids = {spelled: id for id, spelled in enumerate(vocabulary.spelled)}
    special = {
        spelled: id
        for spelled, id in ids.items()
        if vocabulary.types[id] != NORMAL or (spelled == ENDOFTEXT and id == vocabulary.end)
    }
    # An end that is no special token is there for llama.cpp only; see `vocabulary_of`.
    end = vocabulary.end if vocabulary.end in special.values() else None
    return tokenizer_of(ids, vocabulary.merges, special, end, vocabulary.start)


def _characters(vocabulary: Vocabulary) -> Tokenizer:
    """The vocabulary of single characters. Raises ValueError if it holds other tokens."""
    characters = [_unescaped(spelled).decode() for spelled in vocabulary.spelled]
    if any(len(char) != 1 for char in characters) or set(vocabulary.types) - {NORMAL}:
        raise ValueError(f"its model is {LONGEST_FIRST}, of which only single characters are supported")
    return starting(CharTokenizer("".join(characters)), vocabulary.start)


def vocabulary_of(tokenizer: Tokenizer) -> Vocabulary:
    """The form that a tokenizer has in a file.

    llama.cpp takes token 11 for the end where none is named. A vocabulary without one names the byte 0xFF instead,
    which no text holds.
    """
    spelled = spellings(tokenizer)
    if isinstance(tokenizer, CharTokenizer):
        return Vocabulary(LONGEST_FIRST, spelled, [NORMAL] * len(spelled), [], tokenizer.start_token, None)
    special = set(tokenizer.special_tokens.values())
    types = [CONTROL if id in special else NORMAL for id in range(len(spelled))]
    end = spelled.index(NEVER) if tokenizer.end_token is None else tokenizer.end_token
    return Vocabulary(BYTE_PAIRS, spelled, types, _merges(tokenizer) or [NO_MERGES], tokenizer.start_token, end)


def spellings(tokenizer: Tokenizer) -> list[str]:
    """The tokens by id, as `vocabulary_of` spells them: special ones by their names."""
    tokens = [tokenizer.token_bytes(id) for id in range(tokenizer.vocab_size)]
    if isinstance(tokenizer, CharTokenizer):
        return [_escaped(token) for token in tokens]
    names = {id: name for name, id in tokenizer.special_tokens.items()}
    return [names.get(id) or spelling_of(token) for id, token in enumerate(tokens)]


def _merges(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """The merges of a byte-level BPE, in their order. Raises `UsageError` for a kind that is not known here."""
    if isinstance(tokenizer, ByteTokenizer):
        return []
    if isinstance(tokenizer, Gpt2Tokenizer):
        return vocabulary_and_merges(tokenizer)[1]
    if isinstance(tokenizer, BpeTokenizer):
        merges = tokenizer.to_json()["tokenizer"]["model"]["merges"]
        return [_pair(merge) if isinstance(merge, str) else (merge[0], merge[1]) for merge in merges]
    raise UsageError(f"`tokenizer` {tokenizer.kind} has no form in GGUF")


def add(vocabulary: Vocabulary, writer: Any) -> None:
    """Add a vocabulary to the metadata of the gguf library's writer."""
    writer.add_tokenizer_model(vocabulary.model)
    if vocabulary.model == BYTE_PAIRS:
        writer.add_tokenizer_pre(PARTINGS[0])
        writer.add_token_merges([" ".join(pair) for pair in vocabulary.merges])
    writer.add_token_list(vocabulary.spelled)
    writer.add_token_types(vocabulary.types)
    if vocabulary.start is not None:
        writer.add_bos_token_id(vocabulary.start)
    if vocabulary.end is not None:
        writer.add_eos_token_id(vocabulary.end)
    writer.add_add_bos_token(False)


def _escaped(token: bytes) -> str:
    """A token as GGUF's rwkv spells it: what is not printable ASCII as hexadecimal numbers."""
    return "".join(chr(byte) if 32 < byte < 127 and byte != ord("\\") else f"\\x{byte:02x}" for byte in token)


def _unescaped(spelled: str) -> bytes:
    """The inverse of `_escaped`, which also knows other programs' short forms, such as \\n."""
    result, at = b"", 0
    for found in ESCAPE.finditer(spelled):
        result += spelled[at : found.start()].encode()
        at = found.end()
        result += bytes.fromhex(found[1]) if found[1] else ESCAPED.get(found[2], found[2].encode())
    return result + spelled[at:].encode()
