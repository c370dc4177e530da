"""Reads GGUF files of llama.cpp's architecture gpt2, with tensors of every type that the gguf library can dequantize.

Its matrices are those of linear layers, (outputs, inputs), as ours are. The output layer is tied to the embedding.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastgpt.config.model import ModelConfig
from fastgpt.errors import UsageError, shown
from fastgpt.interchange import gguf_header, gguf_tokenizer
from fastgpt.interchange.foreign import ForeignModel, checked, shape_of
from fastgpt.interchange.gguf_header import TensorInfo
from fastgpt.interchange.gguf_layout import ARCHITECTURE, EMBEDDING, HEAD, library, our_name
from fastgpt.system.files import regular, stamp
from fastgpt.system.lazy_tensors import LazyTensors

SETTINGS = {
    "context_length": "block_size",
    "block_count": "n_layer",
    "attention.head_count": "n_head",
    "embedding_length": "n_embd",
    "feed_forward_length": "n_inner",
}
EPSILON = "gpt2.attention.layer_norm_epsilon"
Stamp = tuple[int, int, int]
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # kept as they are


@dataclass(frozen=True)
class _Place:
    """A tensor's shape, its type in the gguf library, and its bytes in the file."""

    shape: tuple[int, ...]
    type: Any
    start: int
    size: int


def load(path: Path) -> ForeignModel:
    """Open a GGUF file of a GPT-2. Reads no weights yet, except to see that an output layer is the embedding.

    Raises:
        UsageError: it is no such file, is damaged, or asks for what is not supported; or gguf is not installed.
    """
    library()
    try:
        read_from = stamp(regular(path))
        header = gguf_header.read(path)
        places = {name: _place(name, info, header.data, read_from[1]) for name, info in header.tensors.items()}
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise UsageError(f"{path} is no GGUF file that can be read: {error}") from None
    _check_kind(path, header.values)
    tensors = _tensors(path, places, read_from)
    shape = _shape(path, header.values, tensors)
    return ForeignModel(path, shape, tensors, functools.partial(gguf_tokenizer.load, path, header))


def _check_kind(path: Path, values: Mapping[str, Any]) -> None:
    """Raise `UsageError` for another architecture, or a part of a model."""
    architecture = values.get("general.architecture")
    if architecture != ARCHITECTURE:
        raise UsageError(f"{path}: architecture {shown(architecture)} is not supported; only {ARCHITECTURE} is")
    if (parts := values.get("split.count", 1)) not in (0, 1):
        raise UsageError(f"{path}: it is one of {shown(parts)} parts; join them with llama-gguf-split --merge")
    heads = f"{ARCHITECTURE}.attention.head_count"
    if (kv_heads := values.get(f"{heads}_kv")) not in (None, values.get(heads)):
        raise UsageError(f"{path}: {heads}_kv {shown(kv_heads)} is not supported; only that of {heads} is")


def _shape(path: Path, values: Mapping[str, Any], tensors: LazyTensors) -> ModelConfig:
    keys = {f"{ARCHITECTURE}.{theirs}": ours for theirs, ours in SETTINGS.items()}
    if missing := next((key for key in (*keys, EPSILON) if key not in values), None):
        raise UsageError(f"{path} lacks {missing}")
    if len(rows := tensors.shapes.get("wte.weight", ())) != 2:
        raise UsageError(f"{path} has no matrix {EMBEDDING}")
    settings = {ours: values[key] for key, ours in keys.items()}
    if settings["n_inner"] == 4 * settings["n_embd"]:
        del settings["n_inner"]  # the default
    epsilon = values[EPSILON]
    if isinstance(epsilon, float):
        epsilon = float(f"{epsilon:.7g}")  # 1e-05, not the float32 next to it
    rest = {
        "norm_eps": epsilon,
        "vocab_size": rows[0],
        "bias": True,
        "mlp": "gelu",
        "tie": "lm_head.weight" not in tensors,
    }
    return shape_of(path, settings | rest, {ours: key for key, ours in keys.items()} | {"norm_eps": EPSILON})


def _place(name: str, info: TensorInfo, data: int, size: int) -> _Place:
    """The place of a tensor in a file of a size, whose data begin there. Raises ValueError if it is not within it."""
    kind, block, block_bytes = _type(info.type)
    row = info.shape[-1] if info.shape else 1
    if 0 in info.shape:
        raise ValueError(f"its {shown(name)} is empty")
    if row % block:
        raise ValueError(f"the rows of its {shown(name)} have {row} values, not a multiple of {kind.name}'s {block}")
    place = _Place(info.shape, kind, data + info.offset, math.prod(info.shape) // block * block_bytes)
    if place.start + place.size > size:
        raise ValueError(f"its {shown(name)} claims bytes up to {place.start + place.size:,}, and it has {size:,}")
    return place


@functools.cache
def _type(number: int) -> tuple[Any, int, int]:
    """The library's type, the values of a block, and its bytes. Raises ValueError for one that it cannot read."""
    gguf = library()
    try:
        kind = gguf.GGMLQuantizationType(number)
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        gguf.quants.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
    except (KeyError, ValueError, NotImplementedError):
        raise ValueError(f"it has a tensor of type {number}, which the installed gguf cannot read") from None
    return kind, block, block_bytes


def _tensors(path: Path, places: Mapping[str, _Place], read_from: Stamp) -> LazyTensors:
    """The weights by our names."""
    named = {our_name(name): place for name, place in places.items()}
    if len(named) < len(places):
        raise UsageError(f"{path} has a weight twice, by two names")

    def tensor(name: str) -> torch.Tensor:
        return checked(path, name, _read(path, named[name], read_from))

    if head := named.get("lm_head.weight"):
        embedding = named.get("wte.weight")
        if embedding is None or head.shape != embedding.shape:
            raise UsageError(f"{path}: {HEAD} has not the shape of {EMBEDDING}; take the whole model anew")
        if torch.equal(tensor("lm_head.weight").float(), tensor("wte.weight").float()):
            del named["lm_head.weight"]  # tied, as without it
    return LazyTensors({name: place.shape for name, place in named.items()}, tensor)


def _read(path: Path, place: _Place, read_from: Stamp) -> torch.Tensor:
    try:
        data = np.fromfile(path, np.uint8, place.size, offset=place.start)
        if stamp(path) != read_from or len(data) != place.size:
            raise UsageError(f"{path} was replaced while it was read; try again")
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from None
    if place.type.name in PLAIN:
        return torch.from_numpy(data).view(PLAIN[place.type.name]).view(place.shape)
    with np.errstate(all="ignore"):  # what is not finite is found below
        values = library().quants.dequantize(data.reshape(-1, _type(place.type.value)[2]), place.type)
    return torch.from_numpy(values).view(place.shape)
