"""The dense cache: generating on top of it gives what one pass over all tokens gives."""

import pytest
import torch

from fastgpt.config.model import ModelConfig
from fastgpt.model.gpt import GPT
from fastgpt.model.kv_cache import DenseCache
from fastgpt.ops import table

V, T = 31, 12


def model_and_tokens(backend="torch", dtype=torch.float32, **changes):
    torch.manual_seed(0)
    shape = {"vocab_size": V, "block_size": T, "n_layer": 2, "n_head": 4, "n_embd": 16, **changes}
    model = GPT(ModelConfig(**shape), table.resolve(backend)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5 if parameter.dim() == 2 else 1)
    return model, torch.randint(V, (3, T))


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("position", ["learned", "sinusoidal", "rotary", "none"])
@pytest.mark.parametrize("n_kv_head", [None, 2, 1])
@pytest.mark.parametrize("chunks", [[T], [1] * T, [5, 1, 3, 2, 1]])
def test_cached_logits_are_those_of_one_pass(chunks, n_kv_head, position, backend):
    model, tokens = model_and_tokens(backend, torch.float64, position=position, n_kv_head=n_kv_head)
    cache = DenseCache(model.config, B=3, dtype=torch.float64)
    with torch.no_grad():
        parts = [model(part, cache=cache) for part in tokens.split(chunks, dim=1)]
        expected = model(tokens)
    assert cache.length == T
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-10, atol=1e-10)


def test_float32_logits_through_the_cache_stay_close():
    model, tokens = model_and_tokens(position="rotary")
    cache = DenseCache(model.config, B=3)
    with torch.no_grad():
        parts = [model(part, cache=cache) for part in tokens.split([4, 1, 1, 6], dim=1)]
        expected = model(tokens)
    assert (torch.cat(parts, dim=1) - expected).norm() < 1e-5 * expected.norm()


def test_only_new_tokens_are_computed():
    model, tokens = model_and_tokens()
    cache = DenseCache(model.config, B=3)
    with torch.no_grad():
        model(tokens[:, :7], cache=cache)
        assert model(tokens[:, 7:8], cache=cache).shape == (3, 1, V)
        assert model(tokens[:, 8:], cache=cache, last_only=True).shape == (3, 1, V)


def test_a_cleared_cache_is_as_a_new_one():
    model, tokens = model_and_tokens()
    cache = DenseCache(model.config, B=3)
    with torch.no_grad():
        model(tokens.flip(1), cache=cache)
        cache.clear()
        assert cache.length == 0
        assert torch.equal(model(tokens[:, :5], cache=cache), model(tokens[:, :5], cache=DenseCache(model.config, 3)))


def test_append_returns_all_so_far_and_keeps_layers_apart():
    config = ModelConfig(block_size=6, n_layer=2, n_head=4, n_kv_head=2, n_embd=12)
    cache, (k, v) = DenseCache(config, B=2), torch.randn(2, 2, 5, 2, 3)
    for layer, sign in ((0, 1), (1, -1)):
        cache.append(layer, sign * k[:, :3], sign * v[:, :3])
    cache.advance(3)
    for layer, sign in ((0, 1), (1, -1)):
        keys, values = cache.append(layer, sign * k[:, 3:], sign * v[:, 3:])
        assert torch.equal(keys, sign * k)
        assert torch.equal(values, sign * v)


def test_capacity_is_block_size_and_more_is_an_error():
    model, tokens = model_and_tokens()
    cache = DenseCache(model.config, B=3)
    assert cache.capacity == T
    with torch.no_grad():
        model(tokens, cache=cache)
        with pytest.raises(ValueError, match=f"{T + 1} tokens do not fit"):
            model(tokens[:, :1], cache=cache)
    with pytest.raises(ValueError, match=f"{T + 2} tokens do not fit in a cache of {T}"):
        cache.append(0, *torch.zeros(2, 3, 2, 4, 4))


def test_dtype_and_size_are_those_asked_for():
    config = ModelConfig(block_size=6, n_layer=1, n_head=4, n_kv_head=2, n_embd=12)
    keys, _ = DenseCache(config, B=2, dtype=torch.bfloat16).append(0, *torch.ones(2, 2, 4, 2, 3))
    assert (keys.shape, keys.dtype) == ((2, 4, 2, 3), torch.bfloat16)


def test_a_fork_goes_on_from_chosen_sequences_and_leaves_the_cache_alone():
    model, tokens = model_and_tokens(dtype=torch.float64)
    cache, rows = DenseCache(model.config, B=3, capacity=7, dtype=torch.float64), torch.tensor([2, 0, 2, 2])
    with torch.no_grad():
        model(tokens[:, :7], cache=cache)
        fork = cache.fork(rows, 5)
        assert (fork.length, fork.capacity, cache.length) == (7, 12, 7)
        found = model(tokens[rows, 7:], cache=fork)
        again = model(tokens[rows, 7:], cache=cache.fork(rows, 5))
        expected = model(tokens[rows])[:, 7:]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert torch.equal(found, again)
