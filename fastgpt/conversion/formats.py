"""The formats that a model can be written in: what each can hold, and its writer."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fastgpt.checkpoint.source import Source
from fastgpt.config.model import ModelConfig
from fastgpt.conversion import run_folder_export
from fastgpt.conversion.description import describe, progress_of
from fastgpt.errors import UsageError
from fastgpt.interchange import gguf_export, huggingface_export, nanogpt_export
from fastgpt.interchange.exported import RELUS, ExportedModel
from fastgpt.model.positions import position_table
from fastgpt.system.lazy_tensors import LazyTensors
from fastgpt.tokenizer.base import Tokenizer

Limit = Callable[[ModelConfig, Tokenizer], str | None]


@dataclass(frozen=True)
class Format:
    """A format.

    Attributes:
        limit: the first thing of a model that it cannot hold, or None.
        write: writes a model into a new folder, and is told the name that the result will have, and the dtype.
        gelu: the only form of GELU that it has, if there is one.
        is_file: the result is one file, which `write` names as its target; otherwise the folder.
    """

    limit: Limit
    write: Callable[[Source, Path, Path, str], None]
    gelu: str | None = None
    is_file: bool = False


def _as_gpt2(source: Source) -> ExportedModel:
    """The model with learned positions: fixed ones become the weights of a table, missing ones zeros."""
    config = source.config
    tensors = weights = source.weights(config)
    if config.position != "learned":
        table = position_table(config)
        rows = torch.zeros(config.block_size, config.n_embd) if table is None else table
        shapes = {"wte.weight": weights.shapes["wte.weight"], "wpe.weight": tuple(rows.shape)} | weights.shapes
        tensors = LazyTensors(shapes, lambda name: rows if name == "wpe.weight" else weights[name])
    config = dataclasses.replace(config, position="learned")
    done = progress_of(source)
    name = source.path.absolute().name.removesuffix(".gguf")
    return ExportedModel(config, source.required_tokenizer(), tensors, name, describe(source), done.step, done.val_loss)


FORMATS: dict[str, Format] = {
    "huggingface": Format(
        huggingface_export.limit,
        lambda source, folder, final, dtype: huggingface_export.write(_as_gpt2(source), folder, dtype),
    ),
    "gguf": Format(
        gguf_export.limit,
        lambda source, folder, final, dtype: gguf_export.write(_as_gpt2(source), folder / final.name, dtype),
        gelu="gelu",
        is_file=True,
    ),
    "nanogpt": Format(
        nanogpt_export.limit,
        lambda source, folder, final, dtype: nanogpt_export.write(_as_gpt2(source), folder, dtype, final),
        gelu="gelu_exact",
    ),
    "fastgpt": Format(
        lambda config, tokenizer: None,
        lambda source, folder, final, dtype: run_folder_export.write(source, folder, dtype),
    ),
}


def check(name: str, source: Source, approximate: bool) -> Source:
    """The model as the format can hold it: itself, or with `approximate` with the other form of GELU.

    Raises:
        UsageError: the format cannot hold it; the message names what, and the formats that can.
    """
    form, config, tokenizer = FORMATS[name], source.config, source.required_tokenizer()
    if what := form.limit(config, tokenizer):
        able = [other for other, kind in FORMATS.items() if kind.limit(config, tokenizer) is None]
        raise UsageError(f"`format` {name} cannot hold {what}; use `format` {_or(able)}")
    if form.gelu is None or config.mlp in (form.gelu, *RELUS):
        return source
    if not approximate:
        able = [other for other, kind in FORMATS.items() if kind.gelu in (None, config.mlp)]
        raise UsageError(
            f"`format` {name} has `mlp` {form.gelu} alone, and the model has {config.mlp}; take that one with "
            f"`approximate=True`, and see how far the logits move, or use `format` {_or(able)}"
        )
    return dataclasses.replace(source, shape=dataclasses.replace(source.shape, mlp=form.gelu))


def _or(names: Sequence[str]) -> str:
    """A list in words: "a, b or c"."""
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
