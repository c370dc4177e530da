"""Sizes that cannot fit are refused from the configuration alone, and no others."""

import dataclasses
import time

import pytest
import torch

from fastgpt.config.model import ModelConfig
from fastgpt.config.training import PRESETS, TrainConfig
from fastgpt.errors import UsageError
from fastgpt.model import memory
from fastgpt.model.facts import count_parameters, position_table_bytes
from fastgpt.model.gpt import GPT
from fastgpt.model.kv_cache import DenseCache
from fastgpt.model.positions import position_table

CPU = torch.device("cpu")
SMALL = TrainConfig(vocab_size=65, n_layer=2, n_head=2, n_embd=16, block_size=8, batch_size=2)


@pytest.mark.parametrize("position", ["learned", "sinusoidal", "rotary", "none"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("H", "Hkv"), [(4, None), (4, 2), (4, 1), (1, 1)])
def test_the_parameters_are_counted_without_a_model(position: str, bias: bool, H: int, Hkv: int | None):
    config = ModelConfig(
        vocab_size=65, block_size=12, n_layer=3, n_head=H, n_kv_head=Hkv, n_embd=24, bias=bias, position=position
    )
    assert count_parameters(config) == GPT(config).num_parameters()


def test_gpt2_has_the_published_number_of_parameters():
    assert count_parameters(PRESETS["gpt2"]) == 124_439_808
    assert count_parameters(PRESETS["gpt2-xl"]) == 1_557_611_200


@pytest.mark.parametrize("position", ["learned", "sinusoidal", "rotary", "none"])
def test_the_table_of_positions_has_the_size_that_is_told(position: str):
    config = ModelConfig(vocab_size=65, block_size=12, n_head=4, n_embd=24, position=position)
    table = position_table(config)
    assert position_table_bytes(config) == (0 if table is None else table.nbytes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_layer": 10**9}, ["`n_layer` 1000000000"]),
        ({"n_layer": 2**63 - 1, "n_embd": 65536}, ["`n_layer`", "`n_embd` 65536"]),
        ({"n_layer": 1000, "n_embd": 65536}, ["`n_layer` 1000", "`n_embd` 65536"]),
        ({"block_size": 10**10}, ["`block_size` 10000000000"]),
        ({"block_size": 10**10, "position": "rotary"}, ["`block_size` 10000000000"]),
        ({"block_size": 10**12, "position": "none"}, ["`block_size` 1000000000000"]),
        ({"batch_size": 10**12}, ["`batch_size` 1000000000000"]),
        ({"gradient_accumulation_steps": 10**12}, ["`gradient_accumulation_steps` 1000000000000"]),
    ],
)
def test_what_cannot_fit_is_refused_with_the_need_and_what_is_free(changes: dict, words: list[str]):
    began = time.perf_counter()
    with pytest.raises(UsageError) as error:
        memory.check_training(dataclasses.replace(SMALL, **changes), CPU)
    assert time.perf_counter() - began < 10  # a billion layers, built one by one, take days
    message = str(error.value)
    assert [word for word in (*words, "GiB of memory", "GiB free", "pass less") if word not in message] == [], message
    assert "\n" not in message


def test_the_limit_is_what_is_free(monkeypatch: pytest.MonkeyPatch):
    need = 16 * count_parameters(SMALL) + 2 * 8 * 16
    monkeypatch.setattr(memory, "free_memory", lambda device: need)
    memory.check_training(SMALL, CPU)
    monkeypatch.setattr(memory, "free_memory", lambda device: need - 1)
    with pytest.raises(UsageError, match="`batch_size` 2 with `block_size` 8"):
        memory.check_training(SMALL, CPU)


@pytest.mark.parametrize("preset", ["mini", "cpu", "baby", "gpt2"])
def test_presets_for_one_machine_pass(preset: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 16 << 30)
    memory.check_training(dataclasses.replace(PRESETS[preset], vocab_size=50257), CPU)


def test_a_dense_cache_that_cannot_fit_is_refused():
    config = ModelConfig(vocab_size=65, n_layer=2, n_head=2, n_embd=16, block_size=10**12, position="none")
    with pytest.raises(UsageError, match=r"`cache` dense takes 256,000,000,000,000 bytes .* use `cache` paged"):
        DenseCache(config)
