"""Checkpoints: atomic, hashed, without pickle.

    out/step-000500/  model.safetensors  optim.safetensors  state.json  manifest.json
    out/latest, out/best                 one line each: the name of a step's folder

A checkpoint is written to a temporary folder beside its own, synced and renamed. Then `best` is replaced, and `latest`
last. So both name whole checkpoints whenever the process dies. `manifest.json` holds every file's size and sha256.
A `Snapshot` is what is written, so that another thread can write it while training goes on.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastgpt.config.sources import STEP_NAME
from fastgpt.errors import CorruptCheckpoint, UsageError
from fastgpt.model.gpt import GPT
from fastgpt.system import finite, json_files, safetensors_file
from fastgpt.system.device import synchronize
from fastgpt.system.files import (
    ASIDE,
    TEMPORARY,
    delete_folder,
    replace_folder,
    sha256,
    sync,
    temporary_sibling,
    write,
    write_atomic,
)
from fastgpt.system.lazy_tensors import LazyTensors
from fastgpt.tokenizer.base import Tokenizer

FORMAT = 1
LONGEST_NAME = 100  # bytes of `latest` and `best` that are read
LARGEST_JSON = 1 << 20  # bytes; they are a few thousand
MODEL, OPTIMIZER, STATE, MANIFEST = "model.safetensors", "optim.safetensors", "state.json", "manifest.json"
FILES = (MODEL, OPTIMIZER, STATE)  # what the manifest lists


@dataclass(frozen=True)
class Snapshot:
    """The content of a checkpoint: `state` for STATE, as JSON values, and the `tensors` of MODEL and of OPTIMIZER."""

    step: int
    state: Mapping[str, Any]
    tensors: Mapping[str, Mapping[str, torch.Tensor]]

    def copied(self, memory: dict[str, torch.Tensor]) -> "Snapshot":
        """A copy on the host that training does not change. Its tensors are in `memory`, which the next copy reuses."""
        copies: dict[str, dict[str, torch.Tensor]] = {}
        device = torch.device("cpu")
        for file, tensors in self.tensors.items():
            copies[file] = {}
            for name, tensor in tensors.items():
                device, key = tensor.device, f"{file}/{name}"
                if key not in memory:
                    memory[key] = torch.empty_like(tensor, device="cpu", pin_memory=device.type == "cuda")
                copies[file][name] = memory[key].copy_(tensor, non_blocking=True)
        synchronize(device)
        return Snapshot(self.step, self.state, copies)


def capture(step: int, model: GPT, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> Snapshot:
    """The model, the optimizer's state and the run's state as they are now; tensors are shared, not copied.

    Args:
        state: JSON values; `step` and the format are added.
    """
    content = {"format": FORMAT, "step": step, **state}
    return Snapshot(step, content, {MODEL: model.weights(), OPTIMIZER: _optimizer_state(model, optimizer)})


def save(out_dir: Path, snapshot: Snapshot, best_step: int = 0) -> Path:
    """Write `out_dir/step-NNNNNN`, point `best` at the best step's, if any, and `latest` at it. Returns the folder.

    Raises:
        OSError: the disk refuses it; `latest` and `best` still name whole checkpoints.
    """
    final = folder_of(out_dir, snapshot.step)
    temporary = temporary_sibling(final)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        files = {name: write(temporary / name, safetensors_file.parts(part)) for name, part in snapshot.tensors.items()}
        files[STATE] = write(temporary / STATE, [json_bytes(snapshot.state)])
        write(temporary / MANIFEST, [json_bytes({"format": FORMAT, "files": files})])
        sync(temporary)
        replace_folder(temporary, final)
    except Exception:
        shutil.rmtree(temporary, ignore_errors=True)  # a full disk needs the room
        raise
    point_best(out_dir, best_step)
    point(out_dir, "latest", final)
    return final


def point_best(out_dir: Path, step: int) -> None:
    """Make `best` name the checkpoint of a step. If its folder is missing, delete `best`."""
    folder = folder_of(out_dir, step)
    if step and folder.is_dir():
        point(out_dir, "best", folder)
    else:
        (out_dir / "best").unlink(missing_ok=True)


def point(out_dir: Path, name: str, folder: Path) -> None:
    """Make the one-line file `name` (latest or best) name a checkpoint's folder, atomically."""
    if _named_by(out_dir / name) != folder:
        write_atomic(out_dir / name, folder.name + "\n")


