"""Writes GGUF files of llama.cpp's architecture gpt2, with the vocabulary inside.

Matrices are of the type asked for; positions, gains and biases are float32, as llama.cpp's own converter leaves them.
"""

import functools
import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastgpt.config.model import ModelConfig
from fastgpt.errors import UsageError, shown
from fastgpt.interchange import gguf_tokenizer
from fastgpt.interchange.exported import RELUS, ExportedModel, beyond_gpt2
from fastgpt.interchange.gguf_layout import ARCHITECTURE, gguf_name, library
from fastgpt.tokenizer.base import Tokenizer

# By our names: the types of matrices in the library, and of the file in its list of them.
DTYPES = {
    "float32": ("F32", "ALL_F32"),
    "float16": ("F16", "MOSTLY_F16"),
    "bfloat16": ("BF16", "MOSTLY_BF16"),
    "q8_0": ("Q8_0", "MOSTLY_Q8_0"),  # 32 int8 and their float16 scale: 8.5 bits a weight
}


def limit(config: ModelConfig, tokenizer: Tokenizer) -> str | None:
    """The first thing that GGUF's gpt2 cannot hold, in words, or None.

    Sinusoidal positions and none are fine: the caller writes them as a table.
    """
    if parts := beyond_gpt2(config):
        return parts[0]
    if config.mlp in RELUS:
        return f"ReLU (`mlp` {config.mlp})"
    spelled = Counter(gguf_tokenizer.spellings(tokenizer))
    twice = next((token for token, count in spelled.items() if count > 1), None)
    return None if twice is None else f"two tokens that are spelled alike, such as {shown(twice)}"


def write(model: ExportedModel, path: Path, dtype: str) -> None:
    """Write a model and its vocabulary; what is at `path` is replaced.

    Args:
        dtype: of the matrices, a key of `DTYPES`.

    Raises:
        OSError: it cannot be written; a part of it may be there.
        UsageError: GGUF or the type cannot hold the model, or gguf is not installed.
    """
    if unfit := limit(model.config, model.tokenizer):
        raise UsageError(f"a GGUF file of architecture {ARCHITECTURE} cannot hold {unfit}")
    vocabulary = gguf_tokenizer.vocabulary_of(model.tokenizer)
    add = functools.partial(gguf_tokenizer.add, vocabulary)
    write_file(path, model.config, model.with_biases(), dtype, add, model.name, model.facts)


def write_file(
    path: Path,
    config: ModelConfig,
    tensors: Mapping[str, torch.Tensor],
    dtype: str,
    add_vocabulary: Callable[[Any], None],
    name: str = ARCHITECTURE,
    facts: Mapping[str, str] | None = None,
) -> None:
    """Write tensors by our names, biases among them, and what `add_vocabulary` adds to the library's writer."""
    gguf = library()
    kinds = {name: _kind(gguf, name, tensor, dtype) for name, tensor in tensors.items()}
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    try:
        _add_settings(writer, gguf, config, dtype)
        writer.add_name(name)
        if facts:
            writer.add_description(json.dumps(facts))
        add_vocabulary(writer)
        for name, tensor in tensors.items():
            writer.add_tensor_info(gguf_name(name), *_stored(gguf, tensor, kinds[name]), raw_dtype=kinds[name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in tensors.items():  # one at a time, so that no second copy of the model is in memory
            writer.write_tensor_data(_quantized(gguf, name, tensor, kinds[name], dtype))
    finally:
        writer.close()


def _add_settings(writer: Any, gguf: Any, config: ModelConfig, dtype: str) -> None:
    writer.add_file_type(gguf.LlamaFileType[DTYPES[dtype][1]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(config.n_layer)
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(config.inner)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.norm_eps)


def _kind(gguf: Any, name: str, tensor: torch.Tensor, dtype: str) -> Any:
    """The library's type for a tensor. Raises `UsageError` if its rows are no whole blocks of that type."""
    if tensor.dim() != 2 or name == "wpe.weight":
        return gguf.GGMLQuantizationType.F32
    kind = gguf.GGMLQuantizationType[DTYPES[dtype][0]]
    block, row = gguf.GGML_QUANT_SIZES[kind][0], tensor.shape[1]
    if row % block:
        setting = "n_inner" if name.endswith("mlp.c_proj.weight") else "n_embd"
        raise UsageError(
            f"`dtype` {dtype} holds rows of a multiple of {block} values, and `{setting}` is {row}; use float16"
        )
    return kind


def _stored(gguf: Any, tensor: torch.Tensor, kind: Any) -> tuple[tuple[int, ...], np.dtype, int]:
    """The shape of a tensor, a type for the library, which takes uint8 for a shape in bytes, and its bytes."""
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    return tuple(tensor.shape), np.dtype(np.float32), tensor.numel() // block * block_bytes


def _quantized(gguf: Any, name: str, tensor: torch.Tensor, kind: Any, dtype: str) -> np.ndarray:
    """The values of a tensor as they lie in the file. Raises `UsageError` if float16 cannot hold them."""
    values = np.ascontiguousarray(tensor.detach().float().cpu().numpy())
    with np.errstate(over="ignore"):  # told below
        stored = gguf.quants.quantize(values, kind)
    if stored.dtype == np.float16 and not np.isfinite(stored).all():
        raise UsageError(
            f"`dtype` {dtype} cannot hold {name}, whose values go up to {abs(values).max():.3g}; use bfloat16"
        )
    return stored
