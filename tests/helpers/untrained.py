"""An untrained model whose text does not only repeat itself."""

import torch

from fastgpt.config.model import ModelConfig
from fastgpt.generation.generator import TextGenerator
from fastgpt.model.gpt import GPT
from fastgpt.tokenizer.byte import ByteTokenizer
from fastgpt.tokenizer.char import CharTokenizer

BLOCK = 8


def fresh(position: str = "learned", *, chars: str | None = "\nabcdefghij", **shape) -> TextGenerator:
    """An untrained model with large weights, so that it does not only repeat itself; of bytes without `chars`."""
    tokenizer = ByteTokenizer() if chars is None else CharTokenizer(chars)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": BLOCK} | shape
    torch.manual_seed(3)
    model = GPT(ModelConfig(vocab_size=tokenizer.vocab_size, position=position, **sizes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(30.0 if ".c_" in name else 4.0)
    return TextGenerator(model, tokenizer)
