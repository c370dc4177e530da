"""Decoding with the dense cache against decoding without one, at the baby shape."""

import dataclasses

import torch

from fastgpt import dispatch
from fastgpt.config import PRESETS
from fastgpt.generate import TextGenerator
from fastgpt.model import GPT
from fastgpt.tokenizer import ByteTokenizer

PROMPT = "ROMEO:\n"
NEW_TOKENS = 240


def test_dense_cache(against):
    torch.manual_seed(0)
    config = dataclasses.replace(PRESETS["baby"], vocab_size=256)
    cpu, ops = torch.device("cpu"), dispatch.resolve("torch")
    weights = GPT(config).weights()
    generator = TextGenerator(GPT.from_weights(config, ops, weights, cpu, torch.float32), ByteTokenizer())

    def decode(cache: str) -> None:
        text = generator.stream(PROMPT, cache=cache, max_new_tokens=NEW_TOKENS)
        for _ in text.tokens():
            pass

    ours, peer = (lambda: decode("dense")), (lambda: decode("none"))
    against(ours, peer, rounds=5, units=NEW_TOKENS, peer_name="without a cache", aim=10)
