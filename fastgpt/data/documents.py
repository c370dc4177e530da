"""Finds and reads documents: of a folder of .txt, .jsonl and .parquet files, or of one such file.

A document is a text: a whole .txt file, or the text under a key in a line of a .jsonl file or a row of a .parquet file.
`parts` divides the files, so that several processes share the work. The parts depend on the files only: files, ranges
of lines and groups of rows, in order, together some 16 MiB. `read` yields the documents of a part.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fastgpt.data import json_lines, parquet
from fastgpt.data.sources import files_below, read_text
from fastgpt.errors import UsageError, shown

KINDS = (".txt", ".jsonl", ".parquet")
PART_BYTES = 16 << 20
READ_BYTES = 1 << 20

Document = Iterable[str]  # its text in pieces, which can be read several times


@dataclass(frozen=True)
class Range:
    """A part of a file: bytes start .. stop - 1, or of a .parquet file the groups of rows start .. stop - 1.

    The lines that begin in a range belong to it. `bytes` is its size.
    """

    path: Path
    start: int
    stop: int
    bytes: int


Part = tuple[Range, ...]


@dataclass(frozen=True)
class Source:
    """The files of documents, in the order of their relative paths; `others` counts files that are of no known kind."""

    name: str
    paths: tuple[Path, ...]
    others: int = 0

    def states(self) -> list[tuple[int, int]]:
        """Size and time of change of each file. Raises `UsageError` if one is gone."""
        return [_state(path) for path in self.paths]


@dataclass(frozen=True)
class FileText:
    """The text of a .txt file, which is read anew each time."""

    path: Path

    def __iter__(self) -> Iterator[str]:
        return read_text(self.path)


def find(source: str, skip: Path) -> Source:
    """The documents of a folder, the folder `skip` left out, or of one file.

    Raises:
        UsageError: there is nothing, or no file of a kind that is read.
    """
    path, kinds = Path(source), ", ".join(KINDS)
    if path.is_file():
        if _kind(path) not in KINDS:
            raise UsageError(f"`source` {source} is not one of {kinds}; prepare another text with `dataset` {source}")
        return Source(path.resolve().stem, (path,))
    if not path.is_dir():
        raise UsageError(
            f"`source` {shown(source)} is no file or folder; name documents ({kinds}), or a corpus by `dataset`"
        )
    try:
        found = sorted(files_below(path, skip), key=lambda file: file.relative_to(path).as_posix())
    except OSError as error:
        raise UsageError(f"`source` {source}: {error.filename} cannot be read: {error.strerror}") from None
    paths = tuple(file for file in found if _kind(file) in KINDS)
    if not paths:
        raise UsageError(
            f"`source` {source}: the folder holds no {kinds}; prepare other text files with `dataset` {source}"
        )
    return Source(path.resolve().name, paths, len(found) - len(paths))


def parts(source: Source, text_key: str) -> list[Part]:
    """All documents in order.

    Raises:
        UsageError: a file cannot be read, or a .parquet file is damaged or lacks the column.
    """
    return _packed(one for path in source.paths for one in _ranges(path, text_key))


def byte_parts(source: Source) -> list[Part]:
    """All bytes of the files in order, whatever their kind. Raises `UsageError` if a file cannot be read."""
    return _packed(one for path in source.paths for one in _byte_ranges(path, PART_BYTES))


def content_hash(part: Part) -> str:
    """The sha256 of a part's bytes, with the kinds of its files. Raises `UsageError` if a file cannot be read."""
    digest = hashlib.sha256()
    for one in part:
        digest.update(f"{_kind(one.path)} {one.start} {one.bytes}\n".encode())
        left = one.bytes
        try:
            with one.path.open("rb") as file:
                file.seek(one.start)
                while left and (data := file.read(min(left, READ_BYTES))):
                    digest.update(data)
                    left -= len(data)
        except OSError as error:
            raise _unreadable(one.path, error) from None
    return digest.hexdigest()


def size(part: Part) -> int:
    """The bytes of a part."""
    return sum(one.bytes for one in part)


def _packed(ranges: Iterable[Range]) -> list[Part]:
    """Ranges in parts of at most `PART_BYTES`, except that a range is not divided."""
    found: list[list[Range]] = []
    room = 0
    for one in ranges:
        if one.bytes > room or not found:
            found.append([])
            room = PART_BYTES
        found[-1].append(one)
        room -= one.bytes
    return list(map(tuple, found))


def read(part: Part, text_key: str) -> Iterator[Document]:
    """The documents of a part. Raises `UsageError`, naming file and place, for what is no document."""
    for one in part:
        if _kind(one.path) == ".txt":
            yield FileText(one.path)
        elif _kind(one.path) == ".jsonl":
            for text in json_lines.texts(one.path, one.start, one.stop, text_key):
                yield (text,)
        else:
            for text in parquet.texts(one.path, one.start, text_key):
                yield (text,)


def _ranges(path: Path, text_key: str) -> list[Range]:
    if _kind(path) == ".parquet":
        return [Range(path, at, at + 1, size) for at, size in enumerate(parquet.group_bytes(path, text_key))]
    return _byte_ranges(path, PART_BYTES if _kind(path) == ".jsonl" else None)


def _byte_ranges(path: Path, step: int | None) -> list[Range]:
    """The bytes of a file in ranges of `step`, or whole."""
    size, _ = _state(path)
    starts = range(0, size, step or size or 1)
    return [Range(path, at, min(at + starts.step, size), min(starts.step, size - at)) for at in starts]


def _kind(path: Path) -> str:
    return path.suffix.lower()


def _state(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError as error:
        raise _unreadable(path, error) from None
    return status.st_size, status.st_mtime_ns


def _unreadable(path: Path, error: OSError) -> UsageError:
    return UsageError(f"{path} cannot be read: {error.strerror}; make it readable, or leave it out")
