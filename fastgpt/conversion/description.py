"""Describes a model that is converted: its data, steps, loss and command, for the card beside it."""

import dataclasses
import shlex
from pathlib import Path
from typing import Any

from fastgpt.checkpoint import progress, run_folder, store
from fastgpt.checkpoint.progress import Progress
from fastgpt.checkpoint.source import Source
from fastgpt.config.training import TrainConfig

# They name places on a machine, or its parts, and not what was trained.
PLACES = ("out_dir", "data_dir", "corpus_file", "gpt2_vocab", "device", "threads", "vocab_size")


def progress_of(source: Source) -> Progress:
    """The steps and the loss of a run; of another program's model, none."""
    if source.step is None:
        return Progress()
    return progress.read(store.load_state(source.step), source.step / store.STATE)


def describe(source: Source) -> dict[str, str]:
    """Facts by name: of a run what it was trained on and how, of another program's model only what it was."""
    if "corpus" not in source.about:
        return {"converted from": f"{source.format} {source.path.name}"}
    done = progress_of(source)
    facts = {
        "trained on": str(source.about["corpus"].get("name", "unknown")),
        "steps": f"{done.step:,}, {done.tokens:,} tokens",
        "command": f"`{command(TrainConfig(**source.about['config']))}`",
        "trained with": f"fastgpt {source.about.get('fastgpt')}, torch {source.about.get('torch')}",
    }
    if origin := source.about.get(run_folder.STARTED_FROM):
        facts["started from"] = f"the weights of {Path(str(origin)).name}"
    if done.evaluated_step == done.step and done.val_loss is not None:
        facts["val loss"] = f"{done.val_loss:.4f} nats a token"
    return facts


def command(config: TrainConfig) -> str:
    """The command that trains with these settings: the flags that differ from the defaults, without paths."""
    text = "python -m fastgpt.train"
    for field in dataclasses.fields(TrainConfig):
        value: Any = getattr(config, field.name)
        if value == field.default or field.name in PLACES:
            continue
        if field.name == "dataset":
            value = Path(value).name
        text += f" --{field.name} {shlex.quote(str(value))}"
    return text
