"""Reads and writes the tokenizer of a folder in transformers' layout, which the tokenizers library defines.

GPT-2's, a trained BPE and bytes are a byte-level BPE in tokenizer.json, bytes without merges. Characters are a
WordLevel model over single characters, which raises an error for an unknown one. transformers loads each with its
PreTrainedTokenizerFast: the same ids, and the same text back.
"""

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastgpt.errors import UsageError, shown
from fastgpt.interchange.byte_level import BYTES, library_description, library_json, tokenizer_of
from fastgpt.system import json_files
from fastgpt.tokenizer.base import ENDOFTEXT, Tokenizer
from fastgpt.tokenizer.bpe import BpeTokenizer
from fastgpt.tokenizer.byte import ByteTokenizer
from fastgpt.tokenizer.byte_pairs import spelling_of
from fastgpt.tokenizer.char import CharTokenizer
from fastgpt.tokenizer.gpt2 import Gpt2Tokenizer

TOKENIZER, SETTINGS = "tokenizer.json", "tokenizer_config.json"
VOCAB, MERGES, ADDED = "vocab.json", "merges.txt", "added_tokens.json"
ANY_CHARACTER = r"[\s\S]"


def load(folder: Path, settings: Mapping[str, Any]) -> Tokenizer | None:
    """The tokenizer of a folder, from tokenizer.json or vocab.json and merges.txt; None if it has neither.

    Args:
        settings: the content of config.json, which names the tokens that begin and end a text.

    Raises:
        UsageError: a file is damaged, or the tokenizer is of another kind or would lose text.
    """
    path = folder / (TOKENIZER if (folder / TOKENIZER).exists() else VOCAB)
    if not path.exists():
        return None
    end, start = (settings.get(f"{name}_token_id") for name in ("eos", "bos"))
    end, start = (token if type(token) is int else None for token in (end, start))
    try:
        if path.name == TOKENIZER:
            return from_library(json_files.read(path), end, start)
        return _from_vocabulary(folder, end, start)
    except OSError as error:
        raise UsageError(f"{error.filename or path} cannot be read: {error.strerror}") from None
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    except KeyError as error:
        raise UsageError(f"{path} is no tokenizer that is supported: it has no {error}") from None
    except (AttributeError, TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} is no tokenizer that is supported: {error}") from None


def from_library(content: dict[str, Any], end: int | None, start: int | None) -> Tokenizer:
    """The tokenizer of a tokenizer.json.

    Raises:
        AttributeError, KeyError, TypeError, ValueError: it is of another kind, or would lose text.
    """
    model = content["model"]
    special = {token["content"]: token["id"] for token in content.get("added_tokens") or []}
    if content.get("normalizer"):
        raise ValueError("its normalizer would change the text")
    if model["type"] == "WordLevel":
        return _characters(content, special, start)
    if model["type"] != "BPE":
        raise ValueError(f"its model is {shown(model['type'])}, and only BPE on bytes is supported")
    for name in ("unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges"):
        if model.get(name):
            raise ValueError(f"its model has {name}, which a byte-level BPE has not")
    parts, after = content.get("pre_tokenizer") or {}, content.get("post_processor") or {"type": "ByteLevel"}
    if parts.get("type") != "ByteLevel" or parts.get("add_prefix_space") or not parts.get("use_regex", True):
        raise ValueError("its text is not parted as a byte-level BPE parts it")
    if after["type"] != "ByteLevel":
        raise ValueError(f"its post_processor {shown(after['type'])} would add tokens")
    return tokenizer_of(model["vocab"], [_pair(merge) for merge in model["merges"]], special, end, start)


def _pair(merge: Any) -> tuple[str, str]:
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return first, second


