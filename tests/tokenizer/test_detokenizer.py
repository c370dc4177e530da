"""Tokens to text: whole characters only, and nothing of a stop text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt.tokenizer.byte import ByteTokenizer
from fastgpt.tokenizer.detokenizer import Detokenizer


def pieces(content: bytes, stop: tuple[str, ...] = ()) -> list[str]:
    """What a byte model gives out that says these bytes."""
    detokenizer, found = Detokenizer(ByteTokenizer(), stop), []
    for byte in content:
        found.append(detokenizer.push(byte))
    found.append(detokenizer.finish())
    assert detokenizer.text == "".join(found)
    return [piece for piece in found if piece]


@settings(deadline=None, max_examples=200)
@given(text=st.text("abé", max_size=12), stops=st.lists(st.text("abé", max_size=4), max_size=3))
def test_text_ends_before_the_first_stop_text_and_no_part_of_it_leaks(text: str, stops: list[str]):
    meant = [stop for stop in stops if stop]  # an empty one stops nothing
    ends = [end for end in range(len(text) + 1) if any(stop in text[:end] for stop in meant)]
    said = text[: ends[0]] if ends else text
    wanted = said[: min(said.find(stop) for stop in meant if stop in said)] if ends else said
    assert "".join(pieces(text.encode(), tuple(stops))) == wanted


@pytest.mark.parametrize("cut", range(1, 13))
def test_a_continuation_begins_with_the_character_in_which_its_prompt_ends(cut: int):
    """Whatever was said before the cut, and wherever in a character of one to four bytes it is."""
    content = "aß€😀é가".encode()
    whole = len(content[:cut].decode(errors="ignore").encode())
    for first in (0, max(0, cut - 4)):
        detokenizer = Detokenizer(ByteTokenizer(), prompt=list(content[first:cut]))
        said = "".join(detokenizer.push(byte) for byte in content[cut:]) + detokenizer.finish()
        assert said == detokenizer.text == content[whole:].decode()


def test_a_prompts_character_that_is_not_completed_is_the_texts():
    half = list("가".encode()[:2])
    for rest, wanted in ((b"a", "\ufffda"), (b"\x80b", "\uac00b"), (b"", "")):
        detokenizer = Detokenizer(ByteTokenizer(), prompt=half)
        assert "".join(detokenizer.push(byte) for byte in rest) + detokenizer.finish() == wanted
    detokenizer = Detokenizer(ByteTokenizer(), ["\uac00"], prompt=half)
    assert (detokenizer.push(0x80), detokenizer.stopped) == ("", True)


def test_it_says_when_it_stopped_and_is_silent_then():
    detokenizer = Detokenizer(ByteTokenizer(), ["b"])
    assert [detokenizer.push(byte) for byte in b"ab"] == ["a", ""]
    assert detokenizer.stopped
    assert detokenizer.push(ord("c")) == detokenizer.finish() == ""
    assert detokenizer.text == "a"


def test_text_that_may_become_a_stop_text_comes_once_it_cannot():
    assert pieces(b"xabxabc", ("abc",)) == ["x", "abx"]
    assert pieces(b"xab", ("abc",)) == ["x", "ab"]


def test_characters_of_many_bytes_come_whole():
    text = "aß€😀 é"
    assert pieces(text.encode()) == [*text]
    assert pieces(b"a\xe2\x82") == ["a", "\ufffd"]
    assert pieces(b"\xc3a") == ["\ufffda"]
