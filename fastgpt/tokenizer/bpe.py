"""A byte-level BPE that the tokenizers library trains on the corpus."""

import json
from collections.abc import Iterable, Mapping
from typing import Any, Self

import numpy as np

from fastgpt.errors import UsageError
from fastgpt.tokenizer.base import ENDOFTEXT, Text, Tokenizer, encoded, ending, has_end
from fastgpt.tokenizer.byte_pairs import PIECES, bytes_of

DEFAULT_BPE = 1024  # tokens
SMALLEST_BPE = 257
LARGEST_BPE = 1 << 20  # tokens; the library makes room for as many as are asked for at once


class BpeTokenizer(Tokenizer):
    """A byte-level BPE like GPT-2's: trained on the corpus at hand, or another program's.

    Args:
        description: the library's own JSON, as a dict.
        ends: the vocabulary has one more token, its last, which ends a document.
        special: the ids of tokens to which no text is encoded, by their names. With `ends` there are no others.
        end: the id of the one among them that ends a document.

    Raises:
        ValueError: it does not describe a byte-level BPE, or an id has no token.
    """

    kind = "bpe"
    default_size = DEFAULT_BPE

    def __init__(
        self,
        description: dict[str, Any],
        ends: bool = False,
        special: Mapping[str, int] | None = None,
        end: int | None = None,
    ):
        library = _tokenizers()
        _check_plain_bpe(description)
        try:
            self._library = library.Tokenizer.from_str(json.dumps(description))
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"the tokenizers library cannot read it: {error}") from None
        spelled = {id: token for token, id in self._library.get_vocab().items()}
        self._description, self.ends = description, ends
        if ends:
            end = len(spelled)
            special = {ENDOFTEXT: end}
        self._special = dict(special or {})
        if end is not None and end not in self._special.values():
            raise ValueError(f"its end {end!r:.20} is no special token")
        tokens = {id: bytes_of(token) for id, token in spelled.items()}
        tokens |= {id: name.encode() for name, id in self._special.items()}
        if missing := [id for id in range(len(tokens)) if id not in tokens]:
            raise ValueError(f"no token has the id {missing[0]}")
        by_bytes = {token: id for id, token in tokens.items()}
        if lacking := [byte for byte in range(256) if bytes([byte]) not in by_bytes]:
            raise ValueError(f"it has no token for the byte 0x{lacking[0]:02x}")
        ordered = [tokens[id] for id in range(len(tokens))]
        super().__init__(ordered, start_token=by_bytes[b"\n"], end_token=end)

    @classmethod
    def made_from(cls, text: Text) -> Self:
        return cls.train(text.train(), text.vocab_size or DEFAULT_BPE, text.ends)

    @classmethod
    def from_json(cls, description: dict[str, Any]) -> Self:
        return cls(description["tokenizer"], has_end(description), description.get("special"), description.get("end"))

    @classmethod
    def check_size(cls, vocab_size: int, ends: bool | None = None) -> None:
        """Raise `UsageError` for a size that would not hold the 256 bytes and one merge, or is absurd."""
        if vocab_size > LARGEST_BPE:
            raise UsageError(f"`vocab_size` {vocab_size} is too large for `tokenizer` bpe; use at most {LARGEST_BPE}")
        if vocab_size < SMALLEST_BPE:
            raise UsageError(
                f"`vocab_size` {vocab_size} is too small for `tokenizer` bpe, which starts from 256 bytes; "
                f"use at least {SMALLEST_BPE}"
            )

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, ends: bool = False) -> Self:
        """Learn a vocabulary of at most `vocab_size` tokens, the 256 bytes, and with `ends` an end, among them.

        The same text gives the same vocabulary. A small text may hold fewer merges than asked for.

        Raises:
            UsageError: `vocab_size` is below 257 or above 2**20.
        """
        cls.check_size(vocab_size)
        library = _tokenizers()
        trained = library.Tokenizer(library.models.BPE())
        trained.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
        trained.decoder = library.decoders.ByteLevel()
        trainer = library.trainers.BpeTrainer(
            vocab_size=vocab_size - ends,
            initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        trained.train_from_iterator((p for text in texts for p in PIECES.findall(text)), trainer)
        return cls(json.loads(trained.to_str()), ends)

    @property
    def special_tokens(self) -> Mapping[str, int]:
        return self._special

    def encode(self, text: str) -> np.ndarray:
        encoded(text)
        ids: list[int] = []
        for encoding in self._library.encode_batch_fast(PIECES.findall(text)):
            ids += encoding.ids
        return np.array(ids, dtype=np.int64)

    def _describe(self) -> dict[str, Any]:
        content = {"kind": self.kind, "tokenizer": self._description} | ending(self.ends)
        return (
            content if self.ends or not self._special else content | {"special": self._special, "end": self.end_token}
        )


def _check_plain_bpe(description: dict[str, Any]) -> None:
    """Raise ValueError for parts that `BpeTokenizer.train` never makes: they could lose text, or stop the library."""
    model = description["model"]
    extras = {name: description.get(name) for name in ("added_tokens", "truncation", "padding", "normalizer")}
    extras |= {name: model.get(name) for name in ("continuing_subword_prefix", "end_of_word_suffix")}
    for name, value in extras.items():
        if value:
            raise ValueError(f"a byte-level BPE has no {name}")
    if description["pre_tokenizer"]["type"] != "ByteLevel" or description.get("post_processor"):
        raise ValueError("its text is not parted as a byte-level BPE parts it")


def _tokenizers() -> Any:
    """The library, imported when it is first needed."""
    import tokenizers
    import tokenizers.decoders
    import tokenizers.models
    import tokenizers.pre_tokenizers
    import tokenizers.trainers

    return tokenizers
