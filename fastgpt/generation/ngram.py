"""Guesses the next tokens from the text itself, without a model.

Prompt lookup decoding (Saxena, 2023): the last few tokens are looked up earlier in the text, and the tokens that
followed there are proposed. The model then checks all of them in one forward pass (Leviathan et al., 2023). After the
first wrong guess it continues as if nothing had been proposed.
"""


class NgramProposer:
    """Remembers the last place of each run of `shortest` to `longest` tokens of one text."""

    def __init__(self, longest: int = 4, shortest: int = 2):
        self.lengths = range(longest, shortest - 1, -1)
        self._next: dict[tuple[int, ...], int] = {}  # the place of the token that followed
        self._read = 0

    def propose(self, tokens: list[int], most: int) -> list[int]:
        """Up to `most` tokens that may follow `tokens`, often none. `tokens` must begin with those of the last call."""
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
                period = len(tokens) - place  # past its own end the text is taken to repeat
                return [tokens[place + i % period] for i in range(most)]
        return []
