"""Settings of `fastgpt inspect` and its views."""

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from fastgpt.config.choices import DTYPES, KERNELS
from fastgpt.config.fields import Settings, option
from fastgpt.config.model import ModelConfig
from fastgpt.config.training import OPTIMIZERS, TrainConfig
from fastgpt.errors import UsageError, shown


@dataclass(frozen=True)
class AttentionConfig(Settings):
    """The attention maps of a model over a text."""

    src: str = option(
        "out",
        "the model: a run's or a step's folder, a Hugging Face folder or name, a .gguf file, nanoGPT's ckpt.pt; the "
        "flag's name may be left out",
        path=True,
    )
    download: bool = option(False, "fetch a model that is named from Hugging Face's hub")
    checkpoint: str = option("best", "of a run: best, latest, or a step's folder name such as step-000500", path=True)
    text: str | None = option(
        None,
        "the text that the model reads, <|endoftext|> as one token if the vocabulary has it; FILE:path reads a file, - "
        "reads stdin",
    )
    checkpoints: str | None = option(
        None, "a slider over a run's checkpoints: all, or so many, evenly spaced, at most 12"
    )
    layers: str | None = option(
        None, "layers, counted from 0, such as 0,5 or 2-4; default: all, or as many as the page has room for"
    )
    layer: int | None = option(None, "the layer of the enlarged head; default: where a pattern is clearest", low=0)
    head: int | None = option(None, "the enlarged head, counted from 0; default: where a pattern is clearest", low=0)
    output: str | None = option(
        None, "the page; default attention.html, unless `png` or `json` is given", path=True, group="Output"
    )
    png: str | None = option(None, "a picture of the same maps", path=True)
    json: str | None = option(None, "the numbers: maps, probabilities, losses", path=True)
    device: str = option("auto", "auto, cpu, mps, cuda or cuda:N", group="Device")
    threads: int | None = option(
        None, "CPU threads; auto: one for each core that this process may use", low=1, high=4096, auto=True
    )

    @property
    def outputs(self) -> dict[str, str]:
        """The files to write, by their settings."""
        given = {name: path for name in ("output", "png", "json") if (path := getattr(self, name)) is not None}
        return given or {"output": "attention.html"}

    def check(self) -> None:
        if self.text is None:
            raise UsageError("`text` is missing; give what the model is to read, as in: `text` 'The with statement'")
        if self.checkpoints is not None and self.checkpoint != AttentionConfig.checkpoint:
            raise UsageError(
                f"`checkpoint` {self.checkpoint} is one, and `checkpoints` {shown(self.checkpoints)} are several; "
                "leave one of them out"
            )
        _check_apart(self.outputs)


def _check_apart(outputs: Mapping[str, str]) -> None:
    """Raise `UsageError` if two settings name the same file."""
    owners: dict[str, str] = {}
    for name, path in outputs.items():
        if other := owners.get(place := os.path.realpath(path)):
            raise UsageError(f"`{other}` and `{name}` are both {path}; name two files")
        owners[place] = name


@dataclass(frozen=True)
class WorkConfig(ModelConfig):
    """A model and the work that it does: the settings of `TrainConfig` on which memory and time depend."""

    src: str | None = option(
        None,
        "instead of a preset, a model: a run's or a step's folder, a Hugging Face folder or name, a .gguf file, "
        "nanoGPT's ckpt.pt; the flag's name may be left out",
        path=True,
        group="Source",
    )
    download: bool = option(False, "fetch a model that is named from Hugging Face's hub")
    batch_size: int = option(12, "sequences in a micro-batch", low=1, group="Work")
    optimizer: str = option("adamw", "of the training step", choices=OPTIMIZERS)
    pack: bool | None = option(None, "attention stays within documents; auto: no, or as the run has it", auto=True)
    device: str = option("auto", "auto, cpu, mps, cuda or cuda:N", group="Device")
    threads: int | None = option(
        None, "CPU threads; auto: one for each core that this process may use", low=1, high=4096, auto=True
    )
    dtype: str = option("auto", "arithmetic; auto: bfloat16 where the chip has it", choices=DTYPES)
    compile: bool = option(False, "compile the model with torch.compile")
    kernels: str = option("auto", "backend of each operation", choices=KERNELS)

    @classmethod
    def of(cls, config: TrainConfig) -> Self:
        """These settings of a run."""
        return cls(**{name: getattr(config, name) for name in _shared(cls)})

    def training(self) -> TrainConfig:
        """A run with these settings, and the defaults for the others."""
        values: dict[str, Any] = {"gradient_accumulation_steps": 1}
        values |= {name: getattr(self, name) for name in _shared(type(self))}
        return TrainConfig(**values)

    def check(self) -> None:
        super().check()
        if self.download and self.src is None:
            raise UsageError("`download` fetches the model that `src` names; name one, such as gpt2")


def _shared(kind: type[WorkConfig]) -> list[str]:
    """The names of the settings that a run has too, except `download`, which there is for `init_from`."""
    ours, runs = ({field.name for field in dataclasses.fields(one)} for one in (kind, TrainConfig))
    return sorted(ours & runs - {"download"})


@dataclass(frozen=True)
class MemoryConfig(WorkConfig):
    """What a training step and a generation hold in memory."""

    gradient_accumulation_steps: int = option(
        40,
        "micro-batches in a step; from the second on, a forward pass finds the gradients of those before",
        low=1,
        group="Work",
    )
    log_stats: bool = option(False, "measure statistics by layer in the step, which keeps a copy of the weights")
    max_batch: int = option(1, "sequences that are generated at once", low=1, high=65_536)
    measure: bool = option(False, "run a step and a generation, and show the measured bytes beside the estimate")
    fit: str | None = option(
        None,
        "memory such as 8GiB, or 50% of what is free: show the largest `batch_size` and `max_batch` that fit, and what "
        "to change to fit",
    )
    png: str | None = option(None, "a picture: a stacked bar for training and one for generation", path=True)
    json: bool = option(False, "print one JSON object instead of a table")


@dataclass(frozen=True)
class ProfileConfig(WorkConfig):
    """Where the time of a training step, or of generation, goes."""

    generate: bool = option(False, "profile the decoding of tokens instead of a training step", group="Work")
    png: str | None = option(None, "a picture: a bar for each operation, and its limit", path=True)
    trace: str | None = option(None, "a Chrome trace (JSON), for chrome://tracing or Perfetto", path=True)
    json: bool = option(False, "print one JSON object instead of tables")

    @property
    def outputs(self) -> dict[str, str]:
        """The files to write, by their settings."""
        return {name: path for name in ("png", "trace") if (path := getattr(self, name)) is not None}

    def check(self) -> None:
        super().check()
        _check_apart(self.outputs)


@dataclass(frozen=True)
class MachineConfig(WorkConfig):
    """What runs on this machine, and why."""

    paths: bool = option(False, "show paths, which may hold a user's name", group="Work")
    json: bool = option(False, "print one JSON object instead of a table")
