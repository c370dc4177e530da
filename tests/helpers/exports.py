"""Models to write in other programs' formats."""

import torch

from fastgpt.config.model import ModelConfig
from fastgpt.interchange.exported import ExportedModel
from fastgpt.model.gpt import GPT
from fastgpt.tokenizer.base import Tokenizer
from fastgpt.tokenizer.char import CharTokenizer

LETTERS = CharTokenizer("\n abcdefghijé👩")


def exported(tokenizer: Tokenizer = LETTERS, **shape) -> tuple[GPT, ExportedModel]:
    """A model with weights as after a training, and what a writer takes of it."""
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 12} | shape
    torch.manual_seed(5)
    model = GPT(ModelConfig(vocab_size=tokenizer.vocab_size, **sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model, ExportedModel(model.config, tokenizer, model.weights())
