"""Shared by GPT-2's tokenizer and a trained BPE: the cutting of texts, and the spelling of bytes in files."""

import functools
import re

# GPT-2 cuts a text by this pattern before it merges bytes: contractions, words, numbers, symbols, spaces.
# (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.2 and its encoder.)
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""

# Where a text may have a long run, the byte-pair libraries get it in pieces of at most 1,024 words: a run of a million
# spaces or letters would overflow their stack or turn quadratic. A piece ends after a word, where GPT-2's pattern cuts
# the text anyway, so the tokens are those of the whole text; only a run of spaces or of non-spaces longer than
# LONGEST_RUN is itself cut.
LONGEST_RUN = 4096
_RUN = f"{{1,{LONGEST_RUN}}}"
PIECES = re.compile(rf"(?:(?:\s{_RUN}+)?+\S{_RUN}+(?!\S)){{1,1024}}+|\S{_RUN}|\s{_RUN}")


def pieces(text: str) -> list[str]:
    """The text in pieces that are safe and fast to encode one by one: the text itself where it has no long run."""
    return PIECES.findall(text) if _may_have_long_run(text) else [text] if text else []


def _may_have_long_run(text: str) -> bool:
    """False for a text without a run longer than LONGEST_RUN. Fast: the first word of a window mostly answers.

    A longer run fills at least one of the windows that lie end to end, each half as long.
    """
    width = LONGEST_RUN // 2
    return any(
        (text.find(" ", at, at + width) < 0 and text.find("\n", at, at + width) < 0) or text[at : at + width].isspace()
        for at in range(0, len(text) - width + 1, width)
    )


@functools.cache
def _byte_alphabet() -> dict[int, int]:
    """From the visible characters, by which GPT-2's files and the tokenizers library spell the 256 bytes, to the bytes.

    Other characters below 256, which are no spelling, become one that is no byte.
    """
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [value for value in range(256) if value not in visible]
    return {256 + i: value for i, value in enumerate(others)} | dict.fromkeys(others, 256)


def bytes_of(spelled: str) -> bytes:
    """b' t' for 'Ġt'. Raises ValueError for a character outside the alphabet."""
    try:
        return spelled.translate(_byte_alphabet()).encode("latin-1")
    except UnicodeEncodeError:
        raise ValueError(f"{spelled!r} is no spelling of bytes") from None


def spelling_of(token: bytes) -> str:
    """The inverse of `bytes_of`: 'Ġt' for b' t'."""
    return token.decode("latin-1").translate(_spellings())


@functools.cache
def _spellings() -> dict[int, int]:
    return {value: character for character, value in _byte_alphabet().items() if value < 256}
