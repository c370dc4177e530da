"""Writes and reads safetensors files: eight bytes of length, a JSON header, and the tensors' bytes.

The safetensors library reads them. It does not write them: it can neither hash what it writes nor stop between two
blocks, and it would hold a second copy of all tensors in memory.
(https://github.com/huggingface/safetensors, "Format".)
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from fastgpt.errors import CorruptCheckpoint
from fastgpt.system.files import Block, regular, stamp
from fastgpt.system.lazy_tensors import LazyTensors

DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
ALIGNMENT = 8  # of the first tensor's byte in the file


def parts(tensors: Mapping[str, torch.Tensor]) -> Iterator[Block]:
    """The bytes of a file with these tensors, in their order, for `fastgpt.system.files.write`.

    One tensor at a time is copied, and only if it is on another device or not contiguous.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    yield len(text).to_bytes(8, "little") + text
    for tensor in tensors.values():
        yield tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def read(path: Path) -> LazyTensors:
    """The tensors of a file, each mapped into memory while it is used.

    Raises:
        CorruptCheckpoint: it is no safetensors file, or its header promises other bytes than it has; when a tensor is
            read: the file was replaced meanwhile.
    """
    try:
        read_from = stamp(path)
        with safe_open(regular(path), framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no dict
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from None

    def tensor(name: str) -> torch.Tensor:
        try:
            with safe_open(path, framework="pt") as file:
                found = file.get_tensor(name)
            if stamp(path) == read_from:
                return found
        except (OSError, SafetensorError) as error:
            raise _unreadable(path, error) from None
        raise CorruptCheckpoint(f"{path} was replaced while it was read; try again")

    return LazyTensors(shapes, tensor)


def _unreadable(path: Path, error: Exception) -> CorruptCheckpoint:
    reason = getattr(error, "strerror", None) or str(error).removesuffix(f": {path}")
    return CorruptCheckpoint(f"{path} cannot be read: {reason}")
