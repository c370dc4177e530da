"""Amounts are written as people read them."""

import pytest

from fastgpt.system.units import counted


@pytest.mark.parametrize(
    ("number", "noun", "written"),
    [
        (0, "thread", "0 threads"),
        (1, "thread", "1 thread"),
        (2000, "val token", "2,000 val tokens"),
        (1, "batch", "1 batch"),
        (3, "batch", "3 batches"),
        (2, "guess", "2 guesses"),
    ],
)
def test_a_noun_is_a_plural_unless_there_is_one(number: int, noun: str, written: str):
    assert counted(number, noun) == written
