"""The errors that a user can cause. `fastgpt.cli` prints each as one line and picks the exit code.

`nearest` and `shown` are for their messages: what was probably meant, and a value however long it is.
"""

import difflib
from collections.abc import Iterable, Sequence

LONGEST_SHOWN = 80  # characters of a value in a message


class UsageError(ValueError):
    """Bad input: the message names the flag or file, the value, the limit, and the way out (exit code 2)."""


class UsageErrors(UsageError):
    """Several at once, each of which is told in a line of its own.

    Attributes:
        errors: they themselves.
    """

    def __init__(self, errors: Sequence[UsageError]):
        super().__init__("\n".join(map(str, errors)))
        self.errors = errors


class RunFailed(RuntimeError):
    """A run that cannot go on, through no fault of the input; the message says why and what to do (exit code 1)."""


class CorruptCheckpoint(UsageError):
    """A checkpoint file that is missing, truncated or altered; the message names the file."""


def nearest(word: str, known: Iterable[str]) -> str:
    """'; did you mean x?' for the known word that is most like `word`, or ''."""
    if len(word) > LONGEST_SHOWN:  # like nothing that is known, and slow to compare
        return ""
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {match[0]}?" if match else ""


def shown(value: object) -> str:
    """A value as Python writes it, without its middle where it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no whole number of more than 4,300 digits
        return "(thousands of digits)"
    half = LONGEST_SHOWN // 2
    return text if len(text) <= LONGEST_SHOWN else f"{text[:half]}...{text[-half:]}"
