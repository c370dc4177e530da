"""Opens prepared folders, ours or nanoGPT's: tokens of two splits and a description of them. Every token is checked.

A split is one file, train.bin or val.bin, or in a corpus of documents several shards. Checking reads every byte, in
several threads where there are several files.
"""

import hashlib
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastgpt.data import token_file
from fastgpt.data.sharded_tokens import ShardedTokens, holds_shards
from fastgpt.errors import UsageError
from fastgpt.interchange import nanogpt_vocabulary
from fastgpt.system import cpus, json_files
from fastgpt.system.units import format_seconds
from fastgpt.tokenizer import saved
from fastgpt.tokenizer.base import Tokenizer
from fastgpt.tokenizer.gpt2 import Gpt2Tokenizer

OPENING_TOKENS, OPENING_WITHIN = 16, 4096  # tokens of `Corpus.opening`, and of the text that is searched for it
FORMAT, DOCUMENTS_FORMAT = 1, 2  # of meta.json; that of documents lists shards
SPLITS = ("train", "val")
TOKEN_FILES = ("train.bin", "val.bin")
STALE_SECONDS = 60  # by which val.bin may be older than train.bin
MOST_THREADS = 8  # that check files
Tokens = np.ndarray | ShardedTokens


@dataclass(frozen=True)
class Corpus:
    """A prepared folder.

    Attributes:
        dtype: of the token files, "uint16" or "uint32".
        source_sha256: of the UTF-8 text, with the ends of its documents; for a folder that nanoGPT prepared, of its two
            token files.
        val_bytes: UTF-8 bytes of the val text, for bits per byte; like `characters` and `bytes`, which are
            those of the whole text, None for a folder that nanoGPT prepared.
        train_files, val_files: names of the files that hold the tokens of a split, one after another.
        documents: the text consists of documents, each of which an end_token follows; training packs them
            unless told otherwise.
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
    train_files: tuple[str, ...] = TOKEN_FILES[:1]
    val_files: tuple[str, ...] = TOKEN_FILES[1:]
    documents: bool = False

    def train(self) -> Tokens:
        """The training tokens, (train_tokens,) of `dtype`, mapped into memory and read-only."""
        return self._tokens(self.train_files)

    def val(self) -> Tokens:
        """The validation tokens, (val_tokens,) of `dtype`, mapped into memory and read-only."""
        return self._tokens(self.val_files)

    def whole(self) -> Tokens:
        """The tokens of both splits, mapped into memory and read-only."""
        return self._tokens(self.train_files + self.val_files)

    def _tokens(self, names: tuple[str, ...]) -> Tokens:
        paths = [self.path / name for name in names]
        return ShardedTokens(paths, self.dtype) if len(paths) > 1 else np.memmap(paths[0], dtype=self.dtype, mode="r")

    def opening(self) -> str:
        """A few words for a model to continue: the beginning of a line of the val split.

        It is the first whole line that begins with a letter or, if there is none near, that is not blank. A line begins
        after a line break or the end of a document. Without one, the beginning of the split is taken.
        """
        ids, end = self.val()[:OPENING_WITHIN].tolist(), self.tokenizer.end_token
        pieces = [self.tokenizer.token_bytes(id) for id in ids]
        found = ""
        for start in [*(i + 1 for i, id in enumerate(ids) if id == end or pieces[i].endswith(b"\n")), 0]:
            part = pieces[start : start + OPENING_TOKENS]
            if end in ids[start : start + OPENING_TOKENS]:
                part = part[: ids[start:].index(end)]
            text = b"".join(part).decode("utf-8", errors="ignore")  # drops a character that is cut
            if text[:1].isalpha():
                return text
            if not found and text.partition("\n")[0].strip():
                found = text
        return found


def is_prepared(path: Path) -> bool:
    """Whether a folder holds tokens."""
    return any((path / file).exists() for file in TOKEN_FILES) or holds_shards(path)


def load(path: str | Path, gpt2_vocab: str | None = None) -> Corpus:
    """Open a prepared folder: its tokens and meta.json, or nanoGPT's own with or without meta.pkl.

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
        meta = json_files.read(path / "meta.json")
        if meta["format"] not in (FORMAT, DOCUMENTS_FORMAT):
            raise ValueError(f"its format is {meta['format']!r}, this fastgpt reads {FORMAT} and {DOCUMENTS_FORMAT}")
        documents = meta["format"] == DOCUMENTS_FORMAT
        shards = [_shards(meta, split, documents) for split in SPLITS]
        train_files, val_files = (tuple(shard.file for shard in split) for split in shards)
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
            train_files=train_files,
            val_files=val_files,
            documents=documents,
        )
        if (corpus.tokenizer.vocab_size, corpus.dtype) != (meta["vocab_size"], meta["dtype"]):
            raise ValueError("vocab_size and dtype are not the tokenizer's")
        if [sum(shard.tokens for shard in split) for split in shards] != [corpus.train_tokens, corpus.val_tokens]:
            raise ValueError("the shards do not hold as many tokens as their split")
    except OSError as error:
        raise UsageError(f"{path / 'meta.json'} cannot be read: {error.strerror}") from None
    except UsageError as error:
        raise UsageError(f"{path / 'meta.json'}: {error}") from None
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else error
        raise UsageError(f"{path / 'meta.json'} is damaged: {reason}; delete {path} and prepare it again") from None
    _check_files(corpus, [shard for split in shards for shard in split])
    return corpus


@dataclass(frozen=True)
class _Shard:
    """A file of tokens as meta.json describes it."""

    file: str
    tokens: int
    sha256: str


def _shards(meta: Mapping[str, Any], split: str, documents: bool) -> list[_Shard]:
    """The files of a split. Raises `KeyError`, `TypeError` or `ValueError` for a description of none."""
    described = meta[split]["shards"] if documents else [meta[split] | {"file": f"{split}.bin"}]
    shards = [_Shard(str(one["file"]), int(one["tokens"]), str(one["sha256"])) for one in described]
    for shard in shards:
        if Path(shard.file).name != shard.file:
            raise ValueError(f"{shard.file!r:.40} is no file in the folder")
    if not shards:
        raise ValueError(f"it has no shards of the {split} split")
    return shards


def _check_files(corpus: Corpus, shards: Sequence[_Shard]) -> None:
    """Read all files of tokens. The first in order that is not what meta.json says raises `UsageError`."""
    vocab_size = corpus.tokenizer.vocab_size

    def check(shard: _Shard) -> None:
        token_file.check(corpus.path / shard.file, vocab_size, shard.tokens, shard.sha256)

    with ThreadPoolExecutor(min(MOST_THREADS, cpus.usable())) as pool:
        list(pool.map(check, shards))
