"""Reads nanoGPT's ckpt.pt, so that a run can start from its weights.

A .pt file is a zip archive around a pickle, and a pickle can run any code. `torch.load` with `weights_only=True` runs
none: it reads tensors and plain data, and refuses everything else. No other way is tried.
"""

import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastgpt.config.fields import validate
from fastgpt.config.model import ModelConfig
from fastgpt.errors import UsageError
from fastgpt.system import finite
from fastgpt.system.units import counted

LARGEST_PICKLE = 64 << 20  # bytes; that of GPT-2's largest size takes less than one MiB
SHAPE = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size")  # nanoGPT's model_args
BIAS = True  # nanoGPT's default; versions before this setting always had biases
WRAPPERS = ("_orig_mod.", "module.")  # of torch.compile and DistributedDataParallel, in either order
PREFIX = "transformer."  # of nanoGPT's module
ESCAPE = re.compile(r"\x1b\[[0-9;]*m")  # by which PyTorch makes parts of a message bold
GLOBAL = re.compile(r"GLOBAL (\S+)")  # a class or a function in a pickle, in PyTorch's messages
DERIVED = ("lm_head.weight", ".attn.bias", ".attn.masked_bias")  # tied to the embedding; masks of old versions


@dataclass(frozen=True)
class ForeignModel:
    """A model's shape, and its weights by the names of `fastgpt.model.gpt.GPT`, mapped from the file."""

    path: Path
    shape: ModelConfig
    tensors: dict[str, torch.Tensor]

    def weights(self, vocab_size: int) -> dict[str, torch.Tensor]:
        """The weights for a vocabulary of this size; rows of the embedding beyond it are padding.

        Raises:
            UsageError: the model has a smaller vocabulary, or a weight that is not finite.
        """
        if vocab_size > (self.shape.vocab_size or 0):
            raise UsageError(
                f"`init_from` {self.path}: its vocabulary has {counted(self.shape.vocab_size or 0, 'token')}, and that "
                f"of `dataset` {vocab_size:,}; name the data that it was trained on"
            )
        if bad := finite.first_not_finite(self.tensors):
            raise UsageError(
                f"`init_from` {self.path}: its weights are not finite: {bad} holds a NaN or an infinity; "
                "take a checkpoint from before that"
            )
        return {name: tensor[:vocab_size] if name == "wte.weight" else tensor for name, tensor in self.tensors.items()}


def load(path: str | Path) -> ForeignModel:
    """Read a nanoGPT checkpoint. Its GELU is exact and ours the tanh form, which moves a loss by about 0.001.

    Raises:
        UsageError: no such file, not one of torch.save's since PyTorch 1.6, one that holds more than tensors and plain
            data, or no GPT.
    """
    path = Path(path)
    try:
        _check_archive(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return ForeignModel(path, _shape(_part(content, "model_args")), _tensors(_part(content, "model")))
    except OSError as error:
        raise UsageError(f"`init_from` {path} cannot be read: {error.strerror or error}") from None
    except Exception as error:  # a hostile or broken file may raise anything; none of it has run
        raise UsageError(
            f"`init_from` {path} is not nanoGPT's checkpoint: {_reason(error):.200}; nothing in it was run"
        ) from None


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


def _shape(arguments: dict[str, Any]) -> ModelConfig:
    if missing := [name for name in SHAPE if name not in arguments and name != "bias"]:
        raise ValueError(f"its model_args lack {missing[0]}")
    shape = ModelConfig(**{name: arguments.get(name, BIAS) for name in SHAPE})
    validate(shape)
    return shape


def _tensors(weights: dict[str, Any]) -> dict[str, torch.Tensor]:
    result = {}
    for name, tensor in weights.items():
        while name.startswith(WRAPPERS):
            name = name.partition(".")[2]
        name = name.removeprefix(PREFIX)
        if name.endswith(DERIVED):
            continue
        _check_stored(name, tensor)
        result[name] = tensor
    if "wte.weight" not in result or result["wte.weight"].dim() != 2:
        raise ValueError("it has no table of embeddings")
    return result


def _check_stored(name: str, tensor: Any) -> None:
    """Raise ValueError unless the file holds all the numbers of a weight's shape."""
    if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.is_meta:
        raise ValueError(f"its weight {name} is no plain tensor")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise ValueError(f"its weight {name} claims more bytes than it has")
