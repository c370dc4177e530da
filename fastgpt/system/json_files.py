"""Reads JSON that may be damaged or hostile: files of a limited size, and lines that are objects."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastgpt.errors import UsageError
from fastgpt.system.files import regular

LARGEST = 64 << 20  # bytes of a file; GPT-2's vocabulary takes less than 1 MiB
NAMES = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}


def parse(content: str | bytes, whole: Callable[[str], float] = int) -> Any:
    """The content of a JSON text. Raises ValueError, whose message says what is wrong with it.

    Args:
        whole: makes a whole number of its digits.
    """
    try:
        return json.loads(content, parse_int=whole)
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise
    except ValueError:  # of int, which explains how to change Python's limit
        raise ValueError("it has a whole number of thousands of digits") from None
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def parse_object(line: str, wanted: str) -> dict[str, Any]:
    """The object in a line of JSON, in which a whole number of thousands of digits becomes an infinity.

    Args:
        wanted: follows "not an object" in the message if the line is something else.

    Raises:
        ValueError: the line holds none; the message continues the line's name.
    """
    try:
        found = parse(line, _whole)
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON: {error.msg} at column {error.colno:,}") from None
    except ValueError as error:
        raise ValueError(f"is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"is {kind_of(found)}, not an object{wanted}")
    return found


def kind_of(value: Any) -> str:
    """The kind of a value from JSON: "a list", "a number"."""
    return NAMES.get(type(value), "a number")


def read(path: Path, largest: int = LARGEST) -> Any:
    """The content of a JSON file of at most so many bytes.

    Raises:
        OSError: it cannot be read.
        ValueError: it is larger, or no JSON.
    """
    with regular(path).open("rb") as file:
        data = file.read(largest + 1)
    if len(data) > largest:
        raise ValueError(f"it is larger than {largest >> 20} MiB")
    return parse(data)


def read_object(path: Path, largest: int = LARGEST, refusal: type[UsageError] = UsageError) -> dict[str, Any]:
    """The object in a JSON file. Raises `refusal`, whose message names the file."""
    try:
        found = read(path, largest)
    except OSError as error:
        raise refusal(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise refusal(f"{path} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise refusal(f"{path} holds no JSON object")
    return found


def _whole(digits: str) -> int | float:
    try:
        return int(digits)
    except ValueError:  # thousands of digits
        return float(digits)
