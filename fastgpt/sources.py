"""Where a corpus's text comes from: Python's manual, tiny Shakespeare, a file, a folder of files.

A `Source` yields its text piece by piece, as often as asked, so that a text larger than memory can be read
twice. `pydocs`, `shakespeare` and `text_files` make one; `read_text` is the strict UTF-8 reader beneath;
`span` and `chunks` take a part of a text, and cut it where tokens end.
"""

import codecs
import hashlib
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fastgpt.errors import UsageError
from fastgpt.files import sha256, write_atomic
from fastgpt.tokenizer import cache_dir

READ_BYTES = 1 << 20
CHUNK = 1 << 20  # characters that are encoded at a time

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SHAKESPEARE_BYTES = 1_115_394
TIMEOUT_SECONDS = 20


class Source(Protocol):
    """A named text that can be read from its start any number of times."""

    @property
    def name(self) -> str: ...

    def texts(self) -> Iterator[str]:
        """The text in order, in pieces that fit in memory. Raises `UsageError` where it is not UTF-8."""
        ...


@dataclass(frozen=True)
class Text:
    """A text in memory."""

    name: str
    text: str

    def texts(self) -> Iterator[str]:
        yield self.text


@dataclass(frozen=True)
class TextFiles:
    """The files' text one after another, with a newline between two where the first does not end in one."""

    name: str
    paths: tuple[Path, ...]

    def texts(self) -> Iterator[str]:
        last = "\n"
        for path in self.paths:
            starts = True
            for text in read_text(path):
                if starts and last != "\n":
                    yield "\n"
                starts, last = False, text[-1]
                yield text


def pydocs() -> Text:
    """The topics of Python's own manual, about 465,000 characters; the text differs by Python version."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UsageError(
            "--dataset pydocs: this Python has no pydoc_data; use --dataset shakespeare or --dataset PATH"
        ) from None
    return Text("pydocs", "\n".join(topics.values()))


def shakespeare(corpus_file: str | Path | None = None, *, quiet: bool = False) -> TextFiles:
    """Tiny Shakespeare from `corpus_file`, else the cache, else its public address (then cached).

    Raises:
        UsageError: the file is missing, its checksum is not tiny Shakespeare's, or there is no network.
    """
    path = Path(corpus_file) if corpus_file is not None else cache_dir() / "tinyshakespeare.txt"
    if corpus_file is not None and not path.is_file():
        raise UsageError(f"--corpus_file {corpus_file}: no such file")
    if not path.is_file():
        _download(path, quiet)
    try:
        found = sha256(path)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    if found != SHAKESPEARE_SHA256:
        fix = "for another text use --dataset PATH" if corpus_file is not None else "delete it to download it again"
        raise UsageError(f"{path} is not tiny Shakespeare: sha256 expected {SHAKESPEARE_SHA256}, got {found}; {fix}")
    return TextFiles("shakespeare", (path,))


def text_files(path: Path, skip: Path | None = None) -> TextFiles:
    """A file, or every file below a folder in the order of their relative paths.

    Hidden files and folders, folders of prepared tokens (they hold a train.bin) and the folder `skip` are
    left out.

    Raises:
        UsageError: neither a file nor a folder, or a folder without files.
    """
    name = path.resolve().stem if path.is_file() else path.resolve().name
    if path.is_file():
        return TextFiles(name, (path,))
    if not path.is_dir():
        raise UsageError(f"--dataset {path} is neither a regular file nor a folder; give the text's own path")
    found = []
    try:
        for folder, folders, files in os.walk(path, onerror=_raise):
            here = Path(folder)
            folders[:] = [f for f in folders if f[0] != "." and not _is_left_out(here / f, skip)]
            found += [here / file for file in files if file[0] != "." and (here / file).is_file()]
    except OSError as error:
        raise UsageError(f"--dataset {path}: {error.filename} cannot be read: {error.strerror}") from None
    if not found:
        raise UsageError(f"--dataset {path}: the folder holds no text file; hidden files are not read")
    return TextFiles(name, tuple(sorted(found, key=lambda file: file.relative_to(path).as_posix())))


def _raise(error: OSError) -> None:
    raise error


def _is_left_out(folder: Path, skip: Path | None) -> bool:
    return (folder / "train.bin").exists() or (skip is not None and folder.resolve() == skip.resolve())


def read_text(path: Path) -> Iterator[str]:
    """A file's text as it is, in non-empty pieces; line ends are kept.

    Raises:
        UsageError: the file cannot be read, is not UTF-8, or holds a NUL byte and so is no text; byte offset (from 0)
            and line (from 1) are named.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    position = newlines = 0
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
            f"line {line:,}); convert it to UTF-8 first"
        ) from None


def span(texts: Iterable[str], start: int, end: int = sys.maxsize) -> Iterator[str]:
    """Characters start .. end - 1 of a text that comes in pieces."""
    position = 0
    for text in texts:
        part = text[max(start - position, 0) : max(end - position, 0)]
        if part:
            yield part
        position += len(text)
        if position >= end:
            return


def chunks(texts: Iterable[str]) -> Iterator[str]:
    """The same text in chunks of at most `CHUNK` characters, whose ends depend on nothing but the text.

    A chunk ends before the last newline, else the last space, that follows a word. GPT-2's pattern never
    joins a word to the space after it, so chunks give the tokens that the text in one piece would give.
    """
    rest = ""
    for text in texts:
        rest += text
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
    """Fetch tiny Shakespeare into the cache: checked, then put in place in one step."""
    import http.client
    import urllib.error
    import urllib.request

    from rich.console import Console
    from rich.progress import Progress

    ways_out = f"pass --corpus_file PATH, put the file at {path}, or use --dataset pydocs"
    data = bytearray()
    try:
        with (
            urllib.request.urlopen(SHAKESPEARE_URL, timeout=TIMEOUT_SECONDS) as response,
            Progress(console=Console(stderr=True), disable=quiet) as progress,
        ):
            task = progress.add_task("tiny Shakespeare", total=SHAKESPEARE_BYTES)
            while len(data) <= SHAKESPEARE_BYTES and (block := response.read(1 << 16)):
                data += block
                progress.advance(task, len(block))
    except (OSError, http.client.HTTPException) as error:  # URLError, HTTPError and timeouts are OSErrors
        reason = error.reason if type(error) is urllib.error.URLError else error
        raise UsageError(f"--dataset shakespeare cannot be downloaded ({reason}); {ways_out}") from None
    found = hashlib.sha256(data).hexdigest()
    if found != SHAKESPEARE_SHA256:
        raise UsageError(
            f"--dataset shakespeare: {SHAKESPEARE_URL} sent another text: sha256 expected "
            f"{SHAKESPEARE_SHA256}, got {found}; {ways_out}"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, bytes(data))
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}; set FASTGPT_CACHE, or {ways_out}") from None
