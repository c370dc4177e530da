"""The interface of a tokenizer: text to token ids and back.

Every tokenizer is lossless: `decode(encode(x)) == x` for every valid text. Each saves itself whole (`to_json`), so that
a run's folder needs no vocabulary files.
"""

import copy
import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from fastgpt.errors import UsageError
from fastgpt.system.files import write_atomic
from fastgpt.system.units import counted

ENDOFTEXT = "<|endoftext|>"


@dataclass(frozen=True)
class Text:
    """The sources of a vocabulary.

    Attributes:
        chars: the distinct characters of the whole text, in code point order.
        train: opens the train split, in pieces; may be called several times.
        vocab_size: the largest vocabulary that was asked for, or `Tokenizer.default_size`.
        ends: a token of its own ends each document.
    """

    chars: str
    train: Callable[[], Iterable[str]]
    vocab_size: int | None
    ends: bool


class Tokenizer(ABC):
    """The part that every kind shares: a table of each token's bytes, and decoding by it.

    A subclass is one kind. `saved.KINDS` lists them, and all other code asks there.

    Attributes:
        kind: its name in settings and files.
        can_end: whether its vocabulary can have a token that ends a document.
        default_size: tokens of a vocabulary that is trained to a size; None for a kind that has a size of its own.
        vocab_size: number of tokens; ids are 0 .. vocab_size - 1.
        end_token: the id that ends a document, to which no text is encoded; None where there is none.
        start_token: the id that generation starts from when the prompt is empty. `starting_from` sets one that was
            trained; a vocabulary that was saved without one has a newline or `end_token`.
    """

    kind: ClassVar[str]
    can_end: ClassVar[bool] = True
    default_size: ClassVar[int | None] = None

    def __init__(self, tokens: Sequence[bytes], start_token: int, end_token: int | None = None):
        self._tokens = tuple(tokens)
        self.vocab_size = len(self._tokens)
        self.start_token, self.end_token = start_token, end_token
        self._start_is_trained = False

    @classmethod
    @abstractmethod
    def made_from(cls, text: Text) -> Self:
        """The vocabulary of a text. Raises `UsageError` where a file or a library is missing."""

    @classmethod
    @abstractmethod
    def from_json(cls, description: dict[str, Any]) -> Self:
        """The tokenizer that `to_json` described, its trained `start_token` aside.

        Raises:
            AttributeError, KeyError, TypeError, ValueError: the description is not one of this kind.
            UsageError: a library is missing.
        """

    @classmethod
    def fixed_size(cls, ends: bool) -> int | None:
        """The size of every vocabulary of this kind, with or without an end; None where the text decides."""
        return None

    @classmethod
    def most_tokens(cls, characters: int, size: int) -> int:
        """The most tokens of a text with this many characters and UTF-8 bytes."""
        return size

    @classmethod
    def check_size(cls, vocab_size: int, ends: bool | None = None) -> None:
        """Raise `UsageError` for a size that no vocabulary of this kind has; `ends` None: with or without an end."""
        if vocab_size not in {cls.fixed_size(with_end) for with_end in ((False, True) if ends is None else (ends,))}:
            raise UsageError(
                f"`vocab_size` {vocab_size} is for `tokenizer` bpe; `tokenizer` {cls.kind} has its own, leave it out"
            )

    def starting_from(self, token: int) -> Self:
        """The same vocabulary with another `start_token`, which is saved with it. Raises ValueError for no token."""
        if type(token) is not int or not 0 <= token < self.vocab_size:
            raise ValueError(f"its start {token!r:.20} is no token of {self.vocab_size:,}")
        other = copy.copy(self)
        other.start_token, other._start_is_trained = token, True
        return other

    @property
    def opening(self) -> str:
        """The text of a trained `start_token`, which an empty prompt stands for; "" if it has no text to show."""
        if not self._start_is_trained or self.start_token == self.end_token:
            return ""
        try:
            return self._tokens[self.start_token].decode("utf-8")
        except UnicodeDecodeError:  # the first byte of a longer character
            return ""

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """The tokens to which `encode` encodes no text: their names, by which `encode_special` knows them, and ids."""
        return {} if self.end_token is None else {ENDOFTEXT: self.end_token}

    @abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """The ids of `text`, (T,) int64, in which the name of a special token is text like any other.

        Raises:
            UsageError: a lone surrogate, or an unknown character.
        """

    def encode_special(self, text: str) -> np.ndarray:
        """The ids of `text`, (T,) int64, in which the name of a special token stands for that token.

        Raises:
            UsageError: as `encode`.
        """
        special = self.special_tokens
        if not special:
            return self.encode(text)
        encoded(text)  # its message counts characters from the beginning of the whole text
        longest_first = sorted(special, key=len, reverse=True)
        parts = re.split(f"({'|'.join(map(re.escape, longest_first))})", text)
        return np.concatenate([np.array([special[part]]) if part in special else self.encode(part) for part in parts])

    @abstractmethod
    def _describe(self) -> dict[str, Any]:
        """The vocabulary as JSON values."""

    def to_json(self) -> dict[str, Any]:
        """Everything `from_json` needs to rebuild this tokenizer, as JSON values."""
        return self._describe() | ({"start": self.start_token} if self._start_is_trained else {})

    def token_bytes(self, id: int) -> bytes:
        """The UTF-8 bytes of one token, perhaps part of a character. Raises ValueError for an unknown id."""
        if not 0 <= id < self.vocab_size:
            raise ValueError(f"token {id} is outside the vocabulary of {counted(self.vocab_size, 'token')}")
        return self._tokens[id]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD. Raises ValueError for an unknown id."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def save(self, path: str | Path) -> None:
        """Write `to_json` to a file, replacing it in one step."""
        write_atomic(Path(path), json.dumps(self.to_json()))

    def sha256(self) -> str:
        """The hash of the vocabulary, which a checkpoint keeps to recognize it."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    def __eq__(self, other: object) -> bool:
        """Whether the vocabularies are the same; the token that generation starts from does not count."""
        return isinstance(other, Tokenizer) and self._describe() == other._describe()

    def __repr__(self) -> str:
        return f"{type(self).__name__}(vocab_size={self.vocab_size})"


def ending(ends: bool) -> dict[str, Any]:
    """The entry of a description that says that a token of its own ends a document."""
    return {"end_of_text": True} if ends else {}


def has_end(description: dict[str, Any]) -> bool:
    """Whether a description has the entry of `ending`. Raises ValueError for another value of it."""
    ends = description.get("end_of_text", False)
    if type(ends) is not bool:
        raise ValueError(f"end_of_text {ends!r:.20} is neither true nor false")
    return ends


def check_unicode(text: str, name: str) -> str:
    """The text itself. Raises `UsageError`, naming it, for a lone surrogate: what a byte that is not UTF-8 becomes."""
    encoded(text, name=name)
    return text


def encoded(text: str, encoding: str = "utf-8", name: str = "the text") -> bytes:
    try:
        return text.encode(encoding)
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{name} is not valid Unicode: a lone surrogate, U+{ord(text[error.start]):04X}, "
            f"at character {error.start:,}; pass valid UTF-8"
        ) from None
