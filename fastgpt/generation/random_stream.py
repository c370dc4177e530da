"""Gives each continuation its own random numbers, which do not depend on what is computed beside it.

They are counter-based, as in Salmon et al. (2011), "Parallel Random Numbers: As Easy as 1, 2, 3", section 2. The number
of a token is a hash (BLAKE2b, RFC 7693) of the continuation's key and the token's place. The key is a hash of the
prompt's tokens, the seed, the prompt's number among equal ones, and the number of the continuation. So two
continuations draw independent numbers.
"""

import struct
from collections import Counter
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

DIGEST_BYTES = 16


def prompt_digest(tokens: Sequence[int]) -> bytes:
    """The hash of all tokens of a prompt, also of those that a sliding window leaves behind."""
    return blake2b(np.asarray(tokens, dtype="<i8").tobytes(), digest_size=DIGEST_BYTES).digest()


def stream_key(prompt: bytes, seed: int, occurrence: int = 0, sample: int = 0) -> bytes:
    """The key of a continuation.

    Args:
        prompt: `prompt_digest` of its prompt.
        occurrence: the prompt's number among equal ones; see `Occurrences`.
        sample: the number of the continuation among those of the prompt.
    """
    return blake2b(prompt + struct.pack("<QQQ", seed, occurrence, sample), digest_size=DIGEST_BYTES).digest()


def uniform(key: bytes, index: int) -> float:
    """The number in [0, 1) of token `index`: 24 bits, so that float32 holds it exactly and never rounds to 1."""
    digest = blake2b(key + struct.pack("<Q", index), digest_size=3).digest()
    return int.from_bytes(digest, "little") / 2**24


class Occurrences:
    """Numbers equal prompts with equal seeds in the order in which they are given: 0, 1, 2, ..."""

    def __init__(self) -> None:
        self._given: Counter[tuple[bytes, int]] = Counter()

    def number(self, prompt: bytes, seed: int) -> int:
        """The number of equal prompts that came before; `prompt` is a `prompt_digest`."""
        self._given[prompt, seed] += 1
        return self._given[prompt, seed] - 1
