"""The forward pass over chunks: decode steps padded to the sizes of CUDA graphs, on a CPU without the graphs."""

import pytest
import torch

from fastgpt import dispatch, runner
from fastgpt.config import SamplingParams
from fastgpt.generate import TextGenerator
from fastgpt.kv_cache import PagedStep, Part
from fastgpt.model import GPT
from fastgpt.runner import graph_sizes
from tests.test_generate import fresh

PROMPTS = ["abc", "a", "jihgfedcba", "bb", "cab"]
PARAMS = SamplingParams(temperature=0, max_new_tokens=12)


class Replayed:
    """Stands in for a CUDA graph: the same step on the same buffers, run anew."""

    sizes: list[int]

    def __init__(self, owner: runner.Runner, size: int):
        self.owner, self.size = owner, size
        Replayed.sizes.append(size)

    def replay(self, longs: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
        assert longs.shape == (3, self.size)
        assert tables.shape == (self.size, 1 + self.owner.most_pages)
        tokens, at, slots = longs
        assert torch.equal(slots < 0, tables[:, 0] == 0)  # padding is padding in both
        cache, part = self.owner.cache, Part(tables[:, 1:], tables[:, 0])
        step = PagedStep(cache.keys, cache.values, at, slots, part, None)
        return self.owner.forward(tokens[None], step, None)


@pytest.fixture(scope="module")
def generator() -> TextGenerator:
    return fresh(block_size=32, n_head=4, n_kv_head=2)


@pytest.mark.parametrize("column", ["torch", "reference"])
def test_padded_decode_steps_give_the_same_tokens(monkeypatch, generator: TextGenerator, column: str):
    monkeypatch.setattr(runner, "DecodeGraph", Replayed)
    Replayed.sizes = []
    model = GPT(generator.model.config, dispatch.resolve(column)).eval()
    model.load_state_dict(generator.model.state_dict())
    generator = TextGenerator(model, generator.tokenizer)
    wanted = [one.tokens for one in generator.engine(kv_memory=10**6).generate(PROMPTS, PARAMS)]
    engine = generator.engine(kv_memory=10**6, max_batch=5)
    engine.runner.graph_sizes = graph_sizes(5)
    uneven = [SamplingParams(temperature=0, max_new_tokens=count) for count in (12, 3, 12, 5, 7)]
    found = [one.tokens for one in engine.generate(PROMPTS, uneven)]
    assert found == [tokens[: one.max_new_tokens] for tokens, one in zip(wanted, uneven, strict=True)]
    assert sorted(Replayed.sizes) == [2, 4, 8]  # 2, 3 and 4, 5 sequences


def test_without_memory_for_graphs_decoding_goes_on(monkeypatch, generator: TextGenerator):
    def no_memory(*_):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(runner, "DecodeGraph", no_memory)
    engine = generator.engine(kv_memory=10**6)
    engine.runner.graph_sizes = graph_sizes(64)
    with pytest.warns(UserWarning, match="no memory for CUDA graphs.*lower --kv_memory"):
        (found,) = engine.generate(["abc"], PARAMS)
    assert found.text == generator.generate("abc", temperature=0, max_new_tokens=12)
    assert engine.runner.graph_sizes == []


@pytest.mark.parametrize(
    ("most", "sizes"),
    [(1, [1]), (2, [1, 2]), (3, [1, 2, 4]), (8, [1, 2, 4, 8]), (9, [1, 2, 4, 8, 16]), (33, [1, 2, 4, 8, 16, 32, 48])],
)
def test_sizes_of_graphs(most: int, sizes: list[int]):
    assert graph_sizes(most) == sizes
