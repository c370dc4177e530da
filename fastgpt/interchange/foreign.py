"""A model in another program's file, by our names: what every reader of such files returns."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from fastgpt.config.fields import validate
from fastgpt.config.model import ModelConfig
from fastgpt.errors import UsageError
from fastgpt.system import finite
from fastgpt.system.lazy_tensors import LazyTensors
from fastgpt.tokenizer.base import Tokenizer

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MASKS = (".attn.bias", ".attn.masked_bias")  # constants that old versions saved beside the weights


@dataclass(frozen=True)
class ForeignModel:
    """A model that another program saved.

    Attributes:
        path: its file or folder, for messages.
        shape: with the rows of the embedding as vocab_size.
        tensors: by the names of `fastgpt.model.gpt.GPT`, read when they are asked for.
        read_tokenizer: reads its vocabulary; None where it has none. Raises `UsageError`.
    """

    path: Path
    shape: ModelConfig
    tensors: LazyTensors
    read_tokenizer: Callable[[], Tokenizer | None]


def shape_of(path: Path, settings: Mapping[str, object], names: Mapping[str, str]) -> ModelConfig:
    """The shape that a file's settings describe.

    Args:
        names: what the file calls those settings that it calls otherwise than we do.

    Raises:
        UsageError: a value is out of range; the message names the file, and the setting as the file does.
    """
    try:
        shape = ModelConfig(**settings)  # pyright: ignore[reportArgumentType] - checked next
        validate(shape)
    except UsageError as error:
        told = re.sub(r"`(\w+)`", lambda match: names.get(match[1], match[1]), str(error))
        raise UsageError(f"{path}: {told}") from None
    return shape


def checked(path: Path, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor as it was read. Raises `UsageError` if it is no weight: of another type, or not finite."""
    if tensor.dtype not in DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise UsageError(f"{path}: its weight {name} is of type {tensor.dtype}; convert it to one of {known}")
    if finite.first_not_finite({name: tensor}):
        raise UsageError(
            f"{path}: its weights are not finite: {name} holds a NaN or an infinity; take a checkpoint from before that"
        )
    return tensor