def prune(out_dir: Path, keep_last: int, keep_every: int = 0) -> None:
    """Delete all checkpoints but `best`, the last `keep_last` up to `latest`, and those before that are kept for good.

    Checkpoints beyond `latest` no longer count: the run was resumed from an earlier step, or rolled back.
    """
    latest, best = (_named_by(out_dir / name) for name in ("latest", "best"))
    if latest is None:
        return
    stale = [folder for folder in folders(out_dir) if step_of(folder) > step_of(latest)]
    counted = [folder for folder in folders(out_dir) if folder not in stale]
    early = [folder for folder in counted[:-keep_last] if not is_kept(step_of(folder), keep_every)]
    for folder in [*stale, *early]:
        if folder != best:
            delete_folder(folder)


def is_kept(step: int, keep_every: int) -> bool:
    """Whether the checkpoint of a step is kept for good; with 0, none is."""
    return keep_every > 0 and step % keep_every == 0


def delete(out_dir: Path) -> None:
    """Delete every checkpoint of a run."""
    for folder in folders(out_dir):
        delete_folder(folder)


def folder_of(out_dir: Path, step: int) -> Path:
    """The path of a step's checkpoint, whether it exists or not."""
    return out_dir / f"step-{step:06d}"


def step_of(folder: Path) -> int:
    """The step in a checkpoint folder's name; -1 for another name."""
    return int(folder.name[5:]) if STEP_NAME.fullmatch(folder.name) else -1


