"""Writes and checks token files: the ids of a text one after another, as uint16 or uint32, and nothing else."""

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastgpt.data.sharded_tokens import ShardedTokens
from fastgpt.data.sources import Piece, chunks
from fastgpt.errors import UsageError, shown
from fastgpt.system import files
from fastgpt.system.units import counted
from fastgpt.tokenizer.base import Tokenizer
from fastgpt.tokenizer.char import UnknownCharacters

if TYPE_CHECKING:
    from hashlib import _Hash

READ_BYTES = 1 << 20


def dtype_of(vocab_size: int) -> str:
    """The narrowest type that holds every id."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def write(path: Path, pieces: Iterable[Piece], vocabulary: Tokenizer) -> dict[str, Any]:
    """Encode a text in pieces; returns its numbers of tokens and UTF-8 bytes, and the file's sha256.

    The end of a document becomes the vocabulary's end_token.
    """
    dtype = dtype_of(vocabulary.vocab_size)
    counts = {"tokens": 0, "bytes": 0}

    def blocks() -> Iterator[bytes]:
        for chunk in chunks(pieces):
            ids = np.array([vocabulary.end_token]) if chunk is None else vocabulary.encode(chunk)
            counts["tokens"] += len(ids)
            counts["bytes"] += 0 if chunk is None else len(chunk.encode())
            yield ids.astype(dtype).tobytes()

    identity = files.write(path, blocks())
    return counts | {"sha256": identity["sha256"]}


@contextmanager
def encoding(dataset: str) -> Iterator[None]:
    """Name the dataset, and a way out for it, in the error of a vocabulary that lacks characters of its text."""
    try:
        yield
    except UnknownCharacters as error:
        advice = error.normalization or "leave those out, or name another text or model"
        raise UsageError(f"`dataset` {shown(dataset)}: {error.lack}; {advice}") from None


def holds(tokens: np.ndarray | ShardedTokens, token: int) -> bool:
    """Whether tokens (T,) hold a token. Reading stops where it is found."""
    return any(bool((tokens[at : at + READ_BYTES] == token).any()) for at in range(0, len(tokens), READ_BYTES))


def scan(path: Path, dtype: str, vocab_size: int, *digests: "_Hash") -> int:
    """The number of tokens in a file, all of which are in the vocabulary. Every byte updates the digests.

    Raises:
        UsageError: the file cannot be read, is empty or cut within a token, or holds an id beyond the vocabulary.
    """
    width, size, largest = np.dtype(dtype).itemsize, 0, 0
    try:
        with files.regular(path).open("rb") as file:
            while block := file.read(READ_BYTES):
                for digest in digests:
                    digest.update(block)
                size += len(block)
                whole = np.frombuffer(block, dtype=dtype, count=len(block) // width)
                largest = max(largest, int(whole.max(initial=0)))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}; prepare the corpus again") from None
    if size == 0 or size % width:
        raise UsageError(
            f"{path} has {counted(size, 'byte')}, which is no whole number of {dtype} tokens; prepare the corpus again"
        )
    if largest >= vocab_size:
        raise UsageError(
            f"{path} holds token {largest:,}, and its vocabulary has {counted(vocab_size, 'token')}; "
            "prepare the corpus again"
        )
    return size // width


def check(path: Path, vocab_size: int, tokens: int, sha256: str) -> None:
    """`scan`, and raise `UsageError` also if the number of tokens or the hash is another."""
    digest = hashlib.sha256()
    found = scan(path, dtype_of(vocab_size), vocab_size, digest)
    if found != tokens:
        raise UsageError(
            f"{path} holds {counted(found, 'token')} and meta.json says {tokens:,}; "
            f"delete {path.parent} and prepare it again"
        )
    if digest.hexdigest() != sha256:
        raise UsageError(
            f"{path} changed since it was prepared: sha256 {digest.hexdigest()[:8]}, in meta.json {sha256[:8]}; "
            f"delete {path.parent} and prepare it again"
        )
