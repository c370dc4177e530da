"""Reads nanoGPT's vocabularies: meta.pkl of a folder that it prepared, without running any code of it, or GPT-2's own.

nanoGPT keeps uint16 tokens in train.bin and val.bin and, for a character corpus, a pickled dictionary with
vocab_size, itos and stoi. Loading a pickle can run any code, or fill the memory from a few bytes, so
`vocabulary` first checks that the pickle is made of plain data alone, and then loads it without globals.
"""

import io
import pickle
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath
from typing import Any, NoReturn

from fastgpt.errors import UsageError
from fastgpt.system.files import absolute, regular
from fastgpt.tokenizer.base import Tokenizer
from fastgpt.tokenizer.char import CharTokenizer
from fastgpt.tokenizer.gpt2 import Gpt2Tokenizer

META, DATA = "meta.pkl", "data"  # the vocabulary's file, and nanoGPT's folder of prepared folders
DTYPE = "uint16"
GPT2_SIZES = (Gpt2Tokenizer.fixed_size(True), 50_304)  # tokens; the second is nanoGPT's, padded to a multiple of 64
LARGEST_META = 4 << 20  # bytes; 65,536 characters, all that uint16 holds, take about 2 MiB
PREPARE = "prepare the text itself with `dataset` PATH"  # what helps against a bad one in a prepared folder
COPY = "copy the one of the text that the model was trained on"  # and beside a checkpoint

# The pickle instructions that dictionaries, lists, strings and numbers are made of.
# fmt: off
_PLAIN = frozenset((
    "PROTO", "FRAME", "STOP", "MARK", "MEMOIZE",
    "PUT", "BINPUT", "LONG_BINPUT", "GET", "BINGET", "LONG_BINGET",
    "EMPTY_DICT", "DICT", "SETITEM", "SETITEMS", "EMPTY_LIST", "LIST", "APPEND", "APPENDS",
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE",
))
# fmt: on


def of_checkpoint(path: Path, vocab_size: int, dataset: str | None) -> Tokenizer | None:
    """The vocabulary of a ckpt.pt, which itself has none.

    It is a meta.pkl of as many characters as the model has: the one beside the checkpoint, or the one of the folder
    that the run was trained on, data/DATASET, in the current folder or beside the checkpoint's folder. Without any, a
    model of GPT-2's vocabulary size has GPT-2's tokens, as nanoGPT's sample.py assumes.

    Args:
        path: of the checkpoint.
        dataset: as in its configuration, where it says so.

    Returns:
        None if there is none. GPT-2's has fewer tokens than a model whose vocabulary is padded.

    Raises:
        UsageError: a meta.pkl is not readable, or GPT-2's files or tiktoken are missing.
    """
    for meta in _places(path, dataset):
        if _is_file(meta) and (found := vocabulary(meta, COPY)).vocab_size == vocab_size:
            return found
    return Gpt2Tokenizer.from_files() if vocab_size in GPT2_SIZES else None


def _places(path: Path, dataset: str | None) -> Iterator[Path]:
    """The paths at which a checkpoint's meta.pkl may be."""
    yield path.parent / META
    if dataset is None or PureWindowsPath(dataset).drive.startswith("\\\\"):  # a file never has us ask another machine
        return
    if Path(dataset).is_absolute():
        yield Path(dataset) / META
    elif dataset not in ("", "..") and PureWindowsPath(dataset).name == dataset:  # a path could lead anywhere
        for folder in (Path(), Path(absolute(path)).parent.parent):
            yield folder / DATA / dataset / META


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # its name is none, or its folder is closed to us
        return False


def vocabulary(meta: Path, way_out: str = PREPARE) -> CharTokenizer:
    """The tokenizer of a meta.pkl, with the ids of that file.

    Args:
        way_out: of an error, for its message.

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
        raise UsageError(f"{meta} is not nanoGPT's character vocabulary: {reason}; {way_out}") from None


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
