"""The errors that a user can cause. `fastgpt.cli` prints each as one line and picks the exit code."""


class UsageError(ValueError):
    """Bad input: the message names the flag or file, the value, the limit, and the way out (exit code 2)."""


class CorruptCheckpoint(UsageError):
    """A checkpoint file that is missing, truncated or altered; the message names the file."""
