"""Checkpoints: atomic, hashed, without pickle.

    out/step-000500/  model.safetensors  optim.safetensors  state.json  manifest.json
    out/latest, out/best                 one line each: the name of a step's folder

A checkpoint is written into a temporary sibling, synced and renamed, and then `best` and, last of all, `latest` are
replaced, so whenever the process dies they name whole checkpoints, and a resume goes on from one before which all was
done. `manifest.json` holds every file's size and sha256.
What is to be written is a `Snapshot`, so that another thread can write it while training goes on.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastgpt.checkpoint import safetensors_file
from fastgpt.errors import CorruptCheckpoint, UsageError
from fastgpt.model.gpt import GPT
from fastgpt.system import finite
from fastgpt.system.device import synchronize
from fastgpt.system.files import (
    ASIDE,
    TEMPORARY,
    delete_folder,
    regular,
    replace_folder,
    sha256,
    sync,
    temporary_sibling,
    write,
    write_atomic,
)
from fastgpt.tokenizer.base import Tokenizer

FORMAT = 1
LONGEST_NAME = 100  # bytes of `latest` and `best` that are read
LARGEST_JSON = 1 << 20  # bytes; they are a few thousand
MODEL, OPTIMIZER, STATE, MANIFEST = "model.safetensors", "optim.safetensors", "state.json", "manifest.json"
FILES = (MODEL, OPTIMIZER, STATE)  # what the manifest lists
STEP_NAME = re.compile(r"step-(\d{6}|[1-9]\d{6,17})", re.ASCII)


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint is made of: `state` is what JSON can hold, `tensors` those of MODEL and of OPTIMIZER."""

    step: int
    state: Mapping[str, Any]
    tensors: Mapping[str, Mapping[str, torch.Tensor]]

    def copied(self, memory: dict[str, torch.Tensor]) -> "Snapshot":
        """The same, in memory of the host that training does not change: in `memory`, kept for the next time."""
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
        state: what JSON can hold; `step` and the format are added.
    """
    content = {"format": FORMAT, "step": step, **state}
    return Snapshot(step, content, {MODEL: model.weights(), OPTIMIZER: _optimizer_state(model, optimizer)})


def save(out_dir: Path, snapshot: Snapshot, best_step: int = 0) -> Path:
    """Write `out_dir/step-NNNNNN`, point `best` at the best step's, if any, and `latest` at it. Returns the folder.

    Raises:
        OSError: the disk does not take it; what `latest` and `best` name is whole.
    """
    final = folder_of(out_dir, snapshot.step)
    temporary = temporary_sibling(final)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        files = {name: write(temporary / name, safetensors_file.parts(part)) for name, part in snapshot.tensors.items()}
        files[STATE] = write(temporary / STATE, [_json(snapshot.state)])
        write(temporary / MANIFEST, [_json({"format": FORMAT, "files": files})])
        sync(temporary)
        replace_folder(temporary, final)
    except Exception:
        shutil.rmtree(temporary, ignore_errors=True)  # a full disk needs the room
        raise
    point_best(out_dir, best_step)
    point(out_dir, "latest", final)
    return final


def point_best(out_dir: Path, step: int) -> None:
    """Make `best` name the checkpoint of a step; where that is not there, none is the best."""
    folder = folder_of(out_dir, step)
    if step and folder.is_dir():
        point(out_dir, "best", folder)
    else:
        (out_dir / "best").unlink(missing_ok=True)


def point(out_dir: Path, name: str, folder: Path) -> None:
    """Make the one-line file `name` (latest or best) name a step's folder, atomically, if it does not."""
    if _named_by(out_dir / name) != folder:
        write_atomic(out_dir / name, folder.name + "\n")


def prune(out_dir: Path, keep_last: int) -> None:
    """Delete the step folders but the last `keep_last` up to `latest`, and `best`.

    Those beyond `latest` are of a time that was undone: by a resume from an earlier step, or by a rollback.
    """
    latest, best = (_named_by(out_dir / name) for name in ("latest", "best"))
    if latest is None:
        return
    undone = [step for step in folders(out_dir) if _number(step) > _number(latest)]
    for folder in [*undone, *[step for step in folders(out_dir) if step not in undone][:-keep_last]]:
        if folder != best:
            delete_folder(folder)


