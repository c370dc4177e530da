"""The folder of a run: its lock, its configuration, and the settings that a resume keeps.

out/  config.json  tokenizer.json  metrics.jsonl  .lock  latest  best  step-000500/  plots/loss.png
"""

import dataclasses
import hashlib
import json
import math
import os
import shutil
import sys
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from fastgpt import __version__
from fastgpt.checkpoint import store
from fastgpt.config.fields import MOST, validate
from fastgpt.config.training import TrainConfig
from fastgpt.data import corpus
from fastgpt.data.corpus import READING
from fastgpt.data.prepared import Corpus
from fastgpt.errors import CorruptCheckpoint, UsageError, shown
from fastgpt.model.moments import count_moments
from fastgpt.system import lock
from fastgpt.system.files import absolute, recover, temporary_sibling, write, write_atomic
from fastgpt.system.units import counted, format_bytes
from fastgpt.tokenizer import base
from fastgpt.tokenizer.saved import load as load_tokenizer

FORMAT = 1
LOCK = ".lock"
# In the order of deletion. config.json goes last: by it, `claim` knows that the others belong to a run.
RUN_FILES = ("tokenizer.json", "metrics.jsonl", "latest", "best", "config.json")
PICTURE = "plots/loss.png"
DATA_PATHS = ("corpus_file", "data_dir", "gpt2_vocab")  # beside the dataset, which may also be a name
COMMANDS = ("init_from", "download", "overwrite", "dry_run", "allow_data_change")  # they concern one start, not the run
STARTED_FROM = "started_from"  # in config.json: the model whose weights the run began with
CONVERTED_FROM = "converted_from"  # in config.json: what a model was that no run of ours trained
# The model's settings that a resume may change. Instead of vocab_size the vocabulary itself is compared.
CHANGEABLE = ("vocab_size", "dropout", "attention_dropout")


@contextmanager
def locked(out_dir: Path) -> Iterator[None]:
    """Lock the folder until the end of the block; the system frees it when the process dies.

    What a dead process left half done is repaired first.

    Raises:
        UsageError: another process owns it, or it cannot be made or written.
    """
    with ExitStack() as stack:
        with explained(out_dir):
            out_dir.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock.held(out_dir / LOCK))
            recover(out_dir)
        yield


def mend(out_dir: Path) -> None:
    """Put back a checkpoint that a dead process had put aside, before a resume reads the folder.

    Raises:
        UsageError: another process owns the folder, or it cannot be written.
    """
    if store.aside(out_dir):
        with locked(out_dir):
            pass


def check_free(out_dir: Path) -> None:
    """Raise `UsageError` if another process owns the folder. Makes and changes nothing."""
    with explained(out_dir):
        lock.check(out_dir / LOCK)


@contextmanager
def explained(out_dir: Path) -> Iterator[None]:
    """Turn the errors of locking and writing into a `UsageError` that names the folder."""
    try:
        yield
    except lock.Locked as error:
        raise UsageError(
            f"`out_dir` {out_dir} is in use by process {error.owner}; wait for it, or name another `out_dir`"
        ) from None
    except OSError as error:
        raise UsageError(f"`out_dir` {out_dir} cannot be written: {error.strerror}; name another") from None


def named_step(out_dir: Path, init_from: str) -> Path | None:
    """The checkpoint of this run that `init_from` names by its path, or None for "resume".

    Raises:
        UsageError: it is not a checkpoint of this run.
    """
    if init_from == "resume":
        return None
    folder = out_dir / Path(init_from).name
    if folder not in store.folders(out_dir) or not folder.samefile(init_from):
        raise UsageError(f"`init_from` {init_from} is not the folder of a step in {out_dir}, such as out/step-000500")
    return folder


def checkpoint_bytes(config: TrainConfig, parameters: int) -> int:
    """The size of a checkpoint: float32 weights and moments."""
    return 4 * (parameters + count_moments(config, parameters))


