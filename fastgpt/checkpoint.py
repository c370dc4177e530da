"""Checkpoints: atomic, hashed, without pickle.

    out/step-000500/  model.safetensors  optim.safetensors  state.json  manifest.json
    out/latest, out/best                 one line each: the name of a step's folder

A checkpoint is written into a temporary sibling, synced and renamed, and `latest` and `best` are replaced last,
so whenever the process dies they name whole checkpoints. `manifest.json` holds every file's size and sha256.
"""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fastgpt.errors import CorruptCheckpoint, UsageError
from fastgpt.files import TEMPORARY, sha256, sync, temporary_sibling, write_atomic
from fastgpt.model import GPT
from fastgpt.tokenizer import Tokenizer

FORMAT = 1
MODEL, OPTIMIZER, STATE, MANIFEST = "model.safetensors", "optim.safetensors", "state.json", "manifest.json"
FILES = (MODEL, OPTIMIZER, STATE)  # what the manifest lists
MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def save(out_dir: Path, step: int, model: GPT, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> Path:
    """Write `out_dir/step-NNNNNN` and point `latest` at it. Returns the folder.

    Args:
        state: what JSON can hold; `step` and the format are added.
    """
    final = out_dir / f"step-{step:06d}"
    folder = temporary_sibling(final)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    _write_json(folder / STATE, {"format": FORMAT, "step": step, **state})
    for name, tensors in ((MODEL, model.weights()), (OPTIMIZER, _moments(model, optimizer))):
        save_file(tensors, folder / name, metadata={"format": "pt"})
        shutil.copymode(folder / STATE, folder / name)  # safetensors lets nobody else read
        sync(folder / name)
    _write_json(folder / MANIFEST, {"format": FORMAT, "files": {name: _identity(folder / name) for name in FILES}})
    sync(folder)
    if final.exists():  # the same step of the same run, saved again after a resume
        final.rename(temporary_sibling(out_dir / f"old-{final.name}"))
    folder.rename(final)
    sync(out_dir)
    point(out_dir, "latest", final)
    return final


def point(out_dir: Path, name: str, folder: Path) -> None:
    """Make the one-line file `name` (latest or best) name a step's folder, atomically."""
    write_atomic(out_dir / name, folder.name + "\n")


def prune(out_dir: Path) -> None:
    """Delete the step folders that neither `latest` nor `best` names, and what a killed save left behind."""
    kept = [_named_by(out_dir / name) for name in ("latest", "best")]
    for folder in [*_unfinished(out_dir), *(step for step in steps(out_dir) if step not in kept)]:
        shutil.rmtree(folder)


def delete(out_dir: Path) -> None:
    """Delete every checkpoint of a run, and what a killed save left behind."""
    for folder in [*_unfinished(out_dir), *steps(out_dir)]:
        shutil.rmtree(folder)


def steps(out_dir: Path) -> list[Path]:
    """The step folders of a run, the earliest first; what only resembles one is not ours."""
    folders = [path for path in out_dir.glob("step-*") if re.fullmatch(r"step-\d{6,}", path.name) and path.is_dir()]
    return sorted(folders, key=lambda path: int(path.name[5:]))


def holds_run(out_dir: Path) -> bool:
    """Whether there is a run that would be lost: a checkpoint, or the record of a step."""
    record = out_dir / "metrics.jsonl"
    return bool(steps(out_dir)) or (record.exists() and record.stat().st_size > 0)


def find(out_dir: Path, name: str) -> Path:
    """The folder of checkpoint `name`: latest, best, or a step's own name.

    Raises:
        UsageError: the run or the checkpoint does not exist.
    """
    if not holds_run(out_dir):
        raise UsageError(
            f"--out_dir {out_dir} holds no run; train one first: python -m fastgpt.train --out_dir {out_dir}"
        )
    if name not in ("latest", "best"):
        folder = out_dir / Path(name).name
        if not folder.is_dir():
            known = ", ".join(["latest", "best", *(step.name for step in steps(out_dir))])
            raise UsageError(f"--checkpoint {name!r} is not in {out_dir}; there are: {known}")
        return folder
    if name == "best" and not (out_dir / name).exists():
        name = "latest"  # the run has not been evaluated yet
    if not (out_dir / name).exists():
        raise UsageError(f"--out_dir {out_dir} holds a run without a checkpoint yet; start it with --overwrite")
    folder = _named_by(out_dir / name)
    if folder is None or not folder.is_dir():
        missing = folder.name if folder else ""
        raise CorruptCheckpoint(f"{out_dir / name} names {missing!r}, which is missing from {out_dir}")
    return folder


def verify(step_dir: Path | str, names: Sequence[str] = FILES) -> None:
    """Check a checkpoint's files, all of them or those about to be read, against its manifest.

    Raises:
        CorruptCheckpoint: naming the file that is missing, truncated or altered.
    """
    step_dir = Path(step_dir)
    manifest = read_json(step_dir / MANIFEST)
    files = manifest.get("files")
    if manifest != {"format": FORMAT, "files": files} or not isinstance(files, dict) or files.keys() != set(FILES):
        raise CorruptCheckpoint(f"{step_dir / MANIFEST} is not the list of this version's checkpoint files")
    ways_out = f"put back a copy of {step_dir.name}, or use another checkpoint"
    for name in names:
        path = step_dir / name
        if not path.is_file():
            raise CorruptCheckpoint(f"{path} is missing; {ways_out}")
        if _identity(path) != files[name]:
            raise CorruptCheckpoint(f"{path} is not what was saved (see {MANIFEST}); {ways_out}")


def load_weights(step_dir: Path) -> dict[str, torch.Tensor]:
    """The model's weights by name, for `GPT.load_weights`. Raises `CorruptCheckpoint`."""
    return _read_tensors(step_dir / MODEL)


def load_optimizer(step_dir: Path, model: GPT, optimizer: torch.optim.Optimizer) -> None:
    """Fill the optimizer's moments, by the parameters' names. Raises `CorruptCheckpoint`."""
    tensors = _read_tensors(step_dir / OPTIMIZER)
    for name, parameter in model.named_parameters():
        moments = {kind: tensors.get(f"{kind}.{name}") for kind in MOMENTS}
        if any(value is None for value in moments.values()):
            raise CorruptCheckpoint(f"{step_dir / OPTIMIZER} has no moments of {name}")
        # A copy: what was read is a map of a file that the next checkpoint deletes.
        optimizer.state[parameter] = {
            kind: (value if kind == "step" else model.pad(name, value)).to(parameter.device, copy=True)
            for kind, value in moments.items()
            if value is not None
        }


def load_state(step_dir: Path) -> dict[str, Any]:
    """What `save` was given as state, with `step`. Raises `CorruptCheckpoint`."""
    return read_json(step_dir / STATE)


def check_vocabulary(step_dir: Path, vocabulary: Tokenizer) -> None:
    """Raises `CorruptCheckpoint` where the checkpoint was trained with another vocabulary."""
    if load_state(step_dir).get("vocabulary") != vocabulary.sha256():
        raise CorruptCheckpoint(
            f"{step_dir} was trained with another vocabulary than {step_dir.parent / 'tokenizer.json'} holds; "
            "put the run's own tokenizer.json back"
        )


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file of a run holds. Raises `CorruptCheckpoint`."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise CorruptCheckpoint(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise CorruptCheckpoint(f"{path} is not JSON: it is truncated or altered") from None
    if not isinstance(content, dict):
        raise CorruptCheckpoint(f"{path} holds no JSON object")
    return content


def _unfinished(out_dir: Path) -> list[Path]:
    """The folders that a killed save left behind."""
    return [path for path in out_dir.glob(f"{TEMPORARY}*") if path.is_dir()]


def _named_by(pointer: Path) -> Path | None:
    """The folder that `latest` or `best` names, there or not; None where nothing is named."""
    if not pointer.is_file():
        return None
    name = Path(pointer.read_text(encoding="utf-8", errors="replace").strip()).name
    return pointer.parent / name if name else None


def _identity(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": sha256(path)}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_atomic(path, json.dumps(content, indent=1) + "\n")


def _moments(model: GPT, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, parameter in model.named_parameters():
        for kind, value in optimizer.state[parameter].items():
            tensors[f"{kind}.{name}"] = value if kind == "step" else model.unpad(name, value)
    return tensors


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CorruptCheckpoint(f"{path} cannot be read: {error}") from None
