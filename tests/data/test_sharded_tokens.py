"""Several files of tokens select as one array of NumPy does."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from fastgpt.data.sharded_tokens import ShardedTokens

SIZES = (1, 5, 2, 30, 3)


@pytest.fixture(params=["uint16", "uint32"])
def both(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[ShardedTokens, np.ndarray]:
    random = np.random.default_rng(0)
    parts = [random.integers(0, 60_000, size).astype(request.param) for size in SIZES]
    paths = [tmp_path / f"{number}.bin" for number in range(len(parts))]
    for path, part in zip(paths, parts, strict=True):
        part.tofile(path)
    return ShardedTokens(paths, request.param), np.concatenate(parts)


def test_slices(both):
    tokens, array = both
    bounds = [None, *range(-45, 46, 3), -1, 1, 41]
    for start, stop, step in itertools.product(bounds, bounds, (None, 1, 2, -1, -7)):
        found, wanted = tokens[start:stop:step], array[start:stop:step]
        assert found.dtype == wanted.dtype
        assert found.tolist() == wanted.tolist(), (start, stop, step)


@pytest.mark.parametrize("shape", [(), (1,), (0,), (7,), (4, 9), (2, 0, 3), (3, 5, 2)])
def test_positions_of_any_shape(both, shape: tuple[int, ...]):
    tokens, array = both
    positions = np.random.default_rng(1).integers(-len(array), len(array), shape)
    assert np.array_equal(tokens[positions], array[positions])
    assert tokens[positions].shape == shape


def test_whole(both):
    tokens, array = both
    assert (len(tokens), tokens.dtype) == (sum(SIZES), array.dtype)
    assert list(tokens) == array.tolist()
    assert np.asarray(tokens).tolist() == array.tolist()
    assert [tokens[at] for at in (0, 1, 40, -1, -41)] == [array[at] for at in (0, 1, 40, -1, -41)]


@pytest.mark.parametrize("key", [41, -42, [0, 41], "a", 1.0, np.array([True])])
def test_other_keys_are_refused(both, key: object):
    with pytest.raises(IndexError, match=r"outside the 41 tokens|selected by whole numbers"):
        both[0][key]


def test_files_cannot_be_changed(both):
    tokens, array = both
    tokens[:1][0] = tokens[:10][:] = 7  # copies
    assert np.asarray(tokens).tolist() == array.tolist()
