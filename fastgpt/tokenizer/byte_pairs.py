"""Shared by GPT-2's tokenizer and a trained BPE: the cutting of texts, and the spelling of bytes in files."""

import functools
import re

# GPT-2 cuts a text by this pattern before it merges bytes: contractions, words, numbers, symbols, spaces.
# (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.2 and its encoder.)
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""

# The byte-pair libraries get a text in pieces of at most 1,024 words: a run of a million spaces or letters
# would overflow their stack or turn quadratic, and long texts make them slow. A piece ends after a word,
# where GPT-2's pattern cuts the text anyway, so the tokens are those of the whole text; only a run of spaces
# or of non-spaces longer than LONGEST_RUN is itself cut.
LONGEST_RUN = 4096
_RUN = f"{{1,{LONGEST_RUN}}}"
PIECES = re.compile(rf"(?:(?:\s{_RUN}+)?+\S{_RUN}+(?!\S)){{1,1024}}+|\S{_RUN}|\s{_RUN}")


@functools.cache
def _byte_alphabet() -> dict[str, int]:
    """The visible characters by which GPT-2's files, and the tokenizers library, spell the 256 bytes."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [value for value in range(256) if value not in visible]
    return {chr(value): value for value in visible} | {chr(256 + i): value for i, value in enumerate(others)}


def bytes_of(spelled: str) -> bytes:
    """b' t' for 'Ġt'. Raises KeyError for a character outside the alphabet."""
    return bytes(_byte_alphabet()[char] for char in spelled)
