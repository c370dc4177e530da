"""Tokenizers as JSON: the kind that a description names, and a run's tokenizer.json."""

from pathlib import Path
from typing import Any

from fastgpt.errors import UsageError
from fastgpt.system import json_files
from fastgpt.tokenizer.base import Tokenizer
from fastgpt.tokenizer.bpe import BpeTokenizer
from fastgpt.tokenizer.byte import ByteTokenizer
from fastgpt.tokenizer.char import CharTokenizer
from fastgpt.tokenizer.gpt2 import Gpt2Tokenizer

# Every kind of tokenizer by its name. Another one is a file beside these, a line here, and a name in
# config/choices.py.
KINDS: dict[str, type[Tokenizer]] = {
    tokenizer.kind: tokenizer for tokenizer in (CharTokenizer, ByteTokenizer, Gpt2Tokenizer, BpeTokenizer)
}


def from_json(description: dict[str, Any]) -> Tokenizer:
    """The tokenizer that `to_json` described. Raises `UsageError` when the description is not one."""
    kind = description.get("kind") if isinstance(description, dict) else None
    if kind not in KINDS:
        raise UsageError(f"tokenizer kind {kind!r:.40} is not one of {', '.join(KINDS)}")
    try:
        vocabulary = KINDS[kind].from_json(description)
        return vocabulary.starting_from(description["start"]) if "start" in description else vocabulary
    except UsageError:
        raise
    except KeyError as error:
        raise UsageError(f"not a {kind} tokenizer: it has no {error}") from None
    except (TypeError, ValueError, AttributeError, RecursionError) as error:
        raise UsageError(f"not a {kind} tokenizer: {error}") from None


def load(path: str | Path) -> Tokenizer:
    """The tokenizer that `save` wrote. Raises `UsageError`, naming the file, if it is missing or corrupt."""
    try:
        return from_json(json_files.read(Path(path)))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}; a run's folder holds its tokenizer.json") from None
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    except ValueError as error:
        raise UsageError(f"{path} is not JSON: {error}; copy it anew from the run it belongs to") from None
