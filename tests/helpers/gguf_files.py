"""Untrained models in GGUF files."""

from pathlib import Path

import torch

from fastgpt.config.model import ModelConfig
from fastgpt.interchange import gguf_export
from fastgpt.interchange.exported import ExportedModel
from fastgpt.model.gpt import GPT
from fastgpt.tokenizer.base import Tokenizer


def model_of(tokenizer: Tokenizer, **settings) -> ExportedModel:
    """An untrained model whose biases and gains are as after a training."""
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 8} | settings
    torch.manual_seed(7)
    model = GPT(ModelConfig(vocab_size=tokenizer.vocab_size, **sizes))
    weights = {name: tensor.detach() + 0.1 * torch.randn_like(tensor) for name, tensor in model.weights().items()}
    return ExportedModel(model.config, tokenizer, weights)


def written(path: Path, tokenizer: Tokenizer, dtype: str = "float32", **settings) -> ExportedModel:
    model = model_of(tokenizer, **settings)
    gguf_export.write(model, path, dtype)
    return model
