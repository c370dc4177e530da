"""Draws the sample that a training run shows of its model."""

from collections.abc import Iterator

from fastgpt.generation.generator import TextGenerator
from fastgpt.model.gpt import GPT
from fastgpt.tokenizer.base import Tokenizer

SAMPLE_TOKENS = 200


def sample(model: GPT, tokenizer: Tokenizer, opening: str, seed: int) -> Iterator[str]:
    """Continue the opening by `SAMPLE_TOKENS` tokens, piece by piece; the model must be in evaluation mode."""
    return TextGenerator(model, tokenizer).stream(opening, max_new_tokens=SAMPLE_TOKENS, seed=seed)