def folders(out_dir: Path) -> list[Path]:
    """The checkpoints' folders of a run, the earliest step first. A similar name is not enough."""
    found = [path for path in out_dir.glob("step-*") if STEP_NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def aside(out_dir: Path) -> list[Path]:
    """Checkpoints that a process put aside to replace them, and died; `files.recover` puts them back."""
    return list(out_dir.glob(f"{TEMPORARY}{ASIDE}step-*"))


def size(folder: Path) -> int:
    """Bytes of a checkpoint's files; 0 if the folder cannot be read."""
    try:
        return sum(file.lstat().st_size for file in folder.iterdir())
    except OSError:
        return 0


def holds_run(out_dir: Path) -> bool:
    """Whether there is a run that would be lost: a checkpoint, or the record of a step."""
    record = out_dir / "metrics.jsonl"
    return bool(folders(out_dir)) or (record.exists() and record.stat().st_size > 0)


def require(out_dir: Path) -> None:
    """Raise `UsageError` if there is no run, or one without a checkpoint."""
    if not holds_run(out_dir):
        raise UsageError(f"{out_dir} holds no run; train one first: python -m fastgpt.train --out_dir {out_dir}")
    if folders(out_dir):
        return
    if aside(out_dir):
        raise UsageError(
            f"`out_dir` {out_dir} has its checkpoint put aside by a process that died; put it back by going on: "
            f"python -m fastgpt.train --init_from resume --out_dir {out_dir}"
        )
    raise UsageError(f"`out_dir` {out_dir} holds a run without a checkpoint yet; start it with `overwrite=True`")


def find(out_dir: Path, name: str) -> Path:
    """The folder of a checkpoint: latest, best, or a folder's own name.

    Raises:
        UsageError: the run or the checkpoint does not exist.
    """
    require(out_dir)
    if name not in ("latest", "best"):
        folder = out_dir / Path(name).name
        if not STEP_NAME.fullmatch(folder.name) or not folder.is_dir():
            known = ", ".join(["latest", "best", *(folder.name for folder in folders(out_dir))])
            raise UsageError(f"`checkpoint` {name!r} is not in {out_dir}; there are: {known}")
        return folder
    if name == "best" and not (out_dir / name).exists():
        name = "latest"  # the run has not been evaluated yet, or not since its best was forgotten
    if not (out_dir / name).exists():
        raise CorruptCheckpoint(f"{out_dir / name} is missing; name one of the checkpoints in {out_dir}")
    folder = _named_by(out_dir / name)
    if folder is None or not STEP_NAME.fullmatch(folder.name) or not folder.is_dir():
        missing = folder.name if folder else ""
        raise CorruptCheckpoint(f"{out_dir / name} names {missing!r}, which is missing from {out_dir}")
    return folder


def newest_intact(out_dir: Path, tell: Callable[[str], None]) -> Path:
    """The newest whole checkpoint, `latest` or one before it. Each damaged one before that is reported to `tell`.

    Raises:
        UsageError: there is no run, or none of its checkpoints is whole.
    """
    require(out_dir)
    damaged = []
    try:
        candidates = [find(out_dir, "latest")]
        candidates += [folder for folder in reversed(folders(out_dir)) if step_of(folder) < step_of(candidates[0])]
    except CorruptCheckpoint as error:  # the pointer itself
        damaged.append(str(error))
        candidates = folders(out_dir)[::-1]
    for folder in candidates:
        try:
            verify(folder)
        except CorruptCheckpoint as error:
            damaged.append(str(error))
            continue
        for message in damaged:
            tell(f"damaged: {message}")
        if damaged:
            tell(f"going on from {folder}, the newest checkpoint that is whole")
        return folder
    others = f"; none of {len(candidates)} checkpoints is whole" if len(candidates) > 1 else ""
    raise CorruptCheckpoint(damaged[0] + others)


def newest_good(out_dir: Path, before: int) -> Path | None:
    """The newest whole checkpoint before step `before`, up to `latest`; a good one if there is one.

    A checkpoint is good if the step before it was not skipped, and its val loss, if it was measured, is a number.
    """
    latest, whole = _named_by(out_dir / "latest"), []
    for folder in reversed(folders(out_dir)):
        if step_of(folder) < before and (latest is None or step_of(folder) <= step_of(latest)):
            with suppress(CorruptCheckpoint, KeyError, TypeError):  # damaged, or its state is not of this version
                verify(folder)
                state = load_state(folder)
                progress = state["progress"]
                diverged = progress["evaluated_step"] == progress["step"] and progress["val_loss"] is None
                if not (state["guard"]["in_row"] or diverged):
                    return folder
                whole.append(folder)
    return whole[0] if whole else None


def verify(folder: Path | str, names: Sequence[str] = FILES) -> None:
    """Check a checkpoint's files, or those that `names` lists: hashes against the manifest, and numbers for finiteness.

    Raises:
        CorruptCheckpoint: names the file that is missing, truncated or altered, or the tensor that is not finite.
    """
    folder = Path(folder)
    manifest = read_json(folder / MANIFEST)
    files = manifest.get("files")
    if (
        not isinstance(files, dict)
        or files.keys() != set(FILES)
        or (folder / MANIFEST).read_bytes() != json_bytes({"format": FORMAT, "files": files})
    ):
        raise CorruptCheckpoint(f"{folder / MANIFEST} is not the list of this version's checkpoint files")
    ways_out = f"put back a copy of {folder.name}, or use another checkpoint"
    if STATE in names and STEP_NAME.fullmatch(folder.name) and load_state(folder).get("step") != step_of(folder):
        raise CorruptCheckpoint(f"{folder / STATE} is of another step than its folder; {ways_out}")
    for name in names:
        path = folder / name
        if not path.is_file():
            raise CorruptCheckpoint(f"{path} is missing; {ways_out}")
        if not _is(path, files[name]):
            raise CorruptCheckpoint(f"{path} is not what was saved (see {MANIFEST}); {ways_out}")
        if name != STATE and (bad := finite.first_not_finite(safetensors_file.read(path))):
            raise CorruptCheckpoint(f"{path} is not finite: {bad} holds a NaN or an infinity; {ways_out}")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put the name of its file before the message of a `CorruptCheckpoint` that lacks it."""
    try:
        yield
    except CorruptCheckpoint as error:
        if str(path) in str(error):
            raise
        raise CorruptCheckpoint(f"{path}: {error}") from None


def load_weights(folder: Path) -> LazyTensors:
    """The model's weights by name, for `GPT.load_weights`. Raises `CorruptCheckpoint`."""
    return safetensors_file.read(folder / MODEL)


def load_optimizer(folder: Path, model: GPT, optimizer: torch.optim.Optimizer) -> None:
    """Replace the optimizer's state, which tells what must be there, by the parameters' names.

    Raises:
        CorruptCheckpoint: the file lacks a part of the state, or has it in another shape or dtype.
    """
    tensors, wanted = safetensors_file.read(folder / OPTIMIZER), _optimizer_state(model, optimizer)
    for name, parameter in model.named_parameters():
        kinds = optimizer.state[parameter].keys()
        found = {kind: tensors[key] for kind in kinds if (key := f"{kind}.{name}") in tensors}
        if found.keys() != kinds:
            raise CorruptCheckpoint(f"{folder / OPTIMIZER} has no moments of {name}")
        shapes = {kind: (wanted[f"{kind}.{name}"].shape, wanted[f"{kind}.{name}"].dtype) for kind in kinds}
        if any((value.shape, value.dtype) != shapes[kind] for kind, value in found.items()):
            raise CorruptCheckpoint(f"{folder / OPTIMIZER} has moments of {name} in another shape or dtype")
        for kind, value in found.items():
            optimizer.state[parameter][kind].copy_(model.pad(name, value) if value.dim() else value)


def load_state(folder: Path) -> dict[str, Any]:
    """The content of `state.json`. Raises `CorruptCheckpoint`."""
    return read_json(folder / STATE)


def check_vocabulary(folder: Path, vocabulary: Tokenizer) -> None:
    """Raise `CorruptCheckpoint` if the checkpoint was trained with another vocabulary."""
    if load_state(folder).get("vocabulary") != vocabulary.sha256():
        raise CorruptCheckpoint(
            f"{folder} was trained with another vocabulary than {folder.parent / 'tokenizer.json'} holds; "
            "put the run's own tokenizer.json back"
        )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a run. Raises `CorruptCheckpoint`."""
    return json_files.read_object(path, LARGEST_JSON, CorruptCheckpoint)


def _named_by(pointer: Path) -> Path | None:
    """The folder that `latest` or `best` names, whether it exists or not; None if nothing is named."""
    if not pointer.is_file():
        return None
    with pointer.open("rb") as file:
        name = Path(file.read(LONGEST_NAME).decode("utf-8", errors="replace").strip()).name
    return pointer.parent / name if name else None


def _is(path: Path, identity: Any) -> bool:
    """Whether a file has the size and the hash of its manifest. The size is checked first: it needs no reading."""
    try:
        size = path.stat().st_size
        return identity == {"size": size, "sha256": identity["sha256"]} and identity["sha256"] == sha256(path)
    except (KeyError, TypeError, OSError):  # no identity, or a disk that cannot read it
        return False


def json_bytes(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, allow_nan=False) + "\n").encode()


def _optimizer_state(model: GPT, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's state of each parameter: scalars, and tensors of the parameter's own shape."""
    tensors = {}
    for name, parameter in model.named_parameters():
        for kind, value in optimizer.state[parameter].items():
            tensors[f"{kind}.{name}"] = model.unpad(name, value) if value.dim() else value
    return tensors
