"""Values in messages: the nearest known word, and the value itself, short."""

import difflib

import pytest

from fastgpt.errors import nearest, shown


@pytest.mark.parametrize(
    ("word", "said"),
    [("cosin", "; did you mean cosine?"), ("linaer", "; did you mean linear?"), ("qqqq", ""), ("", "")],
)
def test_the_nearest_word_is_named(word: str, said: str):
    assert nearest(word, ("cosine", "linear")) == said


def test_a_long_text_is_compared_with_nothing(monkeypatch):
    monkeypatch.setattr(difflib, "get_close_matches", lambda *rest, **named: pytest.fail("that takes a second"))
    assert nearest("cosine" * 1_000_000, ("cosine", "linear")) == ""


@pytest.mark.parametrize("value", ["it", 7, -1.5, None, ("a", "b"), "x" * 78])
def test_a_short_value_is_shown_whole(value: object):
    assert shown(value) == repr(value)


@pytest.mark.parametrize("value", ["x" * 79, "\0" * 500, "\n" * 10**6, 10**200, list(range(1000))])
def test_a_long_value_is_shown_by_its_ends(value: object):
    text = shown(value)
    assert len(text) == 83
    assert text.isprintable()
    assert text[:40] == repr(value)[:40]
    assert text[-40:] == repr(value)[-40:]


@pytest.mark.parametrize("value", [10**5000, (1, -(10**5000))], ids=["alone", "in a list"])
def test_a_number_that_python_does_not_write_out_is_shown(value: object):
    assert shown(value) == "(thousands of digits)"
