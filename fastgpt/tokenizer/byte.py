"""One token per byte of UTF-8."""

from typing import Any, Self

import numpy as np

from fastgpt.tokenizer.base import ENDOFTEXT, Text, Tokenizer, encoded, ending, has_end


class ByteTokenizer(Tokenizer):
    """One token per UTF-8 byte: 256 tokens for any text. With `ends`, token 256 ends a document."""

    kind = "byte"

    def __init__(self, ends: bool = False):
        self.ends = ends
        tokens = [*(bytes([value]) for value in range(256)), *([ENDOFTEXT.encode()] if ends else [])]
        super().__init__(tokens, start_token=ord("\n"), end_token=256 if ends else None)

    @classmethod
    def made_from(cls, text: Text) -> Self:
        return cls(text.ends)

    @classmethod
    def from_json(cls, description: dict[str, Any]) -> Self:
        return cls(has_end(description))

    @classmethod
    def fixed_size(cls, ends: bool) -> int:
        return 256 + ends

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(encoded(text), dtype=np.uint8).astype(np.int64)

    def _describe(self) -> dict[str, Any]:
        return {"kind": self.kind} | ending(self.ends)
