"""Writes a GPT-2 in transformers' layout: AutoModelForCausalLM and AutoTokenizer load it without code of its own."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from fastgpt import __version__
from fastgpt.config.model import ModelConfig
from fastgpt.errors import UsageError
from fastgpt.interchange import huggingface_tokenizer
from fastgpt.interchange.exported import DTYPES, ExportedModel, beyond_gpt2
from fastgpt.interchange.huggingface import ACTIVATIONS, CONFIG, CONV1D, HEAD, INDEX, MODEL_TYPE, PREFIX, WEIGHTS
from fastgpt.system import files, safetensors_file
from fastgpt.system.lazy_tensors import LazyTensors
from fastgpt.system.units import counted
from fastgpt.tokenizer.base import Tokenizer

SHARD = 5_000_000_000  # bytes of a file's tensors, at most, as transformers parts them
PROMPT, NEW_TOKENS = "The ", 50
GENERATION, CARD = "generation_config.json", "README.md"


def limit(config: ModelConfig, tokenizer: Tokenizer) -> str | None:
    """The first thing of a model that GPT-2's config.json cannot say, or None."""
    return next(iter(beyond_gpt2(config)), None)


def write(model: ExportedModel, folder: Path, dtype: str) -> None:
    """Write the model's files into a folder that is there."""
    tensors = _theirs(model.with_biases(), DTYPES[dtype])
    shards = list(_shards(tensors.shapes, DTYPES[dtype].itemsize))
    names = [WEIGHTS] if len(shards) == 1 else [_shard_name(at, len(shards)) for at in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        files.write(folder / name, safetensors_file.parts(tensors.only(shard)))
    if len(shards) > 1:
        total = DTYPES[dtype].itemsize * sum(map(math.prod, tensors.shapes.values()))
        weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    ends = {"bos_token_id": model.tokenizer.start_token, "eos_token_id": model.tokenizer.end_token}
    _write_json(folder / CONFIG, _settings(model.config, dtype) | ends)
    _write_json(folder / GENERATION, {"_from_model_config": True} | ends)
    _write_json(folder / huggingface_tokenizer.TOKENIZER, huggingface_tokenizer.to_library(model.tokenizer))
    settings = huggingface_tokenizer.settings_of(model.tokenizer, model.config.block_size)
    _write_json(folder / huggingface_tokenizer.SETTINGS, settings)
    files.write(folder / CARD, [_card(model, dtype).encode()])


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    files.write(path, [(json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()])


def _theirs(ours: LazyTensors, dtype: torch.dtype) -> LazyTensors:
    """The tensors by transformers' names, in its shapes and a dtype."""

    def tensor(name: str) -> torch.Tensor:
        found = ours[name.removeprefix(PREFIX)].to(dtype)
        return found.t().contiguous() if name.endswith(CONV1D) else found

    shapes = {name: shape[::-1] if name.endswith(CONV1D) else shape for name, shape in ours.shapes.items()}
    return LazyTensors({name if name == HEAD else PREFIX + name: shape for name, shape in shapes.items()}, tensor)


def _shards(shapes: Mapping[str, tuple[int, ...]], width: int) -> Iterator[list[str]]:
    """The names in their order, in parts whose tensors have at most `SHARD` bytes; `width` is that of a number."""
    shard, size = [], 0
    for name, shape in shapes.items():
        bytes = width * math.prod(shape)
        if shard and size + bytes > SHARD:
            yield shard
            shard, size = [], 0
        shard.append(name)
        size += bytes
    yield shard


def _shard_name(at: int, count: int) -> str:
    return f"model-{at + 1:05d}-of-{count:05d}.safetensors"


def _settings(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The content of config.json, the tokens that begin and end a text aside."""
    activation = next(theirs for theirs, ours in ACTIVATIONS.items() if ours == config.mlp)
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": MODEL_TYPE,
        "vocab_size": config.vocab_size,
        "n_positions": config.block_size,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "n_inner": config.n_inner,
        "activation_function": activation,
        "layer_norm_epsilon": config.norm_eps,
        **dict.fromkeys(("embd_pdrop", "resid_pdrop"), config.dropout),
        "attn_pdrop": config.attention_rate,
        "tie_word_embeddings": config.tie,
        "torch_dtype": dtype,
    }


def _card(model: ExportedModel, dtype: str) -> str:
    """README.md: what the model is, where it comes from, and how to load it."""
    config = model.config
    shape = f"{counted(config.n_layer, 'layer')}, {counted(config.n_head, 'head')}, width {config.n_embd:,}"
    rows = {
        "shape": f"{shape}, context {config.block_size:,}",
        "vocabulary": f"{counted(model.tokenizer.vocab_size, 'token')} ({model.tokenizer.kind})",
        "weights": dtype,
        **model.facts,
        "written by": f"fastgpt {__version__}, torch {torch.__version__}",
    }
    table = "\n".join(f"| {name} | {_cell(value)} |" for name, value in rows.items())
    prompt = _prompt(model.tokenizer)
    new = max(1, min(NEW_TOKENS, config.block_size - len(model.tokenizer.encode(prompt))))
    return CARD_TEXT.format(name=model.name, table=table, prompt=repr(prompt), new=new)


def _prompt(tokenizer: Tokenizer) -> str:
    """A prompt that the vocabulary can spell."""
    try:
        tokenizer.encode(PROMPT)
        return PROMPT
    except UsageError:
        return tokenizer.decode([tokenizer.start_token])


def _cell(text: str) -> str:
    """A text in a Markdown table, whatever names are in it."""
    return " ".join(text.split()).replace("|", r"\|")


CARD_TEXT = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- gpt2
- fastgpt
---

# {name}

| | |
|---|---|
{table}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
prompt = tokenizer({prompt}, return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens={new}, do_sample=True)[0]))
```

The prompt and the new tokens together must fit into the context.
"""
