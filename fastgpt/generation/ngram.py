"""Guesses at the next tokens that cost nothing: what followed the last time that the text read like this.

Prompt lookup decoding (Saxena, 2023): the end of the text is looked up in the text itself, and the tokens that followed
are proposed. The model then checks them all in one forward pass (Leviathan et al., 2023): it goes on after the first
wrong one as if it had never been proposed.
"""


class NgramProposer:
    """Remembers where each run of `shortest` to `longest` tokens of one text last stood."""

    def __init__(self, longest: int = 4, shortest: int = 2):
        self.lengths = range(longest, shortest - 1, -1)
        self._next: dict[tuple[int, ...], int] = {}  # the place of the token that followed
        self._read = 0

    def propose(self, tokens: list[int], most: int) -> list[int]:
        """Up to `most` tokens that may follow `tokens`, which begin with those of the call before; often none."""
        if most < 1:
            return []
        for end in range(self._read, len(tokens)):
            for n in self.lengths:
                if end >= n:
                    self._next[tuple(tokens[end - n : end])] = end
        self._read = len(tokens)
        for n in self.lengths:
            place = self._next.get(tuple(tokens[-n:]))
            if place is not None and len(tokens) >= n:
                period = len(tokens) - place  # what would follow the text's own end is what was proposed before it
                return [tokens[place + i % period] for i in range(most)]
        return []
