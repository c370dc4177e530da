"""Reads folders that transformers saved: GPT-2 as config.json, safetensors files, and a tokenizer.

Its matrices are those of a Conv1D, (inputs, outputs), the transpose of a linear layer's. Nothing in the folder is run:
weights come from safetensors only, never from a pickle such as pytorch_model.bin.
(https://github.com/huggingface/transformers, models/gpt2.)
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastgpt.config.model import ModelConfig
from fastgpt.errors import UsageError, shown
from fastgpt.interchange import huggingface_tokenizer
from fastgpt.interchange.foreign import MASKS, ForeignModel, checked, shape_of
from fastgpt.system import json_files, safetensors_file
from fastgpt.system.lazy_tensors import LazyTensors

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
MODEL_TYPE = "gpt2"
PREFIX, HEAD, EMBEDDING = "transformer.", "lm_head.weight", "wte.weight"
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
# Their names of activations. The first of ours is the one that is written.
ACTIVATIONS = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu": "gelu_exact", "relu": "relu", "relu2": "relu2"}
NAMES = {"block_size": "n_positions", "mlp": "activation_function", "norm_eps": "layer_norm_epsilon"}
# Settings that change what the model computes, with the only value that is supported. reorder_and_upcast_attn is not
# among them: attention accumulates in float32 here, with or without it.
FIXED = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}


def load(folder: Path) -> ForeignModel:
    """Open a folder of GPT-2 in transformers' layout. Reads no weights yet.

    Raises:
        UsageError: it is no such folder, is damaged, or asks for what is not supported.
    """
    settings = read_settings(folder)
    tensors = _tensors(folder, settings.get("tie_word_embeddings", True) is not False)
    tokenizer = functools.partial(huggingface_tokenizer.load, folder, settings)
    return ForeignModel(folder, _shape(folder, settings, HEAD not in tensors), tensors, tokenizer)


def read_settings(folder: Path) -> dict[str, Any]:
    """The content of config.json. Raises `UsageError` if it is not that of a GPT-2."""
    settings = json_files.read_object(folder / CONFIG)
    if settings.get("model_type") != MODEL_TYPE:
        found = shown(settings.get("model_type"))
        raise UsageError(f"{folder / CONFIG}: model_type {found} is not supported; only {MODEL_TYPE} is")
    for name, value in FIXED.items():
        if settings.get(name, value) != value:
            raise UsageError(f"{folder / CONFIG}: {name} {shown(settings[name])} is not supported; only {value} is")
    if settings.get("quantization_config") is not None:
        raise UsageError(f"{folder / CONFIG}: quantization_config is not supported; save the model unquantized")
    return settings


def _shape(folder: Path, settings: Mapping[str, Any], tied: bool) -> ModelConfig:
    path = folder / CONFIG
    wanted = ("vocab_size", "n_layer", "n_head", "n_embd", "n_positions")
    if missing := next((name for name in wanted if settings.get(name) is None), None):
        raise UsageError(f"{path} lacks {missing}")
    activation = settings.get("activation_function", "gelu_new")
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise UsageError(f"{path}: activation_function {shown(activation)} is not supported; only {known} are")
    sizes = {name: settings[name] for name in ("vocab_size", "n_layer", "n_head", "n_embd")}
    rest = {
        "block_size": settings["n_positions"],
        "bias": True,
        "tie": tied,
        "mlp": ACTIVATIONS[activation],
        "n_inner": settings.get("n_inner"),
        "norm_eps": settings.get("layer_norm_epsilon", 1e-5),
    }
    return shape_of(path, sizes | rest, NAMES)


def _tensors(folder: Path, tied: bool) -> LazyTensors:
    """The weights by our names and in our shapes; those of the output layer if it has its own.

    Args:
        tied: what the settings say.
    """
    files = _files(folder)
    named: dict[str, tuple[LazyTensors, str]] = {}  # our name: the file that has it, and its name there
    for file in files.values():
        for name in file:
            ours = name.removeprefix(PREFIX)
            if ours in named:
                raise UsageError(f"{folder}: {ours} is there twice; delete the files that do not belong to the model")
            named[ours] = file, name
    named = {name: place for name, place in named.items() if not name.endswith(MASKS)}
    if head := named.get(HEAD):
        if _is_embedding(folder, head, named.get(EMBEDDING)):
            del named[HEAD]
        elif tied:
            raise UsageError(
                f"{folder}: {CONFIG} ties {HEAD} to {EMBEDDING}, and their weights differ; set tie_word_embeddings to "
                "false there if the output layer has weights of its own"
            )
    elif not tied:
        raise UsageError(f"{folder}: {CONFIG} has tie_word_embeddings False, and there is no {HEAD}; put it back")

    def tensor(name: str) -> torch.Tensor:
        file, theirs = named[name]
        found = checked(folder, name, file[theirs])
        return found.t() if name.endswith(CONV1D) else found

    shapes = {name: file.shapes[theirs] for name, (file, theirs) in named.items()}
    return LazyTensors({n: shape[::-1] if n.endswith(CONV1D) else shape for n, shape in shapes.items()}, tensor)


def _is_embedding(folder: Path, head: tuple[LazyTensors, str], embedding: tuple[LazyTensors, str] | None) -> bool:
    """Whether the output layer's weights are those of the embedding. Raises `UsageError` for those of another shape."""
    if embedding is None or head[0].shapes[head[1]] != embedding[0].shapes[embedding[1]]:
        raise UsageError(f"{folder}: {HEAD} has not the shape of {EMBEDDING}; take the whole model anew")
    return torch.equal(head[0][head[1]], embedding[0][embedding[1]])


def _files(folder: Path) -> dict[str, LazyTensors]:
    """The safetensors files by their names."""
    if (folder / INDEX).exists():
        names = _shards(folder)
    elif (folder / WEIGHTS).exists():
        names = [WEIGHTS]
    elif pickle := next((name for name in PICKLES if (folder / name).exists()), None):
        raise UsageError(
            f"{folder} has its weights in {pickle}, a pickle, which can run any code; save it anew with "
            "save_pretrained(FOLDER, safe_serialization=True)"
        )
    else:
        raise UsageError(f"{folder} has no {WEIGHTS} and no {INDEX}")
    return {name: safetensors_file.read(folder / name) for name in names}


def _shards(folder: Path) -> list[str]:
    weight_map = json_files.read_object(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UsageError(f"{folder / INDEX} has no weight_map")
    names = sorted(set(map(str, weight_map.values())))
    for name in names:
        own = Path(name).name == name and "\\" not in name and name.isprintable()
        if not own or not name.endswith(".safetensors"):
            raise UsageError(f"{folder / INDEX} names {shown(name)}, which is no safetensors file of this folder")
    return names
