"""Completes the settings of a view: what was given changes a preset, or the settings of a model that is opened."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from fastgpt.checkpoint import run_folder
from fastgpt.checkpoint.source import Source, open_model
from fastgpt.config.fields import validate
from fastgpt.config.inspection import WorkConfig
from fastgpt.config.training import TrainConfig
from fastgpt.errors import UsageError
from fastgpt.training.start import of_preset, shaped_as

Config = TypeVar("Config", bound=WorkConfig)
# Tokens assumed where a preset leaves the vocabulary to the text: printable ASCII, and the values of a byte.
ASSUMED_VOCABULARY = {"char": 96, "byte": 256}


def complete(kind: type[Config], preset: str | None, given: Mapping[str, Any]) -> tuple[Config, Source | None, str]:
    """The whole configuration of a view, the model that `src` names, and a line on what was chosen, and why.

    A view prints the line once nothing can be refused any more: what is refused has one line on stderr.

    Raises:
        UsageError: the settings do not fit each other, or there is no such model.
    """
    if (src := given.get("src")) is None:
        source = None
        start, why = of_preset(preset, given)
        if start.vocab_size is None and "vocab_size" not in given:
            start = dataclasses.replace(start, vocab_size=ASSUMED_VOCABULARY[start.tokenizer])
            why += f"; {start.vocab_size} tokens are assumed, `vocab_size` sets another number"
    elif preset is not None:
        raise UsageError(f"`preset` {preset} and `src` {src}: both name a model; leave one of them out")
    else:
        source = open_model(src, download=given.get("download", False), setting="src")
        start = dataclasses.replace(_settings(source, given), vocab_size=source.config.vocab_size)
        why = f"the model {src}"
    config = dataclasses.replace(kind.of(start), **given)
    validate(config)
    return config, source, why


def _settings(source: Source, given: Mapping[str, Any]) -> TrainConfig:
    """Those of the run that the model comes from, or the defaults, with the model's shape."""
    config = run_folder.load(source.path)[0] if source.format == "fastgpt" else TrainConfig()
    if source.format == "fastgpt":
        config = dataclasses.replace(config, pack=run_folder.packed(source.about))
    return shaped_as(source, config, given)
