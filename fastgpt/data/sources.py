"""Reads the texts of corpora: Python's manual, tiny Shakespeare, a file, a folder of files.

A `Source` yields its text in pieces, as often as asked, so that a text larger than memory can be read twice. `pydocs`,
`shakespeare` and `text_files` make one, and `read_text` reads UTF-8 strictly. `span` takes a part of a text, and
`chunks` cuts it where tokens end. Between documents stands None if the vocabulary has a token for that, else a newline.
"""

import codecs
import hashlib
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fastgpt.data.sharded_tokens import holds_shards
from fastgpt.errors import UsageError
from fastgpt.system.bars import MB, bar
from fastgpt.system.caches import cache_dir
from fastgpt.system.files import sha256, write_atomic
from fastgpt.system.text_encoding import advice, without_bom

READ_BYTES = 1 << 20
CHUNK = 1 << 20  # characters that are encoded at a time

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SHAKESPEARE_BYTES = 1_115_394
TIMEOUT_SECONDS = 20

Piece = str | None  # of a text; None is the end of a document


class Source(Protocol):
    """A named text that can be read from its start any number of times."""

    @property
    def name(self) -> str: ...

    def texts(self) -> Iterator[Piece]:
        """The text in order, in pieces that fit in memory. Raises `UsageError` where it is not UTF-8."""
        ...


@dataclass(frozen=True)
class Text:
    """A text in memory."""

    name: str
    text: str

    def texts(self) -> Iterator[Piece]:
        yield self.text


@dataclass(frozen=True)
class TextFiles:
    """The texts of files, one after another. A newline is added between two if the first does not end in one.

    Args:
        ended: files are documents: None follows each that is not empty, and no newline is added.
        keep_bom: a byte order mark is part of the text.
    """

    name: str
    paths: tuple[Path, ...]
    ended: bool = False
    keep_bom: bool = False

    def texts(self) -> Iterator[Piece]:
        last = "\n"
        for path in self.paths:
            starts = True
            for text in read_text(path, keep_bom=self.keep_bom):
                if starts and last != "\n" and not self.ended:
                    yield "\n"
                starts, last = False, text[-1]
                yield text
            if self.ended and not starts:
                yield None


def pydocs() -> Text:
    """The topics of Python's own manual, about 465,000 characters. The text depends on the Python version."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UsageError(
            "`dataset` pydocs: this Python has no pydoc_data; use `dataset` shakespeare or `dataset` PATH"
        ) from None
    return Text("pydocs", "\n".join(topics.values()))


def shakespeare(corpus_file: str | Path | None = None, *, quiet: bool = False, download: bool = True) -> TextFiles:
    """Tiny Shakespeare from `corpus_file`, else from the cache, else from its public address, and then cached.

    Args:
        download: False raises instead of downloading.

    Raises:
        UsageError: the file is missing, its checksum is not tiny Shakespeare's, or there is no network.
    """
    path = Path(corpus_file) if corpus_file is not None else cache_dir() / "tinyshakespeare.txt"
    if corpus_file is not None and not path.is_file():
        raise UsageError(f"`corpus_file` {corpus_file}: no such file")
    if not path.is_file() and not download:
        raise UsageError(
            f"`dataset` shakespeare is not at {path}, and a dry run downloads nothing; pass `corpus_file` PATH, or use "
            "`dataset` pydocs"
        )
    if not path.is_file():
        _download(path, quiet)
    try:
        found = sha256(path)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    if found != SHAKESPEARE_SHA256:
        fix = "for another text use `dataset` PATH" if corpus_file is not None else "delete it to download it again"
        raise UsageError(f"{path} is not tiny Shakespeare: sha256 expected {SHAKESPEARE_SHA256}, got {found}; {fix}")
    return TextFiles("shakespeare", (path,))


def text_files(path: Path, skip: Path | None = None, *, as_before: bool = False) -> TextFiles:
    """A file, or every file below a folder in the order of their relative paths.

    Links are followed. A folder that several paths lead to is read once, by the path without links if there is one.
    Hidden files and folders, folders of prepared tokens (with a train.bin) and the folder `skip` are left out.

    Args:
        as_before: leave linked folders out and keep byte order marks, as version 0.1.0 did.

    Raises:
        UsageError: neither a file nor a folder, a folder that has no files or cannot be read, or a broken link.
    """
    name = path.resolve().stem if path.is_file() else path.resolve().name
    if path.is_file():
        _check_text(path)
        return TextFiles(name, (path,), keep_bom=as_before)
    if not path.is_dir():
        raise UsageError(f"`dataset` {path} is neither a regular file nor a folder; give the text's own path")
    try:
        found = sorted(files_below(path, skip, as_before), key=lambda file: file.relative_to(path).as_posix())
    except OSError as error:
        raise UsageError(
            f"`dataset` {path}: {error.filename} cannot be read: {error.strerror}; make it readable, or leave it out"
        ) from None
    if not found:
        raise UsageError(
            f"`dataset` {path}: the folder holds no text file; hidden files are not read, name them by `dataset`"
        )
    return TextFiles(name, tuple(found), keep_bom=as_before)


def _check_text(path: Path) -> None:
    """Raise `UsageError` for a file of documents that is no text, and say on stderr that the lines of one are JSON."""
    way_out = f"prepare its documents first, by: python -m fastgpt.prepare {path}"
    if path.suffix.lower() == ".parquet":
        raise UsageError(f"`dataset` {path} is a Parquet file, no text; {way_out}")
    if path.suffix.lower() == ".jsonl":
        print(f"warning: `dataset` {path} is read as plain text, its JSON included; {way_out}", file=sys.stderr)


def files_below(root: Path, skip: Path | None, as_before: bool = False) -> Iterator[Path]:
    """The files that `text_files` reads below a folder. Raises `OSError`, and `UsageError` for a broken link."""
    folders, linked, seen = [root], [], set()
    while folders or linked:
        folder = folders.pop() if folders else linked.pop(0)
        status = folder.stat()
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(folder) as entries:
            visible = sorted(entry.name for entry in entries if entry.name[0] != ".")
        for path in (folder / name for name in visible):
            if path.is_dir():
                if (path.is_symlink() and as_before) or _is_left_out(path, skip):
                    continue
                (linked if path.is_symlink() else folders).append(path)
            elif path.is_file():
                yield path
            elif path.is_symlink() and not path.exists() and not as_before:
                raise UsageError(f"{path} is a link to nothing; restore {path.readlink()}, or delete the link")


def _is_left_out(folder: Path, skip: Path | None) -> bool:
    return (
        (folder / "train.bin").exists()
        or holds_shards(folder)
        or (skip is not None and folder.resolve() == skip.resolve())
    )


def read_text(path: Path, *, keep_bom: bool = False) -> Iterator[str]:
    """A file's text in non-empty pieces, without a byte order mark at its beginning. Line ends are kept.

    Raises:
        UsageError: the file cannot be read, is not UTF-8, or holds a NUL byte and so is no text. The message names byte
            offset (from 0) and line (from 1).
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    position = newlines = 0
    starts = not keep_bom
    try:
        with path.open("rb") as file:
            while True:
                block = file.read(READ_BYTES)
                if (nul := block.find(b"\0")) >= 0:
                    line = newlines + block.count(b"\n", 0, nul) + 1
                    raise UsageError(
                        f"{path} is not text: byte {position + nul:,} (line {line:,}) is NUL, as in binary files and "
                        "UTF-16; leave it out, or convert it with: iconv -f UTF-16 -t UTF-8"
                    )
                held = len(decoder.getstate()[0])  # bytes of a character that the last block cut
                text = decoder.decode(block, final=not block)
                if starts and text:
                    starts, text = False, without_bom(text)
                if text:
                    yield text
                if not block:
                    return
                position += len(block)
                newlines += block.count(b"\n")
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        offset = position - held + error.start
        line = newlines + error.object.count(b"\n", 0, error.start) + 1
        raise UsageError(
            f"{path} is not UTF-8: {error.reason} at byte {offset:,} (0x{error.object[error.start]:02x}, "
            f"line {line:,}); {advice(error.object)}"
        ) from None


