"""Writes a model as the folder of a run of ours, with one checkpoint and no optimizer's state."""

import dataclasses
from pathlib import Path

from fastgpt.checkpoint import run_folder, store
from fastgpt.checkpoint.progress import Progress
from fastgpt.checkpoint.source import Source
from fastgpt.checkpoint.store import Snapshot
from fastgpt.config.training import TrainConfig
from fastgpt.interchange.exported import DTYPES


def write(source: Source, folder: Path, dtype: str) -> None:
    """Write the model into a folder that is there."""
    tokenizer, config = source.required_tokenizer(), source.config
    settings = source.about.get("config", {})
    saved = TrainConfig(**settings | vars(config) | {"tokenizer": tokenizer.kind, "vocab_size": None})
    step = store.step_of(source.step) if source.step else 0
    state = {
        "format": store.FORMAT,
        "step": step,
        "progress": dataclasses.asdict(Progress(step=step)),
        "vocabulary": tokenizer.sha256(),
    }
    tensors = source.weights(config).changed(lambda name, tensor: tensor.to(DTYPES[dtype]))
    run_folder.save(folder, saved, tokenizer, {run_folder.CONVERTED_FROM: f"{source.format} {source.path.name}"})
    store.save(folder, Snapshot(step, state, {store.MODEL: tensors, store.OPTIMIZER: {}}), best_step=step)
