"""Opens prepared folders, ours or nanoGPT's: train.bin, val.bin and a description of them. Every token is checked."""

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastgpt.data import token_file
from fastgpt.errors import UsageError
from fastgpt.interchange import nanogpt_vocabulary
from fastgpt.system.units import format_seconds
from fastgpt.tokenizer import base, saved
from fastgpt.tokenizer.base import Tokenizer
from fastgpt.tokenizer.gpt2 import Gpt2Tokenizer

OPENING_TOKENS, OPENING_WITHIN = 16, 4096  # tokens of `Corpus.opening`, and of the text that is searched for it
FORMAT = 1  # of meta.json
TOKEN_FILES = ("train.bin", "val.bin")
STALE_SECONDS = 60  # by which val.bin may be older than train.bin


@dataclass(frozen=True)
class Corpus:
    """A prepared folder.

    Attributes:
        dtype: of the token files, "uint16" or "uint32".
        source_sha256: of the UTF-8 text, with the ends of its documents; for a folder that nanoGPT prepared, of its two
            token files.
        val_bytes: UTF-8 bytes of the val text, for bits per byte; like `characters` and `bytes`, which are
            those of the whole text, None for a folder that nanoGPT prepared.
        documents: a run packs the corpus unless told otherwise: its attention stays within documents.
    """

    path: Path
    name: str
    tokenizer: Tokenizer
    dtype: str
    source_sha256: str
    train_tokens: int
    val_tokens: int
    val_bytes: int | None
    characters: int | None
    bytes: int | None
    documents: bool = False

    def train(self) -> np.memmap:
        """The training tokens, (train_tokens,) of `dtype`, as a read-only memory map."""
        return np.memmap(self.path / "train.bin", dtype=self.dtype, mode="r")

    def val(self) -> np.memmap:
        """The validation tokens, (val_tokens,) of `dtype`, as a read-only memory map."""
        return np.memmap(self.path / "val.bin", dtype=self.dtype, mode="r")

    def opening(self) -> str:
        """A few words for a model to continue: the beginning of the val split's first whole line that is not blank.

        A line begins after a line break or the end of a document. Without one, the beginning of the split is taken.
        """
        ids, end = self.val()[:OPENING_WITHIN].tolist(), self.tokenizer.end_token
        pieces = [self.tokenizer.token_bytes(id) for id in ids]
        for start in [*(i + 1 for i, id in enumerate(ids) if id == end or pieces[i].endswith(b"\n")), 0]:
            part = pieces[start : start + OPENING_TOKENS]
            if end in ids[start : start + OPENING_TOKENS]:
                part = part[: ids[start:].index(end)]
            text = b"".join(part).decode("utf-8", errors="ignore")  # drops a character that is cut
            if text.partition("\n")[0].strip():
                return text
        return ""


def load(path: str | Path, gpt2_vocab: str | None = None) -> Corpus:
    """Open a prepared folder: train.bin, val.bin and meta.json, or nanoGPT's own with or without meta.pkl.

    Raises:
        UsageError: a file is missing, empty, of the wrong size or malformed.
    """
    path = Path(path)
    if (path / "meta.json").exists():
        return _load_ours(path)
    for file in TOKEN_FILES:
        if not (path / file).is_file():
            raise UsageError(f"{path} has no {file}; prepare the text itself with `dataset` PATH")
    meta = path / "meta.pkl"
    vocabulary = nanogpt_vocabulary.vocabulary(meta) if meta.exists() else Gpt2Tokenizer.from_files(gpt2_vocab)
    _warn_of_stale_val(path)
    digest = hashlib.sha256()
    train, val = (
        token_file.scan(path / file, nanogpt_vocabulary.DTYPE, vocabulary.vocab_size, digest) for file in TOKEN_FILES
    )
    return Corpus(
        path=path,
        name=path.resolve().name,
        tokenizer=vocabulary,
        dtype=nanogpt_vocabulary.DTYPE,
        source_sha256=digest.hexdigest(),
        train_tokens=train,
        val_tokens=val,
        val_bytes=None,
        characters=None,
        bytes=None,
    )


def _warn_of_stale_val(path: Path) -> None:
    """Warn if val.bin is older than train.bin. nanoGPT writes val.bin last, so it may belong to another text then.

    A folder that nanoGPT prepared shows this by modification times only. Copying may change those, so this is no error.
    A folder of ours holds the hashes of both files.
    """
    train, val = ((path / file).stat().st_mtime for file in TOKEN_FILES)
    if train - val > STALE_SECONDS:
        print(
            f"warning: {path / 'val.bin'} is {format_seconds(train - val)} older than train.bin; if it is of another "
            "text, the val loss tells nothing: prepare both again (if not, touch val.bin)",
            file=sys.stderr,
        )


def _load_ours(path: Path) -> Corpus:
    try:
        meta = base.read_json(path / "meta.json")
        if meta["format"] != FORMAT:
            raise ValueError(f"its format is {meta['format']!r}, this fastgpt reads {FORMAT}")
        corpus = Corpus(
            path=path,
            name=str(meta["dataset"]),
            tokenizer=saved.from_json(meta["tokenizer"]),
            dtype=token_file.dtype_of(meta["vocab_size"]),
            source_sha256=str(meta["source_sha256"]),
            train_tokens=int(meta["train"]["tokens"]),
            val_tokens=int(meta["val"]["tokens"]),
            val_bytes=int(meta["val"]["bytes"]),
            characters=int(meta["characters"]),
            bytes=int(meta["bytes"]),
        )
        if (corpus.tokenizer.vocab_size, corpus.dtype) != (meta["vocab_size"], meta["dtype"]):
            raise ValueError("vocab_size and dtype are not the tokenizer's")
        hashes = str(meta["train"]["sha256"]), str(meta["val"]["sha256"])
    except OSError as error:
        raise UsageError(f"{path / 'meta.json'} cannot be read: {error.strerror}") from None
    except UsageError as error:
        raise UsageError(f"{path / 'meta.json'}: {error}") from None
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else error
        raise UsageError(f"{path / 'meta.json'} is damaged: {reason}; delete {path} and prepare it again") from None
    for file, tokens, sha256 in zip(TOKEN_FILES, (corpus.train_tokens, corpus.val_tokens), hashes, strict=True):
        token_file.check(path / file, corpus.tokenizer.vocab_size, tokens, sha256)
    return corpus
