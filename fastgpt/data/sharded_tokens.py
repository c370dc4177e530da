"""Reads the tokens of several files as one array.

A corpus of documents keeps the tokens of a split in shards: files such as train-00003.bin, one after another.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

NAME = "{split}-{number:05}.bin"
PATTERN = "train-[0-9][0-9][0-9][0-9][0-9]*.bin"


def holds_shards(folder: Path) -> bool:
    """Whether a folder holds shards of a train split."""
    return any(folder.glob(PATTERN))


class ShardedTokens:
    """The tokens (T,) of several files, which are mapped into memory and cannot be changed.

    Numbers, slices and arrays of positions of any shape select tokens as they do of an array of NumPy.

    Args:
        paths: the files, in order; none is empty.
        dtype: of the tokens, "uint16" or "uint32".
    """

    def __init__(self, paths: Sequence[Path], dtype: str):
        self.dtype = np.dtype(dtype)
        self._shards = [np.memmap(path, dtype=self.dtype, mode="r") for path in paths]
        self._ends = np.array(list(itertools.accumulate(map(len, self._shards))), dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice):
            start, stop, step = key.indices(len(self))
            return self._range(start, max(start, stop)) if step == 1 else self._at(np.arange(start, stop, step))
        positions = np.asarray(key)
        if positions.dtype.kind not in "iu":
            raise IndexError(f"tokens are selected by whole numbers, not by {positions.dtype}")
        return self._at(positions)[()]  # one number for one position

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(dtype or self.dtype)

    def _range(self, start: int, stop: int) -> np.ndarray:
        first, last = np.searchsorted(self._ends, (start, stop - 1), side="right")
        parts = []
        for number in range(first, min(int(last) + 1, len(self._shards)) if stop > start else first):
            begin = int(self._ends[number]) - len(self._shards[number])
            parts.append(self._shards[number][max(0, start - begin) : stop - begin])
        return np.concatenate(parts) if parts else np.empty(0, self.dtype)

    def _at(self, positions: np.ndarray) -> np.ndarray:
        """The tokens at positions of any shape; each shard is read once."""
        flat = positions.astype(np.int64).ravel()
        flat = np.where(flat < 0, flat + len(self), flat)
        if not flat.size:
            return np.empty(positions.shape, self.dtype)
        if not 0 <= flat.min() <= flat.max() < len(self):
            raise IndexError(f"a position is outside the {len(self):,} tokens")
        shards = np.searchsorted(self._ends, flat, side="right")
        order = np.argsort(shards, kind="stable")
        numbers, firsts = np.unique(shards[order], return_index=True)
        tokens = np.empty(flat.size, self.dtype)
        for number, places in zip(numbers, np.split(order, firsts[1:]), strict=True):
            shard = self._shards[number]
            tokens[places] = shard[flat[places] - (self._ends[number] - len(shard))]
        return tokens.reshape(positions.shape)
