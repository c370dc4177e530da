"""Tokens to text, piece by piece: whole characters only, and nothing of a stop text."""

import codecs
from collections.abc import Sequence

from fastgpt.tokenizer import Tokenizer

LONGEST_CHARACTER = 4  # bytes of a character in UTF-8; a token has at least one


class Detokenizer:
    """The text of one continuation as its tokens come.

    Where the prompt's tokens end inside a character, the text begins with that character: what the whole characters of
    the prompt and the text say together is what all tokens say.

    Attributes:
        text: what was given out so far.
        stopped: a stop text was met, and nothing more will come.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), prompt: Sequence[int] = ()):
        """`prompt`: the tokens before the continuation, or the last of them."""
        self.tokenizer, self.stop = tokenizer, [text for text in stop if text]
        self.stopped = False
        self._given: list[str] = []
        self._bytes = b""  # the beginning of a character
        self._pending = ""  # may be the beginning of a stop text
        self._pushed = False
        for token in prompt[-LONGEST_CHARACTER:]:
            self._decode(token)  # what is whole is the prompt's

    @property
    def text(self) -> str:
        return "".join(self._given)

    def push(self, token: int) -> str:
        """What can be given out after this token: text that no later token changes."""
        if self.stopped:
            return ""
        self._pushed = True
        if not self.stop:
            self._given.append(piece := self._decode(token))
            return piece
        self._pending += self._decode(token)
        ends = [at for stop in self.stop if (at := self._pending.find(stop)) >= 0]
        if ends:
            self.stopped = True
            return self._give(min(ends))
        return self._give(len(self._pending) - _could_begin(self.stop, self._pending))

    def finish(self) -> str:
        """What was held back, after the last token."""
        if self.stopped or not self._pushed:
            return ""
        self._pending += self._bytes.decode("utf-8", "replace")
        return self._give(len(self._pending))

    def _decode(self, token: int) -> str:
        """The characters that end with this token."""
        content = self._bytes + self.tokenizer.token_bytes(token)
        text, used = codecs.utf_8_decode(content, "replace", False)
        self._bytes = content[used:]
        return text

    def _give(self, count: int) -> str:
        piece, self._pending = self._pending[:count], self._pending[count:]
        self._given.append(piece)
        return piece


def _could_begin(stops: Sequence[str], text: str) -> int:
    """How many last characters of `text` may be the beginning of a stop text."""
    longest = max((len(stop) for stop in stops), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return length
    return 0
