r"""Escape sequences in text that a shell passes on as it is: \n is a backslash and an n until it is read here."""

import re

from fastgpt.errors import UsageError, shown

ONE = {"n": "\n", "r": "\r", "t": "\t", "0": "\0", "\\": "\\"}
_ESCAPE = re.compile(r"\\(x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|.?)", re.DOTALL)
_MEANT = re.compile(r"\\(?:[nrt]|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4})")


def holds_escape(text: str) -> bool:
    """Whether a text spells an escape such as a line break's, and so was probably meant to hold that character."""
    return _MEANT.search(text) is not None


def unescaped(text: str, name: str) -> str:
    r"""The text with \n, \r, \t, \0, \\, \xHH, \uHHHH and \UHHHHHHHH read as the characters that they mean.

    Raises:
        UsageError: another escape, or no character of Unicode; `name` says where.
    """

    def character(match: re.Match[str]) -> str:
        spelled = match[1]
        if spelled in ONE:
            return ONE[spelled]
        code = int(spelled[1:], 16) if len(spelled) > 1 else -1
        if not 0 <= code <= 0x10FFFF or 0xD800 <= code <= 0xDFFF:
            raise UsageError(
                rf"{name} {shown(text)}: {match[0]} is no escape; known are \n, \r, \t, \0, \\, \xHH, \uHHHH and "
                r"\UHHHHHHHH"
            )
        return chr(code)

    return _ESCAPE.sub(character, text)