def most_checkpoints(config: TrainConfig, step: int = 0) -> int:
    """The most checkpoints that lie in the folder at once, of those that are written after a step."""
    end, every = config.max_iters, config.keep_every
    # The last ones and the one that is being written begin after this step; some of them are kept for good as well.
    recent = bisect_left(range(step, end), -1 - config.keep_last, key=lambda after: -_saves(config, after)) + step
    passing = _saves(config, recent) - _multiples(every, recent, end)
    return min(_saves(config, step), _multiples(every, step, end) + passing + 1)  # the best one


def _saves(config: TrainConfig, after: int) -> int:
    """The checkpoints after a step: at evaluations, at steps whose checkpoint is kept for good, and at the end."""
    end, intervals = config.max_iters, [config.eval_interval, config.keep_every]
    both = _multiples(math.lcm(*intervals), after, end)
    last = after < end and not any(every and end % every == 0 for every in intervals)
    return sum(_multiples(every, after, end) for every in intervals) - both + last


def _multiples(every: int, after: int, end: int) -> int:
    """The multiples of a number above `after`, up to `end`; none of 0."""
    return end // every - after // every if every else 0


def check_disk(out_dir: Path, config: TrainConfig, parameters: int, step: int) -> None:
    """Check that the disk has room for the checkpoints to come.

    Raises:
        UsageError: the folder cannot be written, or there is no room.
    """
    weights = 4 * parameters
    size, largest_file = checkpoint_bytes(config, parameters), max(weights, 4 * count_moments(config, parameters))
    count = most_checkpoints(config, step)
    probe = temporary_sibling(out_dir / "probe")
    with explained(out_dir):
        held = sum(store.size(folder) for folder in store.folders(out_dir) if not _stays(folder, config, step))
        try:
            write(probe, [bytes(1 << 16)])
        finally:
            probe.unlink(missing_ok=True)
    free, allowed = shutil.disk_usage(out_dir).free + held, _allowed_file()
    fewer = "lower `keep_last`, or raise `keep_every`" if config.keep_every else "or lower `keep_last`"
    if count * size > free:
        raise UsageError(
            f"`out_dir` {out_dir}: room for {counted(count, 'checkpoint')}, {format_bytes(count * size)}, is needed, "
            f"and its disk has {format_bytes(free)}; make room, name a folder elsewhere, {fewer}"
        )
    if largest_file > allowed:
        raise UsageError(
            f"`out_dir` {out_dir}: a checkpoint has a file of {format_bytes(largest_file)}, and this process may write "
            f"{format_bytes(allowed)} into one; raise that with ulimit -f"
        )


def _stays(folder: Path, config: TrainConfig, step: int) -> bool:
    """Whether a run that goes on from a step keeps this checkpoint for good."""
    return 0 < store.step_of(folder) <= step and store.is_kept(store.step_of(folder), config.keep_every)


def _allowed_file() -> int:
    """Bytes that this process may write into a file."""
    if os.name == "nt":
        return sys.maxsize
    import resource

    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    return sys.maxsize if limit == resource.RLIM_INFINITY else limit


def claim(out_dir: Path, overwrite: bool) -> None:
    """Check that a new run would replace neither a run nor somebody else's file.

    Raises:
        UsageError: it holds one.
    """
    if out_dir.exists() and not out_dir.is_dir():
        raise UsageError(f"`out_dir` {out_dir} is a file; name a folder")
    if store.holds_run(out_dir) and not overwrite:
        raise UsageError(
            f"`out_dir` {out_dir} already holds a run; continue it with `init_from` resume, "
            "keep it and name another `out_dir`, or delete it with `overwrite=True`"
        )
    for name in ("config.json", "tokenizer.json"):
        if (out_dir / name).exists() and not _is_ours(out_dir):
            raise UsageError(f"`out_dir` {out_dir} has a {name} that is not a run's; name another `out_dir`")


def _is_ours(out_dir: Path) -> bool:
    if any((folder / store.MANIFEST).is_file() for folder in store.folders(out_dir)):
        return True  # even if its configuration is damaged
    try:
        return load(out_dir)[1]["format"] == FORMAT
    except UsageError:
        return False


