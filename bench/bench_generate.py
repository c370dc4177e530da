"""Decoding with the dense cache against decoding without one, at the baby shape."""

import dataclasses

import torch

from fastgpt.config import PRESETS
from fastgpt.generate import TextGenerator
from fastgpt.model import GPT
from fastgpt.tokenizer import ByteTokenizer

PROMPT = "ROMEO:\n"
NEW_TOKENS = 240


def test_dense_cache(against):
    torch.manual_seed(0)
    config = dataclasses.replace(PRESETS["baby"], vocab_size=256)
    generator = TextGenerator(GPT(config).eval(), ByteTokenizer())

    def decode(cache: str) -> None:
        text = generator.stream(PROMPT, cache=cache, max_new_tokens=NEW_TOKENS)
        for _ in text.tokens():
            pass

    against(lambda: decode("dense"), lambda: decode("none"), rounds=5, units=NEW_TOKENS, peer="without a cache", aim=10)
