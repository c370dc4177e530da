"""Checkpoints: atomic, hashed, without pickle.

    out/step-000500/  model.safetensors  optim.safetensors  state.json  manifest.json
    out/latest, out/best                 one line each: the name of a step's folder

A checkpoint is written into a temporary sibling, synced and renamed, and `latest` and `best` are replaced last,
so whenever the process dies they name whole checkpoints. `manifest.json` holds every file's size and sha256.
"""

import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fastgpt.config import ModelConfig, TrainConfig, validate
from fastgpt.errors import CorruptCheckpoint, UsageError
from fastgpt.model import GPT

FORMAT = 1
MODEL, OPTIMIZER, STATE, MANIFEST = "model.safetensors", "optim.safetensors", "state.json", "manifest.json"
TEMPORARY = ".tmp-"
RUN_FILES = ("config.json", "tokenizer.json", "metrics.jsonl", "latest", "best", "plots/loss.png")
MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def save(out_dir: Path, step: int, model: GPT, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> Path:
    """Write `out_dir/step-NNNNNN` and point `latest` at it. Returns the folder.

    Args:
        state: what JSON can hold; `step` and the format are added.
    """
    final = out_dir / f"step-{step:06d}"
    folder = out_dir / f"{TEMPORARY}{final.name}-{os.getpid()}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    save_file(model.weights(), folder / MODEL, metadata={"format": "pt"})
    save_file(_moments(model, optimizer), folder / OPTIMIZER)
    write_json(folder / STATE, {"format": FORMAT, "step": step, **state})
    files = {name: _digest(folder / name) for name in (MODEL, OPTIMIZER, STATE)}
    write_json(folder / MANIFEST, {"format": FORMAT, "files": files})
    for file in folder.iterdir():
        _sync(file)
    _sync(folder)
    if final.exists():  # the same step of the same run, saved again after a resume
        final.rename(out_dir / f"{TEMPORARY}old-{final.name}-{os.getpid()}")
    folder.rename(final)
    _sync(out_dir)
    point(out_dir, "latest", final)
    return final


def point(out_dir: Path, name: str, folder: Path) -> None:
    """Make the one-line file `name` (latest or best) name a step's folder, atomically."""
    temporary = out_dir / f"{TEMPORARY}{name}-{os.getpid()}"
    temporary.write_text(folder.name + "\n", encoding="utf-8")
    _sync(temporary)
    temporary.replace(out_dir / name)
    _sync(out_dir)


def prune(out_dir: Path) -> None:
    """Delete the step folders that neither `latest` nor `best` names, and what a killed save left behind."""
    kept = {find(out_dir, name) for name in ("latest", "best") if (out_dir / name).exists()}
    left = [path for path in out_dir.glob(f"{TEMPORARY}*") if path.is_dir()]
    for folder in [*left, *(step for step in steps(out_dir) if step not in kept)]:
        shutil.rmtree(folder)


def steps(out_dir: Path) -> list[Path]:
    """The step folders of a run, the earliest first; what only resembles one is not ours."""
    folders = [path for path in out_dir.glob("step-*") if re.fullmatch(r"step-\d{6,}", path.name) and path.is_dir()]
    return sorted(folders, key=lambda path: int(path.name[5:]))


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
    folder = out_dir / Path((out_dir / name).read_text(encoding="utf-8", errors="replace").strip()).name
    if folder == out_dir or not folder.is_dir():
        raise CorruptCheckpoint(f"{out_dir / name} names {folder.name!r}, which is missing from {out_dir}")
    return folder


def verify(step_dir: Path | str) -> None:
    """Check every file of a checkpoint against its manifest.

    Raises:
        CorruptCheckpoint: naming the file that is missing, truncated or altered.
    """
    step_dir = Path(step_dir)
    manifest = _read_json(step_dir / MANIFEST)
    files, names = manifest.get("files"), {MODEL, OPTIMIZER, STATE}
    if manifest != {"format": FORMAT, "files": files} or not isinstance(files, dict) or files.keys() != names:
        raise CorruptCheckpoint(f"{step_dir / MANIFEST} is not the list of this version's checkpoint files")
    for name, expected in files.items():
        path = step_dir / name
        if not path.is_file():
            raise CorruptCheckpoint(f"{path} is missing; use another checkpoint of the run (--checkpoint)")
        if _digest(path) != expected:
            raise CorruptCheckpoint(
                f"{path} is not what was saved (its size or sha256 differs from {MANIFEST}); "
                "use another checkpoint of the run (--checkpoint)"
            )


def load_model(step_dir: Path, model: GPT) -> None:
    """Fill the model's weights. Raises `CorruptCheckpoint` where names or shapes are not the model's."""
    model.load_weights(_read_tensors(step_dir / MODEL))


def load_optimizer(step_dir: Path, model: GPT, optimizer: torch.optim.Optimizer) -> None:
    """Fill the optimizer's moments, by the parameters' names."""
    tensors = _read_tensors(step_dir / OPTIMIZER)
    for name, parameter in model.named_parameters():
        moments = {kind: tensors.get(f"{kind}.{name}") for kind in MOMENTS}
        if any(value is None for value in moments.values()):
            raise CorruptCheckpoint(f"{step_dir / OPTIMIZER} has no moments of {name}")
        optimizer.state[parameter] = {
            kind: (value if kind == "step" else model.pad(name, value)).to(parameter.device)
            for kind, value in moments.items()
            if value is not None
        }


def load_state(step_dir: Path) -> dict[str, Any]:
    """What `save` was given as state, with `step`."""
    return _read_json(step_dir / STATE)


def holds_run(out_dir: Path) -> bool:
    """Whether there is a run that would be lost: a checkpoint, or the record of a step."""
    record = out_dir / "metrics.jsonl"
    return bool(steps(out_dir)) or (record.exists() and record.stat().st_size > 0)


def delete_run(out_dir: Path) -> None:
    """Delete a run's own files and folders, and nothing else that its folder may hold."""
    for path in [*steps(out_dir), *out_dir.glob(f"{TEMPORARY}*"), *(out_dir / f for f in RUN_FILES)]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    with suppress(OSError):  # it holds something else, or is not there
        (out_dir / "plots").rmdir()


def save_run(out_dir: Path, config: TrainConfig, **about: Any) -> None:
    """Write `config.json`: the resolved configuration and what else must stay the same through the run."""
    write_json(out_dir / "config.json", {"format": FORMAT, "config": dataclasses.asdict(config), **about})


def load_run(out_dir: Path) -> tuple[TrainConfig, dict[str, Any]]:
    """The configuration of a run, and the whole of its `config.json`.

    Raises:
        UsageError: no run there, or a file that is not one of ours.
    """
    if not holds_run(out_dir):
        find(out_dir, "latest")
    path = out_dir / "config.json"
    content = _read_json(path)
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    saved = content.get("config")
    if not isinstance(saved, dict) or not saved.keys() <= known:
        raise CorruptCheckpoint(f"{path} is not the configuration of a run of this version")
    config = TrainConfig(**saved)
    validate(config)
    return config, content


def model_of(config: ModelConfig, step_dir: Path, ops: Any, device: torch.device) -> GPT:
    """The verified model of a checkpoint, on a device, ready to evaluate."""
    verify(step_dir)
    model = GPT(config, ops).to(device)
    load_model(step_dir, model)
    return model.eval()


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON by way of a temporary sibling, so that `path` is never half written."""
    temporary = path.with_name(f"{TEMPORARY}{path.name}-{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    _sync(temporary)
    temporary.replace(path)


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


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise CorruptCheckpoint(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise CorruptCheckpoint(f"{path} is not JSON: it is truncated or altered") from None
    if not isinstance(content, dict):
        raise CorruptCheckpoint(f"{path} holds no JSON object")
    return content


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _sync(path: Path) -> None:
    """Force a file, or a folder's entries, to the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows syncs no folders
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