def delete(out_dir: Path) -> None:
    """Delete the files and folders of a run, and nothing else.

    Raises:
        UsageError: one of them cannot be deleted; the rest is still there.
    """
    with explained(out_dir):
        (out_dir / PICTURE).unlink(missing_ok=True)  # first, because it can be drawn again
        store.delete(out_dir)
        recover(out_dir)
        for name in RUN_FILES:
            (out_dir / name).unlink(missing_ok=True)
    with suppress(OSError):  # it holds something else, or is missing
        (out_dir / "plots").rmdir()


def save(out_dir: Path, config: TrainConfig, vocabulary: base.Tokenizer, about: Mapping[str, Any]) -> None:
    """Write `tokenizer.json`, and `config.json` with the configuration and `about`, which was resolved from it."""
    asked = {name: value for name, value in dataclasses.asdict(config).items() if name not in COMMANDS}
    content = {"format": FORMAT, "fastgpt": __version__, "config": asked, **about}
    content["sha256"] = content_hash(content)
    write_atomic(out_dir / "config.json", json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    vocabulary.save(out_dir / "tokenizer.json")


def load(out_dir: Path) -> tuple[TrainConfig, dict[str, Any]]:
    """The configuration of a run, and the whole of its `config.json`.

    Raises:
        CorruptCheckpoint: the file is not one of ours, or was altered.
    """
    path = out_dir / "config.json"
    content = store.read_json(path)
    known = [field.name for field in dataclasses.fields(TrainConfig)]
    saved, number = content.get("config"), content.get("format")
    if number is None or not isinstance(saved, dict):
        raise CorruptCheckpoint(f"{path} is not the configuration of a run; put back a copy of it")
    if content.get("sha256") != content_hash(content):
        raise CorruptCheckpoint(f"{path} is not what was saved; put back a copy of it, and change settings by flags")
    ours = f"this is fastgpt {__version__}; use the version that wrote it"
    if number != FORMAT:
        raise CorruptCheckpoint(f"{path} has format {number!r:.20}, from {_version(content)}, and {ours}")
    if unknown := [name for name in saved if name not in known]:
        raise CorruptCheckpoint(f"{path} has the setting {unknown[0]!r:.40}, from {_version(content)}, and {ours}")
    if any(not isinstance(content.get(name, {}), dict) for name in ("columns", "corpus", "evaluation")):
        raise CorruptCheckpoint(f"{path} is not the configuration of a run; put back a copy of it")
    if type(threads := content.get("threads", 1)) is not int or threads < 1:
        raise CorruptCheckpoint(f"{path} is not the configuration of a run; put back a copy of it")
    if type(packed(content)) is not bool:
        raise CorruptCheckpoint(f"{path} is not the configuration of a run; put back a copy of it")
    config = TrainConfig(**saved)
    validate(config)
    for name, least in (("windows", 0), ("batch_size", 1)):
        value = content.get("evaluation", {}).get(name, least)
        if type(value) is not int or not least <= value <= MOST:
            raise CorruptCheckpoint(f"{path} records an evaluation with {name} {shown(value)}")
    return config, content


def _version(content: Mapping[str, Any]) -> str:
    """The version that wrote a `config.json`. The first versions wrote none into it."""
    return f"fastgpt {content['fastgpt']!s:.20}" if "fastgpt" in content else "fastgpt 0.1.0 or one before it"


def content_hash(content: Mapping[str, Any]) -> str:
    """The hash of a `config.json` without the hash in it."""
    rest = {name: value for name, value in content.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def check_resume(out_dir: Path, config: TrainConfig, data: Corpus) -> None:
    """Check that a resumed run keeps its model, vocabulary, packing and optimizer and, without `allow_data_change`,
    its text.

    Raises:
        UsageError: one of them changed.
    """
    saved, about = load(out_dir)
    has = _kept_settings(saved) | {"pack": packed(about)}
    for name, asked in (_kept_settings(config) | {"pack": config.pack}).items():
        if asked != has[name] and (name, asked) != ("pack", None):
            raise UsageError(
                f"`{name}` {asked}: the run in {out_dir} has {has[name]}, and a resume keeps it; leave it out"
            )
    ways_out = "" if config.allow_data_change else "go on with it by `allow_data_change=True`, "
    if data.tokenizer != vocabulary(out_dir):
        raise UsageError(
            f"`dataset` {config.dataset}: its vocabulary is not that of the run in {out_dir}; "
            f"resume with the run's own data, {ways_out}or start another `out_dir`"
        )
    began_with = about.get("corpus", {}).get("source_sha256")
    if data.source_sha256 != began_with:
        change = f"(sha256 {data.source_sha256[:8]}, then {str(began_with)[:8]})"
        if not config.allow_data_change:
            raise UsageError(
                f"`dataset` {config.dataset}: the text changed since the run in {out_dir} began {change}; "
                f"restore it, {ways_out}or start another `out_dir`"
            )
        print(f"going on with a text that changed since the run began {change}", file=sys.stderr)


def _kept_settings(config: TrainConfig) -> dict[str, Any]:
    """The settings that a resume keeps: the model's, the kind of its tokenizer, and the optimizer with its state."""
    model = vars(config.architecture().filled())
    return {name: value for name, value in model.items() if name not in CHANGEABLE} | {
        name: getattr(config, name) for name in ("tokenizer", "optimizer")
    }


def packed(about: Mapping[str, Any]) -> bool:
    """Whether the run is packed, by its `config.json`; older versions wrote nothing about it, and packed nothing."""
    return about.get("pack", False)


def anchored(config: TrainConfig) -> TrainConfig:
    """The configuration with absolute paths, so that a resume from another working folder finds the data."""
    paths = {name: absolute(Path(path)) for name in DATA_PATHS if (path := getattr(config, name)) is not None}
    return dataclasses.replace(config, dataset=corpus.located(config.dataset, config.data_dir), **paths)


def relocated(out_dir: Path, config: TrainConfig) -> TrainConfig:
    """The configuration of a resume, whose data was found. A missing `data_dir` is replaced: it is made again.

    Raises:
        UsageError: a path that the run recorded is gone, and no other one was given.
    """
    saved, _ = load(out_dir)
    if config.data_dir == saved.data_dir and not Path(config.data_dir).absolute().parent.is_dir():
        default = TrainConfig.data_dir
        print(f"`data_dir` {config.data_dir}, which the run recorded, is gone: using {default}", file=sys.stderr)
        config = dataclasses.replace(config, data_dir=default)
    for name in ("dataset", "corpus_file", "gpt2_vocab"):
        path = getattr(config, name)
        if path is not None and path == getattr(saved, name) and not _leads_somewhere(name, path, config.data_dir):
            raise UsageError(
                f"`{name}` {path}: the run in {out_dir} recorded this path, and nothing is there; put it back, or pass "
                f"`{name}` with the path where it is now: a text with the same sha256 goes on"
            )
    return config


def _leads_somewhere(name: str, path: str, data_dir: str) -> bool:
    if name != "dataset":
        return Path(path).exists()
    try:
        return bool(corpus.located(path, data_dir))
    except UsageError:
        return False


def reading(about: Mapping[str, Any]) -> int:
    """The `corpus.READING` of the version that began the run: its rules for reading text.

    Raises:
        CorruptCheckpoint: this version does not know the rules.
    """
    number = about.get("corpus", {}).get("reading", 1)
    if number not in range(1, READING + 1):
        raise CorruptCheckpoint(
            f"the run reads its text by rules {number!r:.20}, which {_version(about)} wrote and fastgpt {__version__} "
            "does not know; use that version"
        )
    return number


def vocabulary(out_dir: Path) -> base.Tokenizer:
    """The vocabulary of a run. Raises `UsageError` if its tokenizer.json is missing or damaged."""
    return load_tokenizer(out_dir / "tokenizer.json")
