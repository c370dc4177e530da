"""Folders of GPT-2 as transformers saves them, written here by the safetensors library alone."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from fastgpt.interchange import huggingface_tokenizer
from fastgpt.model.gpt import GPT
from fastgpt.tokenizer.base import Tokenizer
from tests.helpers.exports import LETTERS, exported

BY_COLUMNS = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # of a Conv1D
Tensors = dict[str, torch.Tensor]


def theirs(model: GPT, prefix: str = "transformer.") -> Tensors:
    """The weights by transformers' names, and as it has them."""
    weights = {n: tensor.t() if n.endswith(BY_COLUMNS) else tensor for n, tensor in model.weights().items()}
    return {prefix + name: tensor.detach().clone().contiguous() for name, tensor in weights.items()}


def settings_of(model: GPT) -> dict[str, Any]:
    config = model.config
    return {
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.block_size,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "n_inner": config.n_inner,
        "layer_norm_epsilon": config.norm_eps,
        "activation_function": {"gelu": "gelu_new", "gelu_exact": "gelu", "relu": "relu"}[config.mlp],
    }


def write(
    folder: Path,
    tensors: Tensors,
    settings: Mapping[str, Any],
    tokenizer: Tokenizer | None = LETTERS,
    shards: int = 1,
) -> Path:
    """Write config.json, the weights, in one file or in shards with an index, and tokenizer.json."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", settings)
    names = [f"model-{at + 1:05d}-of-{shards:05d}.safetensors" for at in range(shards)]
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
    else:
        places = {name: names[at % shards] for at, name in enumerate(tensors)}
        for file in names:
            save_file({name: tensors[name] for name, place in places.items() if place == file}, folder / file)
        write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": places})
    if tokenizer is not None:
        write_json(folder / "tokenizer.json", huggingface_tokenizer.to_library(tokenizer))
    return folder


def folder_of(folder: Path, tokenizer: Tokenizer = LETTERS, **shape) -> GPT:
    """Write a whole folder; the model that is in it."""
    model, _ = exported(tokenizer, **shape)
    write(folder, theirs(model), settings_of(model), tokenizer)
    return model


def change_settings(folder: Path, **changes: Any) -> None:
    """Change config.json; a value of `...` removes the setting."""
    settings = json.loads((folder / "config.json").read_text()) | changes
    write_json(folder / "config.json", {name: value for name, value in settings.items() if value is not ...})


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")
