"""Packed runs: documents lie side by side in the windows of a batch, and each is computed as if it were alone.

A document begins with the vocabulary's `end_token`, which ends the one before it and is what generation starts from. A
window may begin within a document, of which the model then sees the rest only.
"""

import torch

from fastgpt.config.training import TrainConfig
from fastgpt.data import token_file
from fastgpt.data.corpus import Unprepared
from fastgpt.data.prepared import Corpus
from fastgpt.errors import UsageError


def chosen(pack: bool | None, data: Corpus | Unprepared) -> bool:
    """The choice of a new run: `pack` itself or, if it is None, true for a corpus of documents that can be told apart.

    Raises:
        UsageError: `pack` is true, and the corpus has no ends of documents.
    """
    unprepared = isinstance(data, Unprepared)  # a text, which is no corpus of document shards
    if pack is False or (pack is None and (unprepared or not data.documents)):
        return False
    end = _end(data)
    if unprepared and data.statistics.train_ends:
        return True
    if not unprepared and end is not None and token_file.holds(data.train(), end):
        return True
    if pack is None:
        return False
    kind = data.kind if unprepared else data.tokenizer
    lacking = f"{kind.kind} vocabulary" if end is None else "train split"
    raise UsageError(
        f"`pack` tells documents apart by end-of-text tokens, and the {lacking} of {data.name} has none; give "
        "`dataset` a folder of text files with `tokenizer` byte, gpt2 or bpe, or leave `pack` out"
    )


def end_token(config: TrainConfig, data: Corpus | Unprepared) -> int | None:
    """The vocabulary's `end_token` for a packed run, None for any other."""
    return _end(data) if config.pack else None


def _end(data: Corpus | Unprepared) -> int | None:
    return data.end_token if isinstance(data, Unprepared) else data.tokenizer.end_token


def document_ids(tokens: torch.Tensor, end_token: int | None) -> torch.Tensor | None:
    """The documents in windows, numbered from left to right, for `GPT.forward`: tokens (B, T) -> int64 (B, T).

    None, which is one document for each window, without an `end_token`.
    """
    return None if end_token is None else (tokens == end_token).cumsum(1)
