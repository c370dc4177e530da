"""Reads texts from a range of a .jsonl file: of the lines that begin in it, which are JSON objects."""

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from fastgpt.errors import UsageError, shown
from fastgpt.system.json_files import kind_of, parse_object
from fastgpt.system.text_encoding import advice
from fastgpt.tokenizer.base import encoded

READ_BYTES = 1 << 20
BOM = b"\xef\xbb\xbf"


def texts(path: Path, start: int, stop: int, text_key: str) -> Iterator[str]:
    """The text under a key of each line that begins at bytes start .. stop - 1. Blank lines are left out.

    Raises:
        UsageError: the file cannot be read, or a line, which is named, is no object with a text under the key.
    """
    try:
        with path.open("rb") as file:
            if start:
                file.seek(start - 1)
                file.readline()  # the rest of a line that began before
            position = file.tell()
            while position < stop and (line := file.readline()):
                content = line.removeprefix(BOM) if position == 0 else line
                if content.strip():
                    try:
                        text = _text(content, text_key)
                    except ValueError as error:
                        number = _line_number(file, position)
                        raise UsageError(f"{path}, line {number:,} {error}") from None
                    yield text
                position += len(line)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}; make it readable, or leave it out") from None


def _text(line: bytes, text_key: str) -> str:
    """The text of a line. Raises `ValueError`, whose message continues the line's name."""
    try:
        content = line.decode("utf-8")
    except UnicodeDecodeError as error:
        place = f"byte {error.start:,} of the line (0x{line[error.start]:02x})"
        raise ValueError(f"is not UTF-8: {error.reason} at {place}; {advice(line)}") from None
    fields = parse_object(content, f'; each line is to be one, such as {{"{text_key}": "..."}}')
    if text_key not in fields:
        raise ValueError(f"has no {text_key!r}, only {shown(list(fields))}; name the key of the text by `text_key`")
    text = fields[text_key]
    if not isinstance(text, str):
        raise ValueError(f"has {kind_of(text)} under {text_key!r}, not text; name the key of the text by `text_key`")
    encoded(text, name=f"has text under {text_key!r} that")
    return text


def _line_number(file: BinaryIO, position: int) -> int:
    """The number, from 1, of the line that begins at a byte."""
    file.seek(0)
    number = 1
    while position > 0 and (data := file.read(min(position, READ_BYTES))):
        number += data.count(b"\n")
        position -= len(data)
    return number
