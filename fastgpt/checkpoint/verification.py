"""Verifies the checkpoints of a run: every byte against its manifest, and what the files say against each other."""

from dataclasses import dataclass
from pathlib import Path

from fastgpt.checkpoint import progress, run_folder, safetensors_file, store
from fastgpt.errors import UsageError
from fastgpt.tokenizer.base import Tokenizer


@dataclass(frozen=True)
class Report:
    """What was found about a checkpoint.

    Attributes:
        size: bytes of its files.
        damage: what is wrong with them, or None.
        val_loss: in nats, or None if the step was not evaluated.
        val_set: identity of the evaluation set that the loss was measured on.
    """

    folder: Path
    size: int
    damage: str | None
    val_loss: float | None = None
    val_set: str | None = None


@dataclass(frozen=True)
class Verification:
    """What was found about a run.

    Attributes:
        reports: of its checkpoints, the earliest first.
        pointers: the names of the folders that `latest` and `best` name, if these are there.
        faults: all that is damaged, a message each.
    """

    reports: list[Report]
    pointers: dict[str, str]
    faults: list[str]


def verify_run(out_dir: Path) -> Verification:
    """Verify every checkpoint of a run, its pointers and its configuration; nothing is changed.

    Raises:
        UsageError: there is no run, or no vocabulary that its checkpoints could be read with.
    """
    store.require(out_dir)
    faults, pointers = [], {}
    for name in ("latest", "best"):
        try:
            pointers[name] = store.find(out_dir, name).name
        except UsageError as error:
            faults.append(str(error))
    try:
        run_folder.load(out_dir)
    except UsageError as error:
        faults.append(str(error))
    vocabulary = run_folder.vocabulary(out_dir)
    reports = [report for folder in store.folders(out_dir) if (report := verify_checkpoint(folder, vocabulary))]
    return Verification(reports, pointers, faults + [report.damage for report in reports if report.damage])


def verify_checkpoint(folder: Path, vocabulary: Tokenizer) -> Report | None:
    """Read all files of a checkpoint and compare them with its manifest; None if it is deleted meanwhile."""
    size = store.size(folder)
    try:
        store.verify(folder)
        store.check_vocabulary(folder, vocabulary)
        for name in (store.MODEL, store.OPTIMIZER):
            safetensors_file.read(folder / name)  # which reads the header only
        done = progress.read(store.load_state(folder), folder / store.STATE)
    except (OSError, UsageError) as error:
        return Report(folder, size, str(error)) if folder.is_dir() else None
    return Report(folder, size, None, done.val_loss if done.evaluated_step == done.step else None, done.val_set)
