"""Presets, defaults, and what `validate` refuses: each message names the argument, the value and the way out."""

import dataclasses
import math
import typing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt.config.fields import validate
from fastgpt.config.generation import GenerateConfig
from fastgpt.config.model import ModelConfig
from fastgpt.config.training import PRESETS, TrainConfig
from fastgpt.errors import UsageError

KINDS = (ModelConfig, TrainConfig, GenerateConfig)  # the second holds all of the first
FIELDS = [pytest.param(kind, f, id=f"{kind.__name__}.{f.name}") for kind in KINDS[1:] for f in dataclasses.fields(kind)]
LIMITED = [
    p for p in FIELDS if any(p.values[1].metadata[name] is not None for name in ("low", "above", "high", "below"))
]
FLOATS = [
    p for p in FIELDS if float in (typing.get_args(h := typing.get_type_hints(p.values[0])[p.values[1].name]) or (h,))
]


def refused(config, *words):
    """`validate` raises one line that holds each of the words."""
    with pytest.raises(UsageError) as caught:
        validate(config)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert str(word) in message


@pytest.mark.parametrize(
    ("preset", "L", "H", "C", "block", "batch", "accumulated", "lr", "iters", "dropout"),
    [
        ("mini", 4, 4, 64, 128, 16, 1, 1e-3, 1_000, 0.0),
        ("cpu", 4, 4, 128, 64, 12, 1, 1e-3, 2_000, 0.0),
        ("baby", 6, 6, 384, 256, 64, 1, 1e-3, 5_000, 0.2),
        ("gpt2", 12, 12, 768, 1024, 12, 40, 6e-4, 600_000, 0.0),
        ("gpt2-medium", 24, 16, 1024, 1024, 12, 40, 3e-4, 600_000, 0.0),
        ("gpt2-large", 36, 20, 1280, 1024, 12, 40, 2.5e-4, 600_000, 0.0),
        ("gpt2-xl", 48, 25, 1600, 1024, 12, 40, 2e-4, 600_000, 0.0),
    ],
)
def test_presets_have_the_published_numbers(preset, L, H, C, block, batch, accumulated, lr, iters, dropout):
    c = PRESETS[preset]
    assert (c.n_layer, c.n_head, c.n_embd, c.block_size) == (L, H, C, block)
    assert (c.batch_size, c.gradient_accumulation_steps) == (batch, accumulated)
    assert (c.learning_rate, c.max_iters, c.dropout) == (lr, iters, dropout)
    assert c.vocab_size == (50257 if preset.startswith("gpt2") else None)
    assert c.tokens_per_step == block * batch * accumulated
    assert (c.decay_iters, c.final_lr) == (iters, pytest.approx(lr / 10))
    validate(c)


def test_the_table_of_presets_is_complete():
    modern, nanogpt = ["modern-cpu", "modern-baby", "modern-124m"], ["cpu", "baby", "gpt2", "gpt2-medium", "gpt2-large"]
    assert list(PRESETS) == [*modern, "mini", *nanogpt, "gpt2-xl"]
    assert all(PRESETS[name].optimizer == "muon" for name in modern)


def test_nanogpts_recipes_keep_its_model_and_optimizer():
    for name in ("cpu", "baby", "gpt2"):
        config, default = PRESETS[name], TrainConfig()
        options = [f.name for f in dataclasses.fields(ModelConfig) if f.name not in ("vocab_size", "dropout")]
        sizes = ("block_size", "n_layer", "n_head", "n_embd")
        assert all(getattr(config, option) == getattr(default, option) for option in options if option not in sizes)
        assert (config.optimizer, config.schedule, config.dtype) == ("adamw", "cosine", "auto")
    assert [PRESETS[name].tokenizer for name in ("cpu", "baby", "gpt2")] == ["char", "char", "gpt2"]


@pytest.mark.parametrize("kind", KINDS)
def test_defaults_are_valid(kind):
    validate(kind())


@pytest.mark.parametrize(("kind", "field"), FIELDS)
def test_every_field_has_help(kind, field):
    assert len(field.metadata["help"]) > 10


def test_decay_and_final_rate_follow_unless_given():
    assert TrainConfig(max_iters=70).decay_iters == 70
    assert TrainConfig(max_iters=70, lr_decay_iters=50).decay_iters == 50
    assert TrainConfig(learning_rate=0.5).final_lr == pytest.approx(0.05)
    assert TrainConfig(learning_rate=0.5, min_lr=0.0).final_lr == 0.0


@pytest.mark.parametrize(("vocab_size", "padded"), [(1, 128), (65, 128), (128, 128), (129, 256), (50257, 50304)])
def test_vocabulary_is_padded_to_a_multiple_of_128(vocab_size, padded):
    assert ModelConfig(vocab_size=vocab_size).padded_vocab == padded


def test_a_runs_model_is_its_part_of_the_configuration():
    run = dataclasses.replace(PRESETS["baby"], vocab_size=65)
    assert run.architecture() == ModelConfig(65, 256, 6, 6, None, 384, 0.2)


def test_configurations_do_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().seed = 1


@pytest.mark.parametrize(("kind", "field"), LIMITED)
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_numbers_outside_the_limits_are_refused(kind, field, data):
    m, kinds = field.metadata, typing.get_type_hints(kind)[field.name]
    whole = int in (typing.get_args(kinds) or (kinds,))
    make = st.integers if whole else lambda a=None, b=None: st.floats(a, b, allow_nan=False, allow_infinity=False)
    outside = []
    if m["low"] is not None:
        outside.append((m["low"], make(None, m["low"]).filter(lambda x: x < m["low"]), "at least"))
    if m["above"] is not None:
        outside.append((m["above"], make(None, m["above"]), "above"))
    if m["high"] is not None:
        outside.append((m["high"], make(m["high"], None).filter(lambda x: x > m["high"]), "at most"))
    if m["below"] is not None:
        outside.append((m["below"], make(m["below"], None), "below"))
    limit, numbers, words = data.draw(st.sampled_from(outside))
    value = data.draw(numbers)
    refused(dataclasses.replace(kind(), **{field.name: value}), f"`{field.name}` {value} must be {words} {limit}")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("kind", "field"), FLOATS)