def _characters(content: Mapping[str, Any], special: Mapping[str, int], start: int | None) -> CharTokenizer:
    vocab, parts = content["model"]["vocab"], content.get("pre_tokenizer") or {}
    if special or parts.get("type") != "Split" or parts.get("pattern") != {"Regex": ANY_CHARACTER}:
        raise ValueError("its model is 'WordLevel', and only one of single characters is supported")
    characters = sorted(vocab, key=vocab.__getitem__)
    if sorted(vocab.values()) != list(range(len(vocab))) or any(len(char) != 1 for char in characters):
        raise ValueError("its vocabulary is not one of single characters")
    tokenizer = CharTokenizer("".join(characters))
    known = start is not None and 0 <= start < len(vocab) and start != tokenizer.start_token
    return tokenizer.starting_from(start) if known and start is not None else tokenizer


def _from_vocabulary(folder: Path, end: int | None, start: int | None) -> Tokenizer:
    """The byte-level BPE of vocab.json and merges.txt, and the tokens that added_tokens.json names."""
    vocab = json_files.read(folder / VOCAB)
    lines = (folder / MERGES).read_text(encoding="utf-8").splitlines()
    merges = [_pair(line) for line in lines if line and not line.startswith("#version")]
    special = json_files.read(folder / ADDED) if (folder / ADDED).exists() else {}
    special |= {name: id for name, id in vocab.items() if name == ENDOFTEXT or id == end}
    return tokenizer_of(vocab, merges, special, end, start)


def to_library(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of tokenizer.json. Raises `UsageError` for a kind that is not known here."""
    if isinstance(tokenizer, CharTokenizer):
        return _character_description(tokenizer)
    if isinstance(tokenizer, BpeTokenizer):
        description = json.loads(json.dumps(tokenizer.to_json()["tokenizer"]))
    elif isinstance(tokenizer, ByteTokenizer):
        description = library_description({spelled: id for id, spelled in enumerate(BYTES)}, [])
    elif isinstance(tokenizer, Gpt2Tokenizer):
        description = library_description(*vocabulary_and_merges(tokenizer))
    else:
        raise UsageError(f"`tokenizer` {tokenizer.kind} has no form in the tokenizers library")
    description["added_tokens"] = [_added(name, id) for name, id in tokenizer.special_tokens.items()]
    return description


def vocabulary_and_merges(tokenizer: Gpt2Tokenizer) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """GPT-2's tokens by their spelling, and its merges in their order."""
    tokens = [tokenizer.token_bytes(id) for id in range(tokenizer.vocab_size - 1)]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    merges = [_parts(token, ranks) for token in tokens[256:]]
    spelled = [(spelling_of(first), spelling_of(second)) for first, second in merges]
    return {spelling_of(token): id for id, token in enumerate(tokens)}, spelled


def _parts(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens whose merge makes a token: what all earlier merges leave of its bytes."""
    parts, own = [bytes([byte]) for byte in token], ranks[token]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, own) for a, b in itertools.pairwise(parts)]
        at = min(range(len(pairs)), key=pairs.__getitem__)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


def _added(name: str, id: int) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": id, "content": name} | flags


def _character_description(tokenizer: CharTokenizer) -> dict[str, Any]:
    parts = {"type": "Split", "pattern": {"Regex": ANY_CHARACTER}, "behavior": "Isolated", "invert": False}
    model = {
        "type": "WordLevel",
        "vocab": {char: id for id, char in enumerate(tokenizer.chars)},
        "unk_token": "<unk>",  # no token of it: an unknown character is an error and does not vanish
    }
    return library_json(parts, {"type": "Fuse"}, model)


def settings_of(tokenizer: Tokenizer, block_size: int) -> dict[str, Any]:
    """The content of tokenizer_config.json. Without the class, transformers would take one of GPT-2's own."""
    content: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": block_size,
        "clean_up_tokenization_spaces": False,
        # transformers 4 would add token_type_ids, to which GPT-2 adds the embeddings of the tokens of these numbers.
        "model_input_names": ["input_ids", "attention_mask"],
    }
    names: dict[int | None, str] = {id: name for name, id in tokenizer.special_tokens.items()}
    named = {"bos_token": names.get(tokenizer.start_token), "eos_token": names.get(tokenizer.end_token)}
    return content | {name: token for name, token in named.items() if token is not None}
