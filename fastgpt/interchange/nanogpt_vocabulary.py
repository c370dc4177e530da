"""Reads meta.pkl, the vocabulary of a folder that nanoGPT prepared, without running any code of it.

nanoGPT keeps uint16 tokens in train.bin and val.bin and, for a character corpus, a pickled dictionary with
vocab_size, itos and stoi. Loading a pickle can run any code, or fill the memory from a few bytes, so
`vocabulary` first checks that the pickle is made of plain data alone, and then loads it without globals.
"""

import io
import pickle
from pathlib import Path
from typing import Any, NoReturn

from fastgpt.errors import UsageError
from fastgpt.system.files import regular
from fastgpt.tokenizer.char import CharTokenizer

DTYPE = "uint16"
LARGEST_META = 4 << 20  # bytes; 65,536 characters, all that uint16 holds, take about 2 MiB

# The pickle instructions that dictionaries, lists, strings and numbers are made of.
# fmt: off
_PLAIN = frozenset((
    "PROTO", "FRAME", "STOP", "MARK", "MEMOIZE",
    "PUT", "BINPUT", "LONG_BINPUT", "GET", "BINGET", "LONG_BINGET",
    "EMPTY_DICT", "DICT", "SETITEM", "SETITEMS", "EMPTY_LIST", "LIST", "APPEND", "APPENDS",
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE",
))
# fmt: on


def vocabulary(meta: Path) -> CharTokenizer:
    """The tokenizer of a meta.pkl, with the ids of that file.

    Raises:
        UsageError: the file is unreadable, larger than 4 MiB, not plain data, or no character vocabulary.
    """
    try:
        with regular(meta).open("rb") as file:
            data = file.read(LARGEST_META + 1)
        if len(data) > LARGEST_META:
            raise ValueError(f"it is larger than {LARGEST_META >> 20} MiB")
        _check_plain(data)
        return CharTokenizer(_characters(_PlainUnpickler(io.BytesIO(data)).load()))
    except OSError as error:
        raise UsageError(f"{meta} cannot be read: {error.strerror}") from None
    except Exception as error:  # a broken pickle may raise anything; none of it has run code
        reason = str(error) or type(error).__name__
        raise UsageError(
            f"{meta} is not nanoGPT's character vocabulary: {reason}; prepare the text itself with `dataset` PATH"
        ) from None


class _PlainUnpickler(pickle.Unpickler):
    """Refuses every global, and with it every class and function."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, and no code is loaded")


def _check_plain(data: bytes) -> None:
    import pickletools

    for instruction, argument, _ in pickletools.genops(data):
        if instruction.name not in _PLAIN:
            raise pickle.UnpicklingError(f"it holds {instruction.name}, which is no plain data")
        # A memo of n entries takes 8 n bytes at once, however short the pickle.
        if instruction.name.endswith("PUT") and not 0 <= int(argument or 0) < len(data):
            raise pickle.UnpicklingError(f"its memo entry {argument} is out of range")


def _characters(content: Any) -> str:
    itos = content["itos"] if isinstance(content, dict) and "itos" in content else None
    if not isinstance(itos, dict | list):
        raise ValueError("it has no table itos from ids to characters")
    if isinstance(itos, dict) and itos.keys() != set(range(len(itos))):
        raise ValueError(f"the ids of itos are not 0 to {len(itos) - 1}")
    characters = [itos[id] for id in range(len(itos))]
    if content.get("vocab_size", len(itos)) != len(itos):
        raise ValueError(f"vocab_size {content['vocab_size']} is not the number of itos' entries, {len(itos)}")
    if not all(isinstance(char, str) and len(char) == 1 for char in characters):
        raise ValueError("an entry of itos is not one character")
    return "".join(characters)
