"""Tokenizers as JSON: the kind that a description names, and a run's tokenizer.json."""

import base64
from pathlib import Path
from typing import Any

from fastgpt.errors import UsageError
from fastgpt.tokenizer.base import Tokenizer, read_json
from fastgpt.tokenizer.bpe import BpeTokenizer
from fastgpt.tokenizer.byte import ByteTokenizer
from fastgpt.tokenizer.char import CharTokenizer
from fastgpt.tokenizer.gpt2 import Gpt2Tokenizer

KINDS = ("char", "byte", "gpt2", "bpe")
FIXED_SIZES = {"byte": (256, 257), "gpt2": (50_257,)}  # without and with a token that ends a document


def from_json(description: dict[str, Any]) -> Tokenizer:
    """The tokenizer that `to_json` described. Raises `UsageError` when the description is not one."""
    kind = description.get("kind") if isinstance(description, dict) else None
    if kind not in KINDS:
        raise UsageError(f"tokenizer kind {kind!r:.40} is not one of {', '.join(KINDS)}")
    try:
        vocabulary = _vocabulary_of(kind, description)
        return vocabulary.starting_from(description["start"]) if "start" in description else vocabulary
    except UsageError:
        raise
    except KeyError as error:
        raise UsageError(f"not a {kind} tokenizer: it has no {error}") from None
    except (TypeError, ValueError, AttributeError, RecursionError) as error:
        raise UsageError(f"not a {kind} tokenizer: {error}") from None


def _vocabulary_of(kind: str, description: dict[str, Any]) -> Tokenizer:
    ends = description.get("end_of_text", False)
    if type(ends) is not bool:
        raise ValueError(f"end_of_text {ends!r:.20} is neither true nor false")
    match kind:
        case "char":
            return CharTokenizer(description["chars"])
        case "byte":
            return ByteTokenizer(ends)
        case "gpt2":
            return Gpt2Tokenizer([base64.b64decode(token) for token in description["ranks"].split(" ")])
        case _:
            return BpeTokenizer(description["tokenizer"], ends)


def load(path: str | Path) -> Tokenizer:
    """The tokenizer that `save` wrote. Raises `UsageError`, naming the file, if it is missing or corrupt."""
    try:
        return from_json(read_json(Path(path)))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}; a run's folder holds its tokenizer.json") from None
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    except ValueError as error:
        raise UsageError(f"{path} is not JSON: {error}; copy it anew from the run it belongs to") from None
