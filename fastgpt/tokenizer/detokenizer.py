"""Turns tokens into text as they come: whole characters only, and no part of a stop text."""

import codecs
from collections.abc import Sequence

from fastgpt.tokenizer.base import Tokenizer

LONGEST_CHARACTER = 4  # bytes of a character in UTF-8; a token has at least one


class Detokenizer:
    """The text of one continuation as its tokens come.

    If the prompt's tokens end inside a character, the text begins with that character. So the prompt's whole characters
    and the text together are the text of all tokens.

    Attributes:
        text: all the text so far.
        stopped: a stop text was found, and no more text will come.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), prompt: Sequence[int] = ()):
        """`prompt`: the tokens before the continuation, or the last of them."""
        self.tokenizer, self.stop = tokenizer, [text for text in stop if text]
        self.stopped = False
        self._given: list[str] = []
        self._pending = ""  # may be the beginning of a stop text
        self._pushed = False
        before = b"".join(map(tokenizer.token_bytes, prompt[-LONGEST_CHARACTER:]))
        self._bytes = before[codecs.utf_8_decode(before, "replace")[1] :]  # the beginning of a character

    @property
    def text(self) -> str:
        return "".join(self._given)

    def push(self, token: int) -> str:
        """The text that this token adds, as far as no later token can change it."""
        if self.stopped:
            return ""
        self._pushed = True
        content = self._bytes + self.tokenizer.token_bytes(token)
        text, used = codecs.utf_8_decode(content, "replace")
        self._bytes = content[used:]
        if not self.stop:
            self._given.append(text)
            return text
        self._pending += text
        ends = [at for stop in self.stop if (at := self._pending.find(stop)) >= 0]
        if ends:
            self.stopped = True
            return self._give(min(ends))
        return self._give(len(self._pending) - _could_begin(self.stop, self._pending))

    def finish(self) -> str:
        """The text that was held back, after the last token."""
        if self.stopped or not self._pushed:
            return ""
        self._pending += self._bytes.decode("utf-8", "replace")
        return self._give(len(self._pending))

    def _give(self, count: int) -> str:
        piece, self._pending = self._pending[:count], self._pending[count:]
        self._given.append(piece)
        return piece


def _could_begin(stops: Sequence[str], text: str) -> int:
    """The number of last characters of `text` that may begin a stop text."""
    longest = max((len(stop) for stop in stops), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return length
    return 0