def test_numbers_that_are_not_finite_are_refused(kind, field, value):
    refused(dataclasses.replace(kind(), **{field.name: value}), f"`{field.name}` {value}", "finite")


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("n_layer", 6.0, "int"),
        ("n_layer", "6", "int"),
        ("n_layer", True, "int"),
        ("n_layer", None, "int"),
        ("n_kv_head", 2.5, "int"),
        ("dropout", "0.1", "float"),
        ("dropout", False, "float"),
        ("bias", 1, "bool"),
        ("compile", "true", "bool"),
        ("out_dir", 3, "str"),
        ("min_lr", [0.1], "float"),
    ],
)
def test_values_of_another_type_are_refused(field, value, wanted):
    refused(dataclasses.replace(TrainConfig(), **{field: value}), f"`{field}` {value!r}", f"type {wanted}")


@pytest.mark.parametrize("value", [2**63, 10**30, 10**400, 10**5000], ids=["64 bits", "30", "400", "5000"])
def test_whole_numbers_beyond_64_bits_are_refused(value):
    for field in ("max_iters", "log_interval", "n_layer", "learning_rate", "max_minutes"):
        refused(TrainConfig(**{field: value}), f"`{field}` ", "must be at most 9223372036854775807")
    refused(GenerateConfig(stop_tokens=(1, value)), "`stop_tokens` ", "must be at most 9223372036854775807")
    refused(GenerateConfig(stop_tokens=(-value - 1,)), "`stop_tokens` ", "must be at least -9223372036854775808")
    refused(TrainConfig(seed=value), "`seed` ", "must be at most 9223372036854775807")
    refused(TrainConfig(out_dir=value), "`out_dir` ", "is not of type str")


def test_the_largest_whole_number_is_taken():
    validate(TrainConfig(max_iters=2**63 - 1, log_interval=2**63 - 1))


PATHS = [p for p in FIELDS if p.values[1].metadata["path"]]


@pytest.mark.parametrize(
    ("value", "words"), [("", ["''", "is empty"]), ("a\0b", [r"'a\x00b'", "NUL"]), ("a\ud800", [r"'a\ud800'", "UTF-8"])]
)
@pytest.mark.parametrize(("kind", "field"), PATHS)
def test_a_name_that_no_file_can_have_is_refused(kind, field, value, words):
    refused(dataclasses.replace(kind(), **{field.name: value}), f"`{field.name}` ", *words)


def test_other_text_may_hold_anything():
    validate(GenerateConfig(prompt="a\0b", stop=("\0", "\ud800", "")))


@pytest.mark.parametrize(
    ("changes", "meant"),
    [({"schedule": "sine"}, "cosine"), ({"tokenizer": "chars"}, "char"), ({"dtype": "float3"}, "float32")],
)
def test_the_nearest_choice_is_named(changes, meant):
    refused(TrainConfig(**changes), f"; did you mean {meant}?")


@pytest.mark.parametrize("stop", [1, (1,), ("a", None)])
def test_stops_are_a_list_of_text(stop):
    refused(GenerateConfig(stop=stop), "`stop`", "list of text")


def test_a_whole_number_serves_where_a_fraction_may_stand():
    validate(TrainConfig(dropout=0, learning_rate=1))


@pytest.mark.parametrize("value", [1, None, 12])
def test_optional_fields_may_be_empty(value):
    validate(TrainConfig(n_kv_head=value))


@pytest.mark.parametrize(("kind", "field"), [p for p in FIELDS if p.values[1].metadata["choices"]])
def test_a_choice_that_does_not_exist_is_refused_with_those_that_do(kind, field):
    for choice in field.metadata["choices"]:
        validate(dataclasses.replace(kind(), **{field.name: choice}))
    refused(dataclasses.replace(kind(), **{field.name: "cubic"}), f"`{field.name}` 'cubic'", *field.metadata["choices"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_embd": 100, "n_head": 7}, ["`n_head` 7", "`n_embd` 100", "try `n_head` 5"]),
        ({"n_embd": 64, "n_head": 12}, ["`n_head` 12", "`n_embd` 64", "try `n_head` 8"]),
        ({"n_embd": 4, "n_head": 9}, ["`n_head` 9", "try `n_head` 4"]),
        ({"n_head": 12, "n_kv_head": 5}, ["`n_kv_head` 5", "`n_head` 12", "try `n_kv_head` 4"]),
        ({"n_head": 4, "n_kv_head": 8}, ["`n_kv_head` 8", "`n_head` 4", "try `n_kv_head` 4"]),
        ({"n_embd": 15, "n_head": 5, "position": "rotary"}, ["`position` rotary", "3", "`n_head`"]),
        ({"head_size": 7, "position": "rotary"}, ["`position` rotary", "`head_size` 7 is odd"]),
        ({"n_embd": 15, "n_head": 5, "position": "sinusoidal"}, ["`position` sinusoidal", "15", "try 16"]),
        ({"learning_rate": 1e-4, "min_lr": 1e-3}, ["`min_lr` 0.001", "`learning_rate` 0.0001"]),
        ({"overwrite": True, "init_from": "resume"}, ["`overwrite`", "`init_from` resume"]),
    ],
)
def test_settings_that_do_not_fit_together_are_refused_with_a_way_out(changes, words):
    refused(TrainConfig(**changes), *words)