def span(pieces: Iterable[Piece], start: int, end: int = sys.maxsize) -> Iterator[Piece]:
    """Characters start .. end - 1 of a text in pieces, with the ends of documents between them."""
    position = 0
    for piece in pieces:
        if piece is None:
            if start < position <= end:
                yield None
            continue
        if position >= end:
            return
        part = piece[max(start - position, 0) : end - position]
        if part:
            yield part
        position += len(piece)


def chunks(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """The same text in chunks of at most `CHUNK` characters, whose ends depend on the text only.

    A chunk ends with its document, or before the last newline that follows a word, else before the last such space.
    GPT-2's pattern never joins a word to the space after it, so chunks give the same tokens as the whole document.
    """
    rest = ""
    for piece in pieces:
        if piece is None:
            if rest:
                yield rest
            yield None
            rest = ""
            continue
        rest += piece
        while len(rest) > CHUNK:
            end = _chunk_end(rest)
            yield rest[:end]
            rest = rest[end:]
    if rest:
        yield rest


def _chunk_end(text: str) -> int:
    for space in ("\n", " "):
        end = len(text[: max(text.rfind(space, 0, CHUNK), 0)].rstrip())
        if end:
            return end
    return CHUNK


def _download(path: Path, quiet: bool) -> None:
    """Download tiny Shakespeare, check it, and put it into the cache whole."""
    import http.client
    import urllib.error
    import urllib.request

    ways_out = f"pass `corpus_file` PATH, put the file at {path}, or use `dataset` pydocs"
    data = bytearray()
    try:
        with (
            urllib.request.urlopen(SHAKESPEARE_URL, timeout=TIMEOUT_SECONDS) as response,
            bar("tiny Shakespeare", SHAKESPEARE_BYTES, MB, quiet=quiet) as advance,
        ):
            while len(data) <= SHAKESPEARE_BYTES and (block := response.read(1 << 16)):
                data += block
                advance(len(block))
    except (OSError, http.client.HTTPException) as error:  # URLError, HTTPError and timeouts are OSErrors
        reason = error.reason if type(error) is urllib.error.URLError else error
        raise UsageError(f"`dataset` shakespeare cannot be downloaded ({reason}); {ways_out}") from None
    found = hashlib.sha256(data).hexdigest()
    if found != SHAKESPEARE_SHA256:
        raise UsageError(
            f"`dataset` shakespeare: {SHAKESPEARE_URL} sent another text: sha256 expected "
            f"{SHAKESPEARE_SHA256}, got {found}; {ways_out}"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, bytes(data))
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}; set FASTGPT_CACHE, or {ways_out}") from None
