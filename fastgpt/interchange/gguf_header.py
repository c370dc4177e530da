"""Reads the header of a GGUF file: its metadata, and the place of each tensor.

The gguf library's own reader trusts the counts in a file, and a forged one keeps it busy for ever. Here no count is
followed further than the file reaches. (https://github.com/ggml-org/ggml, docs/gguf.md, versions 2 and 3.)
"""

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

MAGIC, VERSIONS = b"GGUF", (2, 3)
LARGEST_HEADER = 64 << 20  # bytes; that of GPT-2 takes less than 3 MiB
MOST_DIMENSIONS = 4  # of a tensor
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT, ARRAY = 8, 9
DEFAULT_ALIGNMENT = 32


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's shape, GGUF's number of its type, and its first byte, counted from that of all tensors' data."""

    shape: tuple[int, ...]
    type: int
    offset: int


@dataclass(frozen=True)
class Header:
    """All before the tensors' data.

    Attributes:
        values: the metadata's numbers and texts, by their keys.
        arrays: its lists of texts and arrays of numbers, by their keys.
        tensors: by their names in the file.
        data: where the tensors' data begins in the file.
    """

    values: dict[str, Any]
    arrays: dict[str, Any]
    tensors: dict[str, TensorInfo]
    data: int


def read(path: Path) -> Header:
    """The header of a file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no GGUF file, or its header is damaged.
    """
    with path.open("rb") as file:
        return _Reader(file).header()


class _Reader:
    """Takes values from a file, in their order, and never more bytes than it has."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._left = min(os.fstat(file.fileno()).st_size, LARGEST_HEADER)

    def header(self) -> Header:
        if self._left < len(MAGIC) or self._take(len(MAGIC)) != MAGIC:
            raise ValueError("it does not begin with GGUF")
        version = self._number("I")
        if version not in VERSIONS:
            hint = ", of big-endian numbers" if version & 0xFFFF == 0 else ""
            raise ValueError(f"its version is {version}{hint}; only 2 and 3 are read")
        tensors, entries = self._number("Q"), self._number("Q")
        values: dict[str, Any] = {}
        arrays: dict[str, Any] = {}
        for _ in range(entries):
            key, kind = self._text(), self._number("I")
            if kind == ARRAY:
                _add(arrays, key, self._array(self._number("I"), self._number("Q")))
            else:
                _add(values, key, self._value(kind))
        places: dict[str, TensorInfo] = {}
        for _ in range(tensors):
            _add(places, self._text(), self._tensor())
        alignment = values.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
            raise ValueError("its general.alignment is no power of two")
        return Header(values, arrays, places, -(-self._file.tell() // alignment) * alignment)

    def _take(self, count: int) -> bytes:
        if count > self._left:
            raise ValueError("it is cut off, or claims more than it has")
        self._left -= count
        data = self._file.read(count)
        if len(data) != count:
            raise ValueError("it was cut off while it was read")
        return data

    def _number(self, code: str) -> Any:
        (number,) = struct.unpack(f"<{code}", self._take(struct.calcsize(f"<{code}")))
        return number

    def _text(self) -> str:
        return self._take(self._number("Q")).decode()

    def _value(self, kind: int) -> Any:
        if kind in SCALARS:
            return self._number(SCALARS[kind])
        if kind == TEXT:
            return self._text()
        raise ValueError(f"it has a value of type {kind}, which GGUF does not define")

    def _array(self, kind: int, count: int) -> list[str] | np.ndarray:
        if kind in SCALARS:
            dtype = np.dtype(f"<{SCALARS[kind]}")
            return np.frombuffer(self._take(count * dtype.itemsize), dtype)
        if kind != TEXT:
            raise ValueError(f"it has an array of type {kind}, which is not supported")
        if count * 8 > self._left:  # the length of each
            raise ValueError("it is cut off, or claims more than it has")
        return [self._text() for _ in range(count)]

    def _tensor(self) -> TensorInfo:
        dimensions = self._number("I")
        if dimensions > MOST_DIMENSIONS:
            raise ValueError(f"it has a tensor of {dimensions} dimensions; GGUF has at most {MOST_DIMENSIONS}")
        shape = tuple(self._number("Q") for _ in range(dimensions))
        return TensorInfo(shape[::-1], self._number("I"), self._number("Q"))


def _add(entries: dict[str, Any], name: str, value: Any) -> None:
    if name in entries:
        raise ValueError(f"it has {name!r:.80} twice")
    entries[name] = value
