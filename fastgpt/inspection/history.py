"""Reads what a run has logged, also while it is being trained: nothing is locked, and nothing is written.

    read("out", "out_dir") -> History

`label` names several runs by the settings in which they differ.
"""

import dataclasses
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastgpt.checkpoint import run_folder
from fastgpt.config.fields import validate_fields
from fastgpt.config.training import TrainConfig
from fastgpt.errors import UsageError
from fastgpt.loggers import drawing
from fastgpt.loggers.base import Record
from fastgpt.loggers.jsonl import NAME, scan
from fastgpt.system import json_files
from fastgpt.system.units import counted

NAMES = [field.name for field in dataclasses.fields(TrainConfig)]
PLACES = ("out_dir", "data_dir", "corpus_file", "gpt2_vocab")  # settings that say where a run is, not how it trains
MOST_NAMED = 3  # settings in a run's label
LONGEST = 40  # characters of a setting's value in a label


@dataclasses.dataclass(frozen=True)
class History:
    """The records of a run, in their order, and its settings.

    Attributes:
        records: as `fastgpt.loggers.jsonl` lists them; older versions did not log `seconds`.
        settings: those that `config.json` has, or none where it cannot be read.
        imported: whether training began from another model's weights, as far as is known.
    """

    out_dir: Path
    records: list[Record]
    settings: Mapping[str, Any]
    imported: bool = False

    @property
    def steps(self) -> int:
        """Steps that are done, as far as they are logged."""
        return self.records[-1]["step"]

    @property
    def seconds(self) -> float | None:
        """Wall time at the last record that has it."""
        found = drawing.drawable(self.records, "seconds")
        return found[-1]["seconds"] if found else None

    def curve(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """The steps (N,) and the values (N,) of a key, without records that have no number there."""
        found = drawing.drawable(self.records, key)
        return np.array([r["step"] for r in found], dtype=int), np.array([r[key] for r in found], dtype=float)

    def val_curve(self) -> tuple[np.ndarray, np.ndarray]:
        """The steps (N,) and val losses (N,) on the present evaluation set."""
        return dataclasses.replace(self, records=drawing.pieces(self.records)[-1]).curve("val_loss")


def read(folder: str, setting: str) -> History:
    """The history of the run in a folder, which `setting` names; says on stderr what of it was damaged.

    Raises:
        UsageError: there is no run, or no record that can be read.
    """
    out_dir, path = Path(folder), Path(folder) / NAME
    if not out_dir.is_dir():
        what = "is a file" if out_dir.exists() else "does not exist"
        raise UsageError(f"`{setting}` {folder} {what}; name the folder of a run")
    try:
        found, damaged = scan(path)
    except FileNotFoundError:
        raise UsageError(f"`{setting}` {folder} has no {NAME}; name the folder of a run") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    records = drawing.drawable(found, "step", "tokens")
    damaged += len(found) - len(records)
    if not records and damaged:
        raise UsageError(f"{path} holds no record of a run: {counted(damaged, 'damaged line')}; name another run")
    if not records:
        raise UsageError(f"`{setting}` {folder}: no step is logged there yet; wait for the first, or name another run")
    if damaged:
        print(f"{path}: {counted(damaged, 'damaged line')} left out", file=sys.stderr)
    return History(out_dir, records, *_settings(out_dir / "config.json"))


def label(histories: Sequence[History]) -> list[str]:
    """A name for each run: the settings in which they differ, or its folder; no two are the same."""
    names = folders(histories)
    different = differences(histories)
    if not different:
        return names
    labels = []
    for history, name in zip(histories, names, strict=True):
        words = [f"{key} {value(history, key)}" for key in different[:MOST_NAMED]] if history.settings else [name]
        labels.append(", ".join(words))
    counts = Counter(labels)
    return [one if counts[one] == 1 else f"{one} ({name})" for one, name in zip(labels, names, strict=True)]


def folders(histories: Sequence[History]) -> list[str]:
    """The names of the runs' folders, or their paths where two have the same name."""
    names = [history.out_dir.absolute().name for history in histories]
    return names if len(set(names)) == len(names) else [str(history.out_dir) for history in histories]


def differences(histories: Sequence[History]) -> list[str]:
    """The settings that are not the same in all runs whose settings are known, in the order of their help."""
    known = [history for history in histories if history.settings]
    return [name for name in NAMES if name not in PLACES and len({_value(history, name) for history in known}) > 1]


def value(history: History, name: str) -> str:
    """A setting of a run as text; one that was not recorded has its default."""
    found = _value(history, name)
    text = "default" if found is None else f"{found:g}" if isinstance(found, float) else str(found)
    return text if len(text) <= LONGEST else f"...{text[-LONGEST:]}"


def _value(history: History, name: str) -> Any:
    return history.settings.get(name, getattr(TrainConfig, name))


def _settings(path: Path) -> tuple[dict[str, Any], bool]:
    """The settings in a `config.json` that this version knows, and whether it names a model that the run began from.

    Nothing is trained with them, so its hash may differ.
    """
    if not path.exists():
        print(f"{path.parent} has no {path.name}: a run's settings are known once it has a checkpoint", file=sys.stderr)
        return {}, False
    try:
        about = json_files.read_object(path)
    except UsageError as error:
        print(f"{error}: the run's settings are not known", file=sys.stderr)
        return {}, False
    found = about.get("config")
    named = found.items() if isinstance(found, dict) else ()
    return {name: known for name, known in named if _is_valid(name, known)}, run_folder.STARTED_FROM in about


def _is_valid(name: str, known: Any) -> bool:
    try:
        validate_fields(TrainConfig, {name: known})
    except UsageError:
        return False
    return name in NAMES
