"""Attention maps of every kind of model, against softmax by hand from the activations of the fast backend."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

import fastgpt
from fastgpt.config.model import ModelConfig
from fastgpt.errors import UsageError
from fastgpt.generation.generator import TextGenerator
from fastgpt.inspection import attention, attention_maps
from fastgpt.model.gpt import GPT
from fastgpt.model.int8 import quantize_model
from fastgpt.tokenizer.byte import ByteTokenizer
from fastgpt.tokenizer.char import CharTokenizer
from fastgpt_kernels import reference
from tests.helpers import gguf_files, gpt2_folders, packed, runs

TEXT = "abcabd\na b"
CHARS = CharTokenizer("\n abcdefgh")
SHAPE = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 16}


def generator_of(tokenizer=CHARS, packed_run: bool = False, **shape) -> TextGenerator:
    """An untrained model whose heads differ clearly in what they attend to."""
    torch.manual_seed(2)
    model = GPT(ModelConfig(vocab_size=tokenizer.vocab_size, **SHAPE | shape)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.5 if "c_attn" in name else 0.1)
    return TextGenerator(model, tokenizer, packed_run)


def by_hand(generator: TextGenerator, tokens: np.ndarray, documents: np.ndarray | None = None) -> np.ndarray:
    """The maps (L, H, T, T) in float64 from the products that the model's own linear layers gave.

    Rotary positions turn complex numbers, whose real parts are the first half of a head.
    """
    model, heads, T = generator.model, [], len(tokens)
    hooks = [block.attn.c_attn.register_forward_hook(lambda _, __, y: heads.append(y[0])) for block in model.h]
    with torch.no_grad():
        model(torch.tensor(tokens)[None], doc_ids=None if documents is None else torch.tensor(documents)[None])
    for hook in hooks:
        hook.remove()
    H, Hkv, D = model.config.n_head, model.config.kv_heads, model.config.head_dim
    own = np.zeros(T, int) if documents is None else documents
    maps = np.zeros((len(heads), H, T, T))
    for layer, product in enumerate(heads):
        rows = product.double().numpy().reshape(T, H + 2 * Hkv, D)
        if model.config.position == "rotary":
            angle = np.arange(T)[:, None] * 10000.0 ** (-np.arange(0, D, 2) / D)
            turned = (rows[..., : D // 2] + 1j * rows[..., D // 2 :]) * np.exp(1j * angle)[:, None]
            rows = np.concatenate([turned.real, turned.imag], axis=-1)
        for head in range(H):
            for i in range(T):
                keys = [j for j in range(i + 1) if own[j] == own[i]]
                scores = np.array([rows[i, head] @ rows[j, H + head * Hkv // H] for j in keys]) / math.sqrt(D)
                maps[layer, head, i, keys] = np.exp(scores) / np.exp(scores).sum()
    return maps


def check(generator: TextGenerator, found: attention.AttentionMaps, atol: float = 1e-5) -> None:
    """What holds for every model: the maps by hand, rows, masks, and the probabilities of its own fast backend."""
    T, config = len(found.tokens), generator.model.config
    assert found.maps.shape == (config.n_layer, config.n_head, T, T)
    assert found.maps.dtype == found.probabilities.dtype == np.float32
    np.testing.assert_allclose(found.maps, by_hand(generator, found.tokens, found.documents), atol=atol)
    np.testing.assert_allclose(found.maps.sum(-1), 1, atol=1e-5)
    assert (found.maps[:, :, ~np.tri(T, dtype=bool)] == 0).all()
    documents = None if found.documents is None else torch.tensor(found.documents)[None]
    with torch.no_grad():
        logits = generator.model(torch.tensor(found.tokens)[None], doc_ids=documents)[0]
    assert generator.model.ops.backends["causal_attention"] == "torch"
    np.testing.assert_allclose(found.probabilities, logits.softmax(-1).numpy(), atol=1e-4)


@pytest.mark.parametrize("position", ["learned", "rotary", "sinusoidal", "none"])
@pytest.mark.parametrize("n_kv_head", [None, 2, 1])
def test_maps_are_the_models_own(position: str, n_kv_head: int | None):
    generator = generator_of(position=position, n_kv_head=n_kv_head)
    found = attention_maps(generator, TEXT)
    check(generator, found)
    assert found.tokens.tolist() == CHARS.encode(TEXT).tolist()
    assert found.texts == tuple(TEXT)
    assert found.documents is None
    assert found.maps.max(-1)[:, :, 5:].mean() > 0.3, "heads that attend to all keys alike would show nothing"


def test_documents_of_a_packed_run_stay_apart():
    tokenizer = ByteTokenizer(ends=True)
    end = tokenizer.end_token
    generator = generator_of(tokenizer, packed_run=True)
    found = attention_maps(generator, "ab<|endoftext|>abc<|endoftext|>d")
    assert found.tokens.tolist() == [97, 98, end, 97, 98, 99, end, 100]
    assert found.documents.tolist() == [0, 0, 1, 1, 1, 1, 2, 2]
    assert found.texts[2] == "<|endoftext|>"
    check(generator, found)
    assert (found.maps[:, :, found.documents[:, None] != found.documents] == 0).all()
    alone = packed.logits_alone(generator.model, torch.tensor(found.tokens)[None], end)[0].softmax(-1)
    np.testing.assert_allclose(found.probabilities, alone.detach().numpy(), atol=1e-5)


def test_token_ids_are_a_text_too():
    generator = generator_of()
    np.testing.assert_array_equal(attention_maps(generator, [2, 3, 4]).maps, attention_maps(generator, "abc").maps)


def test_a_run_is_read(tmp_path: Path):
    out_dir = runs.run_in(tmp_path, "--n_layer 2 --position rotary")
    generator = fastgpt.load(out_dir, dtype="float32", device="cpu")
    check(generator, attention_maps(generator, "The qui"))


@pytest.mark.parametrize("form", ["huggingface", "gguf"])
def test_other_programs_models_are_read(tmp_path: Path, form: str):
    path = tmp_path / ("model.gguf" if form == "gguf" else "folder")
    if form == "gguf":
        pytest.importorskip("gguf", reason="reads .gguf files")
        gguf_files.written(path, ByteTokenizer())
    else:
        gpt2_folders.folder_of(path)
    generator = fastgpt.load(path, dtype="float32", device="cpu")
    check(generator, attention_maps(generator, "cab dag"))


def test_weights_are_shared_with_a_model_in_float32():
    generator = generator_of()
    before = [parameter.requires_grad for parameter in generator.model.parameters()]
    seen = attention.observe(generator.model, torch.tensor([1, 2]), None, lambda *_: None)
    for theirs, own in zip(seen.model.parameters(), generator.model.parameters(), strict=True):
        assert theirs.data_ptr() == own.data_ptr()
    assert [parameter.requires_grad for parameter in generator.model.parameters()] == before
    assert not any(block._forward_hooks for block in generator.model.h)


def test_int8_weights_are_read():
    generator = generator_of(position="rotary")
    exact = attention_maps(generator, TEXT)
    quantize_model(generator.model)
    found = attention_maps(generator, TEXT)
    check(generator, found)
    assert not np.array_equal(found.maps, exact.maps)


def test_narrow_weights_are_computed_in_float32():
    narrow, wide = generator_of(), generator_of()
    narrow.model.bfloat16()
    wide.model.load_state_dict(narrow.model.state_dict())  # rounded, in float32
    np.testing.assert_array_equal(attention_maps(narrow, TEXT).maps, attention_maps(wide, TEXT).maps)


def test_the_reference_attends_by_these_weights():
    q, k, v = (torch.randn(2, T, heads, 4) for T, heads in ((3, 4), (5, 2), (5, 2)))
    weights = reference.attention_weights(q, k, scale=0.7)
    assert weights.shape == (2, 4, 3, 5)
    for head in range(4):
        y = weights[:, head] @ v[:, :, head // 2]
        torch.testing.assert_close(y, reference.causal_attention(q, k, v, scale=0.7)[:, :, head])
    assert (weights[:, :, 0, 3:] == 0).all()


@pytest.mark.parametrize(
    ("text", "saying"),
    [
        ("", "`text` is empty"),
        ([], "`text` is empty"),
        ("a" * 17, "`text` has 17 tokens, and the model's context is 16"),
        ("xyz", "lacks 'x'"),
        ([3, 10], "token 10 is outside the vocabulary of 10 tokens"),
        ([2.5], "a prompt is text or a list of token ids"),
    ],
)
def test_a_text_that_cannot_be_read_is_refused(text: str | list, saying: str):
    with pytest.raises(UsageError, match=saying):
        attention_maps(generator_of(), text)


def test_too_long_a_text_for_maps_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attention, "MOST_TOKENS", 4)
    with pytest.raises(UsageError, match="`text` has 5 tokens, and maps are drawn of at most 4"):
        attention_maps(generator_of(), "abcde")
