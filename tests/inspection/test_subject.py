"""The settings of a view come from a preset or from a model, and what was given changes them."""

from pathlib import Path
from typing import Any

import pytest

from fastgpt.config.inspection import MemoryConfig
from fastgpt.config.training import PRESETS
from fastgpt.errors import UsageError
from fastgpt.inspection import subject
from tests.helpers import gpt2_folders, runs

SHAPE = ("n_layer", "n_head", "n_embd", "block_size", "batch_size", "dropout")


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_gives_what_a_run_of_it_would_have(preset: str):
    config, source, _ = subject.complete(MemoryConfig, preset, {"max_batch": 3})
    assert source is None
    assert [getattr(config, name) for name in SHAPE] == [getattr(PRESETS[preset], name) for name in SHAPE]
    assert config.vocab_size == (PRESETS[preset].vocab_size or 96)
    assert config.max_batch == 3


def test_the_assumed_vocabulary_is_said():
    _, _, why = subject.complete(MemoryConfig, "mini", {})
    assert why == "preset mini; 96 tokens are assumed, `vocab_size` sets another number"
    config, _, why = subject.complete(MemoryConfig, "mini", {"vocab_size": 500})
    assert config.vocab_size == 500
    assert "assumed" not in why


def test_a_run_gives_its_own_settings(workplace: Path):
    runs.run("--dropout 0.25 --batch_size 3 --position rotary --n_kv_head 1")
    config, source, _ = subject.complete(MemoryConfig, None, {"src": "out", "batch_size": 5})
    assert source is not None
    assert (config.dropout, config.batch_size, config.position, config.n_kv_head) == (0.25, 5, "rotary", 1)
    assert config.vocab_size == source.required_tokenizer().vocab_size
    assert config.training().architecture() == config.architecture()


def test_a_foreign_model_gives_its_shape(tmp_path: Path):
    model = gpt2_folders.folder_of(tmp_path / "hf", n_layer=3)
    config, source, _ = subject.complete(MemoryConfig, None, {"src": str(tmp_path / "hf")})
    assert source is not None
    assert config.architecture() == model.config
    assert config.batch_size == MemoryConfig.batch_size


@pytest.mark.parametrize(
    ("preset", "given", "saying"),
    [
        ("mini", {"src": "hf"}, "`preset` mini and `src` hf: both name a model"),
        (None, {"src": "nowhere"}, "`src` nowhere is no file or folder here"),
        (None, {"src": "hf", "n_layer": 7}, "`n_layer` 7: the weights of hf are for "),
        ("mini", {"n_head": 3}, "`n_head` 3 does not divide `n_embd` 64"),
        ("mini", {"download": True}, "`download` fetches the model that `src` names"),
    ],
)
def test_settings_that_do_not_go_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preset: str | None, given: dict[str, Any], saying: str
):
    monkeypatch.chdir(tmp_path)
    gpt2_folders.folder_of(tmp_path / "hf")
    with pytest.raises(UsageError) as raised:
        subject.complete(MemoryConfig, preset, given)
    assert saying in str(raised.value)
