"""The folder of a run: whose it is, what the run was made from, and what a resume must find unchanged.

out/  config.json  tokenizer.json  metrics.jsonl  .lock  latest  best  step-000500/  plots/loss.png
"""

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from fastgpt import checkpoint, tokenizer
from fastgpt.config import TrainConfig, validate
from fastgpt.corpus import Corpus
from fastgpt.errors import CorruptCheckpoint, UsageError
from fastgpt.files import TEMPORARY, write_atomic

FORMAT = 1
LOCK = ".lock"
# Deleted in this order: config.json, by which `claim` knows that the others are a run's, goes last.
RUN_FILES = ("tokenizer.json", "metrics.jsonl", "latest", "best", "plots/loss.png", "config.json")
COMMANDS = ("init_from", "overwrite", "allow_data_change")  # of one start, not of the run
FIXED = ("block_size", "n_layer", "n_head", "kv_heads", "n_embd", "bias", "position", "tokenizer")


@contextmanager
def locked(out_dir: Path) -> Iterator[None]:
    """Own the folder until the end of the block; the system frees it when the process dies.

    Raises:
        UsageError: another process owns it, or it cannot be made or written.
    """
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        file = (out_dir / LOCK).open("a+", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--out_dir {out_dir} cannot be written: {error.strerror}; name another") from None
    with file:
        if not _take(file):
            file.seek(0)
            raise UsageError(
                f"--out_dir {out_dir} is in use by process {file.read().strip()}; "
                "wait for it, or name another --out_dir"
            )
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def _take(file: IO[str]) -> bool:
    """Lock an open file for this process, without waiting."""
    try:
        if os.name == "nt":
            import msvcrt

            file.seek(1 << 20)  # beyond the text, which others may read
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # pyright: ignore[reportAttributeAccessIssue]
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def claim(out_dir: Path, overwrite: bool) -> None:
    """Make sure that the folder holds no run, and no file of somebody else's, that a new run would replace.

    Raises:
        UsageError: it holds one.
    """
    if out_dir.exists() and not out_dir.is_dir():
        raise UsageError(f"--out_dir {out_dir} is a file; name a folder")
    if checkpoint.holds_run(out_dir) and not overwrite:
        raise UsageError(
            f"--out_dir {out_dir} already holds a run; continue it with --init_from resume, "
            "keep it and name another --out_dir, or delete it with --overwrite"
        )
    for name in ("config.json", "tokenizer.json"):
        if (out_dir / name).exists() and not _is_ours(out_dir):
            raise UsageError(f"--out_dir {out_dir} has a {name} that is not a run's; name another --out_dir")


def _is_ours(out_dir: Path) -> bool:
    try:
        return load(out_dir)[1]["format"] == FORMAT
    except UsageError:
        return False


def delete(out_dir: Path) -> None:
    """Delete a run's own files and folders, and nothing else that its folder may hold."""
    checkpoint.delete(out_dir)
    for path in [*out_dir.glob(f"{TEMPORARY}*"), *(out_dir / name for name in RUN_FILES)]:
        path.unlink(missing_ok=True)
    with suppress(OSError):  # it holds something else, or is not there
        (out_dir / "plots").rmdir()


def save(out_dir: Path, config: TrainConfig, vocabulary: tokenizer.Tokenizer, about: Mapping[str, Any]) -> None:
    """Write `config.json`, with the configuration and what was resolved, and `tokenizer.json`."""
    asked = {name: value for name, value in dataclasses.asdict(config).items() if name not in COMMANDS}
    content = {"format": FORMAT, "config": asked, **about}
    write_atomic(out_dir / "config.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    vocabulary.save(out_dir / "tokenizer.json")


def load(out_dir: Path) -> tuple[TrainConfig, dict[str, Any]]:
    """The configuration of a run, and the whole of its `config.json`.

    Raises:
        CorruptCheckpoint: the file is not one of ours.
    """
    path = out_dir / "config.json"
    content = checkpoint.read_json(path)
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    saved = content.get("config")
    if content.get("format") != FORMAT or not isinstance(saved, dict) or not saved.keys() <= known:
        raise CorruptCheckpoint(f"{path} is not the configuration of a run of this version")
    config = TrainConfig(**saved)
    validate(config)
    return config, content


def check_resume(out_dir: Path, config: TrainConfig, data: Corpus) -> None:
    """A resumed run keeps its shape, its vocabulary and its text.

    Raises:
        UsageError: one of them changed.
    """
    saved, about = load(out_dir)
    for name in FIXED:
        asked, had = getattr(config, name), getattr(saved, name)
        if asked != had:
            flag = "n_kv_head" if name == "kv_heads" else name
            raise UsageError(f"--{flag} {asked}: the run in {out_dir} has {had}, and a resume keeps it; leave it out")
    if data.tokenizer != tokenizer.load(out_dir / "tokenizer.json"):
        raise UsageError(
            f"--dataset {config.dataset}: its vocabulary is not that of the run in {out_dir}; "
            "resume with the run's own data, or start another --out_dir"
        )
    began_with = about.get("corpus", {}).get("source_sha256")
    if data.source_sha256 != began_with:
        raise UsageError(
            f"--dataset {config.dataset}: the text changed since the run in {out_dir} began (sha256 "
            f"{data.source_sha256[:8]}, then {str(began_with)[:8]}); restore it, or start another --out_dir"
        )
