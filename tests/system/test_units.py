"""Amounts are written as people read them."""

import pytest

from fastgpt.system.units import counted, format_duration


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


@pytest.mark.parametrize(
    ("seconds", "written"),
    [
        (0.0914, "91.4 ms"),
        (8.44, "8.4 s"),
        (59.96, "1 min 0 s"),
        (3599.4, "59 min 59 s"),
        (3599.6, "1 h 0 min"),
        (33_120, "9 h 12 min"),
        (86_399, "1 d 0 h"),
        (273_600, "3 d 4 h"),
        (400e6, "4,629 d 15 h"),
    ],
)
def test_a_duration_has_its_two_largest_units(seconds: float, written: str):
    assert format_duration(seconds) == written
