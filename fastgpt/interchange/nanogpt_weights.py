"""Reads nanoGPT's ckpt.pt: the model's shape, its weights, and the vocabulary that belongs to it.

A .pt file is a zip archive around a pickle, and a pickle can run any code. `torch.load` with `weights_only=True` runs
none: it reads tensors and plain data, and refuses everything else. No other way is tried.
"""

import functools
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastgpt.errors import UsageError
from fastgpt.interchange import nanogpt_vocabulary
from fastgpt.interchange.foreign import MASKS, ForeignModel, checked, shape_of
from fastgpt.system.lazy_tensors import LazyTensors

CHECKPOINT = "ckpt.pt"
LARGEST_PICKLE = 64 << 20  # bytes; that of GPT-2's largest size takes less than one MiB
SHAPE = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size")  # nanoGPT's model_args
BIAS = True  # nanoGPT's default; versions before this setting always had biases
FIXED = {"mlp": "gelu_exact"}  # what nanoGPT's model.py has no setting for, where our default differs
WRAPPERS = ("_orig_mod.", "module.")  # of torch.compile and DistributedDataParallel, in either order
PREFIX, HEAD, EMBEDDING = "transformer.", "lm_head.weight", "wte.weight"  # names in nanoGPT's module
ESCAPE = re.compile(r"\x1b\[[0-9;]*m")  # by which PyTorch makes parts of a message bold
GLOBAL = re.compile(r"GLOBAL (\S+)")  # a class or a function in a pickle, in PyTorch's messages


def load(path: str | Path) -> ForeignModel:
    """Open a nanoGPT checkpoint, whose weights are mapped from the file.

    Its vocabulary is in another file, see `nanogpt_vocabulary.of_checkpoint`.

    Raises:
        UsageError: no such file, not one of torch.save's since PyTorch 1.6, one that holds more than tensors and plain
            data, or no GPT.
    """
    path = Path(path)
    try:
        _check_archive(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        settings, weights = _settings(_part(content, "model_args")), _weights(_part(content, "model"))
        _check_tied(weights.pop(HEAD, None), weights[EMBEDDING])
        _check_rows(settings, weights[EMBEDDING])
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from None
    except Exception as error:  # a hostile or broken file may raise anything; none of it has run
        raise UsageError(f"{path} is not nanoGPT's checkpoint: {_reason(error):.200}; nothing in it was run") from None
    shape = shape_of(path, settings | FIXED, {})
    tensors = LazyTensors(
        {name: tuple(tensor.shape) for name, tensor in weights.items()},
        lambda name: checked(path, name, weights[name]),
    )
    dataset = _dataset(content.get("config"))
    return ForeignModel(
        path, shape, tensors, functools.partial(nanogpt_vocabulary.of_checkpoint, path, shape.known_vocab, dataset)
    )


def _reason(error: Exception) -> str:
    """The fault of the file in one line, without PyTorch's advice, which is to run the code in the file."""
    text = ESCAPE.sub("", str(error)) or type(error).__name__
    if found := GLOBAL.search(text):
        return f"it holds {found[1]}, which is neither a tensor nor plain data"
    return text.rpartition("WeightsUnpickler error: ")[2].splitlines()[0]


def _part(content: Any, name: str) -> dict[str, Any]:
    part = content.get(name) if isinstance(content, dict) else None
    if not isinstance(part, dict):
        raise ValueError(f"it has no {name}, which nanoGPT's train.py saves")
    return part


def _check_archive(path: Path) -> None:
    """Raise ValueError unless the file is an archive whose parts fit in it."""
    size = path.stat().st_size
    if not path.is_file():
        raise ValueError("it is no file")
    if not zipfile.is_zipfile(path):
        raise ValueError("it is no zip archive, as torch.save has written since PyTorch 1.6")
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError("it is compressed, which torch.save never does")
    if sum(entry.file_size for entry in entries) > size:
        raise ValueError("its parts claim more bytes than it has")
    if any(entry.filename.endswith(".pkl") and entry.file_size > LARGEST_PICKLE for entry in entries):
        raise ValueError(f"its pickle is larger than {LARGEST_PICKLE >> 20} MiB")


def _settings(arguments: Mapping[str, Any]) -> dict[str, int]:
    if missing := [name for name in SHAPE if name not in arguments and name != "bias"]:
        raise ValueError(f"its model_args lack {missing[0]}")
    settings = {name: arguments.get(name, BIAS) for name in SHAPE}
    for name, value in settings.items():
        if not isinstance(value, int):
            raise ValueError(f"{name} in its model_args is of type {type(value).__name__}")
    return settings


def _dataset(config: Any) -> str | None:
    """The name of the prepared folder in data/, or its absolute path."""
    dataset = config.get("dataset") if isinstance(config, dict) else None
    return dataset if isinstance(dataset, str) else None


def _weights(stored: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The weights by our names, and the output layer's."""
    result = {}
    for full_name, tensor in stored.items():
        name = full_name
        while name.startswith(WRAPPERS):
            name = name.partition(".")[2]
        name = name.removeprefix(PREFIX)
        if name.endswith(MASKS):
            continue
        if name in result:
            raise ValueError(f"its weight {name} is there twice")
        _check_stored(name, tensor)
        result[name] = tensor
    if EMBEDDING not in result or result[EMBEDDING].dim() != 2:
        raise ValueError("it has no table of embeddings")
    return result


def _check_stored(name: str, tensor: Any) -> None:
    """Raise ValueError unless the file holds all the numbers of a weight's shape."""
    if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.is_meta:
        raise ValueError(f"its weight {name} is no plain tensor")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise ValueError(f"its weight {name} claims more bytes than it has")


def _check_tied(head: torch.Tensor | None, embedding: torch.Tensor) -> None:
    """Raise ValueError if the output layer has weights of its own. In nanoGPT's files it is the same tensor."""
    if head is None or head.is_set_to(embedding):
        return
    if head.dtype != embedding.dtype or not torch.equal(head, embedding):
        raise ValueError(f"its {HEAD} is not {EMBEDDING}, to which the output layer is tied")


def _check_rows(settings: Mapping[str, int], embedding: torch.Tensor) -> None:
    if len(embedding) != settings["vocab_size"]:
        raise ValueError(
            f"vocab_size in its model_args is {settings['vocab_size']}, and {EMBEDDING} is for {len(embedding)}"
        )
