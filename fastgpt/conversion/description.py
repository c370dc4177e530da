"""Describes a model that is converted: its data, steps, loss and command, for the card beside it."""

import dataclasses
import shlex
from pathlib import Path
from typing import Any

from fastgpt.checkpoint import progress, store
from fastgpt.checkpoint.source import Source
from fastgpt.config.training import TrainConfig

# They name places on a machine, or its parts, and not what was trained.
PLACES = ("out_dir", "data_dir", "corpus_file", "gpt2_vocab", "device", "threads", "vocab_size")


def describe(source: Source) -> dict[str, str]:
    """Facts by name: of a run what it was trained on and how, of another program's model only what it was."""
    if source.step is None or "corpus" not in source.about:
        return {"converted from": f"{source.format} {source.path.name}"}
    done = progress.read(store.load_state(source.step), source.step / store.STATE)
    facts = {
        "trained on": str(source.about["corpus"].get("name", "unknown")),
        "steps": f"{done.step:,}, {done.tokens:,} tokens",
        "command": f"`{command(TrainConfig(**source.about['config']))}`",
        "trained with": f"fastgpt {source.about.get('fastgpt')}, torch {source.about.get('torch')}",
    }
    if done.evaluated_step == done.step and done.val_loss is not None:
        facts["val loss"] = f"{done.val_loss:.4f} nats a token"
    return facts


def command(config: TrainConfig) -> str:
    """The command that trains with these settings: the flags that differ from the defaults, without paths."""
    words = ["python -m fastgpt.train"]
    for field in dataclasses.fields(TrainConfig):
        value: Any = getattr(config, field.name)
        if value == field.default or field.name in PLACES:
            continue
        if field.name == "dataset":
            value = Path(value).name
        words.append(f"--{field.name} {shlex.quote(str(value))}")
    return " ".join(words)
