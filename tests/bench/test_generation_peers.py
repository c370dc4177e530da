"""The peers of bench/bench_generate.py compute what our model does: the same greedy tokens from the same weights."""

import gc
import os

import pytest
import torch

from bench.peers.apart import Apart
from bench.peers.generation import PACKAGES, Peer, installed, make_peers, own_facts
from fastgpt.config.model import ModelConfig
from fastgpt.generation.generator import TextGenerator
from fastgpt.model.gpt import GPT
from fastgpt.tokenizer.byte import ByteTokenizer

PROMPTS, NEW = [[3, 141, 59, 26, 5, 35], [97], [89, 79, 32]], 12


def untrained() -> GPT:
    """Weights so large that each next token depends on all before it, and no two are nearly as likely."""
    torch.manual_seed(4)
    model = GPT(ModelConfig(vocab_size=256, n_layer=2, n_head=2, n_embd=64, block_size=64)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(8.0 if ".c_" in name else 4.0)
            if name.endswith("bias"):
                parameter.normal_(0.0, 0.5)
    return model


def ours(prompts: list[list[int]], count: int) -> list[list[int]]:
    generator = TextGenerator(untrained(), ByteTokenizer())
    return [list(generator.stream(prompt, temperature=0, max_new_tokens=count).tokens()) for prompt in prompts]


def only(name: str) -> Peer:
    """The peer of this name; skips the test where it is not installed."""
    missing = [package for package in PACKAGES[name.split(" ")[0]] if not installed(package)]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed: pip install fastgpt-engine[bench]")
    peers, left_out = make_peers([name], untrained())
    assert left_out == []
    return peers[name]


@pytest.mark.parametrize("name", ["llama.cpp f32", "transformers float32", "ctranslate2 float32"])
def test_a_float32_peer_gives_our_tokens(name: str):
    peer = only(name)
    wanted = ours(PROMPTS, NEW)
    assert all(len(set(tokens)) > NEW // 2 for tokens in wanted)
    assert peer(PROMPTS, NEW) == wanted


@pytest.mark.parametrize("name", ["llama.cpp f16", "llama.cpp q8_0", "transformers bfloat16", "ctranslate2 int8"])
def test_a_rounded_peer_begins_as_we_do(name: str):
    """Rounded weights change a score by percents: enough to change a continuation in the end, not to begin another."""
    peer = only(name)
    assert peer(PROMPTS, 1) == ours(PROMPTS, 1)


def test_what_is_not_installed_is_left_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("bench.peers.generation.installed", lambda package: False)
    names = ["llama.cpp q8_0", "ctranslate2 int8", "transformers bfloat16 static"]
    assert make_peers(names, untrained()) == ({}, names)


class Toy:
    """Answers with its process and threads, the sum of a weight, and what it was asked."""

    def __init__(self, model: GPT, threads: int, kind: str):
        if kind == "broken":
            raise ValueError("no such kind")
        self.threads, self.total = threads, int(model.wte.weight.sum() * 1000)

    def __call__(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        if not prompts:
            os._exit(3)
        if new_tokens < 0:
            raise ValueError("fewer than none")
        return [
            [os.getpid(), self.threads, torch.get_num_threads(), self.total, new_tokens, *prompt] for prompt in prompts
        ]

    def facts(self) -> dict[str, int]:
        return {"seen": self.total}


@pytest.mark.slow
def test_a_peer_has_a_process_of_its_own():
    model = untrained()
    toy = Apart("a toy", Toy, model, "good")
    ((pid, *said),) = toy([(7, 8)], 3)
    total = int(model.wte.weight.sum() * 1000)
    assert said == [torch.get_num_threads(), 1, total, 3, 7, 8]
    assert pid != os.getpid()
    assert own_facts({"toy": toy, "one here": lambda prompts, count: []}) == {"seen": total}
    del toy
    gc.collect()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.slow
def test_a_peer_that_fails_says_why_each_time():
    with pytest.raises(RuntimeError, match="a toy: ValueError: no such kind"):
        Apart("a toy", Toy, untrained(), "broken")
    toy = Apart("a toy", Toy, untrained(), "good")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="a toy: ValueError: fewer than none"):
            toy([[1]], -1)
    for call in (lambda: toy([], 1), lambda: toy([[1]], 1), toy.facts):
        with pytest.raises(RuntimeError, match="the process of a toy has ended"):
            call()


def test_llama_cpp_says_how_fast_it_was_by_its_own_clock():
    peer = only("llama.cpp f32")
    assert own_facts({"it": peer})["llama_cpp"].keys() == {"build"}
    peer(PROMPTS, NEW)
    assert own_facts({"it": peer})["llama_cpp"]["decode_tokens_per_second"] > 0
