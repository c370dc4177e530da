"""One token for each distinct character of a text."""

import unicodedata
from collections.abc import Sequence
from typing import Any, Self

import numpy as np

from fastgpt.errors import UsageError
from fastgpt.system.units import counted
from fastgpt.tokenizer.base import Text, Tokenizer, encoded


class UnknownCharacters(UsageError):
    """A text has characters that the vocabulary lacks.

    Attributes:
        lack: the part of the message that names them.
        normalization: advice that would help, or "".
    """

    def __init__(self, lack: str, normalization: str):
        advice = normalization or "leave those out, or train with `tokenizer` byte, gpt2 or bpe"
        super().__init__(f"{lack}; {advice}")
        self.lack, self.normalization = lack, normalization


class CharTokenizer(Tokenizer):
    """One token per character; id i is `chars[i]`. Raises ValueError if `chars` is empty or repeats one."""

    kind = "char"
    can_end = False

    def __init__(self, chars: str):
        if not chars or len(set(chars)) != len(chars):
            raise ValueError("a char vocabulary needs at least one character, and each only once")
        codes = np.frombuffer(encoded(chars, "utf-32-le"), dtype="<u4")
        super().__init__([char.encode() for char in chars], start_token=max(chars.find("\n"), 0))
        self.chars = chars
        # One entry per code point, and a last one, -1, on which all higher code points land.
        self._ids = np.full(int(codes.max()) + 2, -1, dtype=np.int64)
        self._ids[codes] = np.arange(len(chars))

    @classmethod
    def made_from(cls, text: Text) -> Self:
        return cls(text.chars)

    @classmethod
    def from_json(cls, description: dict[str, Any]) -> Self:
        return cls(description["chars"])

    @classmethod
    def most_tokens(cls, characters: int, size: int) -> int:
        return characters

    def encode(self, text: str) -> np.ndarray:
        codes = np.frombuffer(encoded(text, "utf-32-le"), dtype="<u4")  # (T,)
        ids = self._ids[np.minimum(codes, len(self._ids) - 1)]
        unknown = [chr(code) for code in np.unique(codes[ids < 0])]
        if unknown:
            named = ", ".join(f"{char!r} (U+{ord(char):04X})" for char in unknown[:5])
            more = f" and {len(unknown) - 5:,} more" if len(unknown) > 5 else ""
            raise UnknownCharacters(
                f"the char vocabulary has only {counted(self.vocab_size, 'character')} and lacks {named}{more}",
                self._normalization(text, unknown),
            )
        return ids

    def _normalization(self, text: str, unknown: Sequence[str]) -> str:
        """Advice for a text with another Unicode normalization, which would remove some of the unknown characters."""
        known = set(self.chars)
        for form in ("NFC", "NFD"):
            left = set(unicodedata.normalize(form, text)) - known
            if len(left) < len(unknown):
                rest = f", which leaves {counted(len(left), 'unknown character')}" if left else ""
                return (
                    f"normalize the text to Unicode's {form}, as the vocabulary is (uconv -x any-{form.lower()}){rest}"
                )
        return ""

    def _describe(self) -> dict[str, Any]:
        return {"kind": self.kind, "chars": self.chars}