def delete(out_dir: Path) -> None:
    """Delete every checkpoint of a run."""
    for folder in folders(out_dir):
        delete_folder(folder)


def folder_of(out_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step lies, there or not."""
    return out_dir / f"step-{step:06d}"


def folders(out_dir: Path) -> list[Path]:
    """The step folders of a run, the earliest first; what only resembles one is not ours."""
    folders = [path for path in out_dir.glob("step-*") if STEP_NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(folders, key=_number)


def aside(out_dir: Path) -> list[Path]:
    """Checkpoints that were about to be replaced when the process died; `files.recover` puts them back."""
    return list(out_dir.glob(f"{TEMPORARY}{ASIDE}step-*"))


def size(step_dir: Path) -> int:
    """Bytes of a checkpoint's files; 0 where they cannot be looked at."""
    try:
        return sum(file.lstat().st_size for file in step_dir.iterdir())
    except OSError:
        return 0


def holds_run(out_dir: Path) -> bool:
    """Whether there is a run that would be lost: a checkpoint, or the record of a step."""
    record = out_dir / "metrics.jsonl"
    return bool(folders(out_dir)) or (record.exists() and record.stat().st_size > 0)


def require(out_dir: Path) -> None:
    """Raise `UsageError` where there is no run, or one without a checkpoint."""
    if not holds_run(out_dir):
        raise UsageError(
            f"--out_dir {out_dir} holds no run; train one first: python -m fastgpt.train --out_dir {out_dir}"
        )
    if folders(out_dir):
        return
    if aside(out_dir):
        raise UsageError(
            f"--out_dir {out_dir} has its checkpoint put aside by a process that died; put it back by going on: "
            f"python -m fastgpt.train --init_from resume --out_dir {out_dir}"
        )
    raise UsageError(f"--out_dir {out_dir} holds a run without a checkpoint yet; start it with --overwrite")


def find(out_dir: Path, name: str) -> Path:
    """The folder of checkpoint `name`: latest, best, or a step's own name.

    Raises:
        UsageError: the run or the checkpoint does not exist.
    """
    require(out_dir)
    if name not in ("latest", "best"):
        folder = out_dir / Path(name).name
        if not STEP_NAME.fullmatch(folder.name) or not folder.is_dir():
            known = ", ".join(["latest", "best", *(step.name for step in folders(out_dir))])
            raise UsageError(f"--checkpoint {name!r} is not in {out_dir}; there are: {known}")
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
    """The newest checkpoint that is whole, `latest` or one before it; `tell` hears of each that is not.

    Raises:
        UsageError: there is no run, or none of its checkpoints is whole.
    """
    require(out_dir)
    damaged = []
    try:
        candidates = [find(out_dir, "latest")]
        candidates += [step for step in reversed(folders(out_dir)) if _number(step) < _number(candidates[0])]
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
    """The newest whole checkpoint of a step before `before`, up to `latest`, of those that are good if there are any.

    Good is one outside of a row of skipped steps, and whose val loss, if it was measured, is a number.
    """
    latest, whole = _named_by(out_dir / "latest"), []
    for folder in reversed(folders(out_dir)):
        if _number(folder) < before and (latest is None or _number(folder) <= _number(latest)):
            with suppress(CorruptCheckpoint, KeyError, TypeError):  # damaged, or its state is not of this version
                verify(folder)
                state = load_state(folder)
                progress = state["progress"]
                diverged = progress["evaluated_step"] == progress["step"] and progress["val_loss"] is None
                if not (state["guard"]["in_row"] or diverged):
                    return folder
                whole.append(folder)
    return whole[0] if whole else None


def verify(step_dir: Path | str, names: Sequence[str] = FILES) -> None:
    """Check a checkpoint's files, all of them or those about to be read, against its manifest, and for finite numbers.

    Raises:
        CorruptCheckpoint: naming the file that is missing, truncated or altered, or the tensor that is not finite.
    """
    step_dir = Path(step_dir)
    manifest = read_json(step_dir / MANIFEST)
    files = manifest.get("files")
    if (
        not isinstance(files, dict)
        or files.keys() != set(FILES)
        or (step_dir / MANIFEST).read_bytes() != _json({"format": FORMAT, "files": files})
    ):
        raise CorruptCheckpoint(f"{step_dir / MANIFEST} is not the list of this version's checkpoint files")
    ways_out = f"put back a copy of {step_dir.name}, or use another checkpoint"
    if STATE in names and STEP_NAME.fullmatch(step_dir.name) and load_state(step_dir).get("step") != _number(step_dir):
        raise CorruptCheckpoint(f"{step_dir / STATE} is of another step than its folder; {ways_out}")
    for name in names:
        path = step_dir / name
        if not path.is_file():
            raise CorruptCheckpoint(f"{path} is missing; {ways_out}")
        if not _is(path, files[name]):
            raise CorruptCheckpoint(f"{path} is not what was saved (see {MANIFEST}); {ways_out}")
        if name != STATE and (bad := finite.first_not_finite(safetensors_file.read(path))):
            raise CorruptCheckpoint(f"{path} is not finite: {bad} holds a NaN or an infinity; {ways_out}")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let a `CorruptCheckpoint` begin with the file that it is about."""
    try:
        yield
    except CorruptCheckpoint as error:
        raise CorruptCheckpoint(f"{path}: {error}") from None


def load_weights(step_dir: Path) -> dict[str, torch.Tensor]:
    """The model's weights by name, for `GPT.load_weights`. Raises `CorruptCheckpoint`."""
    return safetensors_file.read(step_dir / MODEL)


def load_optimizer(step_dir: Path, model: GPT, optimizer: torch.optim.Optimizer) -> None:
    """Replace the optimizer's state, which tells what must be there, by the parameters' names.

    Raises:
        CorruptCheckpoint: the file lacks a part of the state, or has it in another shape or dtype.
    """
    tensors, wanted = safetensors_file.read(step_dir / OPTIMIZER), _optimizer_state(model, optimizer)
    for name, parameter in model.named_parameters():
        kinds = optimizer.state[parameter].keys()
        found = {kind: tensors[key] for kind in kinds if (key := f"{kind}.{name}") in tensors}
        if found.keys() != kinds:
            raise CorruptCheckpoint(f"{step_dir / OPTIMIZER} has no moments of {name}")
        shapes = {kind: (wanted[f"{kind}.{name}"].shape, wanted[f"{kind}.{name}"].dtype) for kind in kinds}
        if any((value.shape, value.dtype) != shapes[kind] for kind, value in found.items()):
            raise CorruptCheckpoint(f"{step_dir / OPTIMIZER} has moments of {name} in another shape or dtype")
        # A copy: what was read is a map of a file that the next checkpoint deletes.
        optimizer.state[parameter] = {
            kind: (model.pad(name, value) if value.dim() else value).to(parameter.device, copy=True)
            for kind, value in found.items()
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
        if regular(path).stat().st_size > LARGEST_JSON:
            raise CorruptCheckpoint(f"{path} is larger than {LARGEST_JSON >> 20} MiB, which no file of a run is")
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise CorruptCheckpoint(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise CorruptCheckpoint(f"{path} is not JSON: it is truncated or altered") from None
    if not isinstance(content, dict):
        raise CorruptCheckpoint(f"{path} holds no JSON object")
    return content


def _named_by(pointer: Path) -> Path | None:
    """The folder that `latest` or `best` names, there or not; None where nothing is named."""
    if not pointer.is_file():
        return None
    with pointer.open("rb") as file:
        name = Path(file.read(LONGEST_NAME).decode("utf-8", errors="replace").strip()).name
    return pointer.parent / name if name else None


def _number(step_dir: Path) -> int:
    """The step of a folder that is named for one; -1 of any other."""
    return int(step_dir.name[5:]) if STEP_NAME.fullmatch(step_dir.name) else -1


def _is(path: Path, identity: Any) -> bool:
    """Whether a file is what its manifest says; a wrong size says at once what a hash would need all of it for."""
    try:
        size = path.stat().st_size
        return identity == {"size": size, "sha256": identity["sha256"]} and identity["sha256"] == sha256(path)
    except (KeyError, TypeError, OSError):  # no identity, or a disk that cannot read it
        return False


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, allow_nan=False) + "\n").encode()


def _optimizer_state(model: GPT, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """What the optimizer keeps for each parameter: scalars, and tensors of the parameter's own shape."""
    tensors = {}
    for name, parameter in model.named_parameters():
        for kind, value in optimizer.state[parameter].items():
            tensors[f"{kind}.{name}"] = model.unpad(name, value) if value.dim() else value
    return tensors
