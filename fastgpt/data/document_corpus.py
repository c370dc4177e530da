"""Prepares corpora of documents: shards of tokens, in which an end-of-text token follows each document.

Several processes tokenize the parts of the source (`documents.parts`), each part into a shard of the train split and
one of the val split. A hash of its text sends a document to a split. So the bytes of a corpus depend on the source and
the settings only.

Until a corpus is complete it lies in a hidden folder, which a killed process leaves behind:

    .NAME.unfinished/  .lock  tokenizer.json  00000.json ...    a file for each finished part, written after its shards
                       corpus/  train-00000.bin  val-00000.bin ...  meta.json

The next start with the same source and settings checks the shards of finished parts and keeps them. At the end `corpus`
is renamed, and the rest is deleted.
"""

import functools
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgpt.data import corpus, documents, token_file
from fastgpt.data.documents import Document, Part, Source
from fastgpt.data.prepared import DOCUMENTS_FORMAT, SPLITS, Corpus, load
from fastgpt.data.sharded_tokens import NAME
from fastgpt.data.sources import Piece
from fastgpt.errors import UsageError
from fastgpt.system import cpus, files, lock
from fastgpt.system.bars import Bars, bars
from fastgpt.system.units import counted
from fastgpt.system.workers import Workers, workers
from fastgpt.tokenizer import saved
from fastgpt.tokenizer.base import Text, Tokenizer
from fastgpt.tokenizer.gpt2 import Gpt2Tokenizer

UNFINISHED = ".unfinished"
READING = 1  # the way documents are read, divided into parts and sent to splits
VOCABULARY_PARTS = 8  # evenly spaced parts of the source that a bpe is trained on


@dataclass(frozen=True)
class Rules:
    """The settings that decide which texts there are and where each goes."""

    text_key: str
    val_share: float

    def is_val(self, document: Document) -> bool | None:
        """Whether a document belongs to the val split, by a hash of its text; None if it has no text."""
        digest, length = hashlib.blake2b(digest_size=8), 0
        for text in document:
            digest.update(text.encode())
            length += len(text)
        return int.from_bytes(digest.digest()) < self.val_share * 2**64 if length else None


@dataclass(frozen=True)
class Task:
    """A part to tokenize into shards with a number, below the folder of an unfinished corpus."""

    folder: Path
    number: int
    part: Part
    rules: Rules
    vocabulary: str  # the sha256 of tokenizer.json

    @property
    def record(self) -> Path:
        """The file that says that the part is finished."""
        return self.folder / f"{self.number:05}.json"

    def shard(self, split: str) -> Path:
        return self.folder / "corpus" / NAME.format(split=split, number=self.number)


def prepare(
    source: str,
    *,
    tokenizer: str = "gpt2",
    vocab_size: int | None = None,
    gpt2_vocab: str | None = None,
    text_key: str = "text",
    val_share: float = 0.005,
    jobs: int | None = None,
    data_dir: str = "data",
    quiet: bool = False,
) -> Corpus:
    """Tokenize documents into `data_dir`, or find them there, and open the corpus.

    Args:
        source: a folder of .txt, .jsonl and .parquet files, or one such file.
        tokenizer: gpt2, byte, or bpe, which is trained on documents of the train split from at most
            `VOCABULARY_PARTS` parts of the source.
        vocab_size: largest vocabulary of a bpe, default 1024; otherwise None or the tokenizer's own size.
        gpt2_vocab: folder with GPT-2's vocab.bpe and encoder.json.
        text_key: the key of a .jsonl file's lines, or the column of a .parquet file, that holds the text.
        val_share: the share of documents in the val split.
        jobs: processes; None: one for each CPU.
        quiet: show no progress on stderr.

    Raises:
        UsageError: an argument, a file or a document is wrong in a way that a user can mend.
        RunFailed: a process was killed.
    """
    rules, where = Rules(text_key, val_share), Path(data_dir)
    _check_vocabulary(tokenizer, vocab_size)
    found = documents.find(source, where)
    states, parts = found.states(), documents.parts(found, text_key)
    if not parts:
        raise UsageError(f"`source` {source} is empty; name documents that hold text")
    wanted = _known_vocabulary(tokenizer, gpt2_vocab)
    with workers(min(jobs or cpus.usable(), len(parts))) as helpers, bars(quiet) as progress:
        key = _key(found, rules, helpers, progress)
        size = vocab_size or saved.KINDS[tokenizer].default_size
        label = [corpus.file_name(found.name), tokenizer, *([str(size)] if wanted is None else []), key[:8]]
        target = where / "-".join(label)
        _remark(found, target, progress)
        if there := corpus.reusable(target, key, wanted):
            _delete_left(_unfinished_folder(target))
            return there
        try:
            with _unfinished(target) as folder:
                text = Text("", lambda: _sample(parts, rules), size, ends=True)
                vocabulary = _vocabulary_in(folder, wanted, tokenizer, text, progress)
                sha256 = files.sha256(folder / "tokenizer.json")
                tasks = [Task(folder, number, part, rules, sha256) for number, part in enumerate(parts)]
                made = _tokenized(tasks, helpers, progress)
                if found.states() != states:
                    raise UsageError(f"`source` {source} changed while it was read; run again when it is complete")
                _finish(folder, source, found, rules, key, vocabulary, made)
                corpus.publish(folder / "corpus", target, key, vocabulary)
                files.sync(where)
        except OSError as error:
            raise UsageError(
                f"`data_dir` {where}: cannot write {target.name}: {error.strerror}; name another, or make room there: "
                "the same command keeps the parts that are finished"
            ) from None
    return load(target)


def _remark(found: Source, target: Path, progress: Bars) -> None:
    """Say what is left out, and what preparations with other settings have left behind."""
    if found.others:
        progress.say(f"left out {counted(found.others, 'file')} of other kinds than {', '.join(documents.KINDS)}")
    own = _unfinished_folder(target)
    for folder in target.parent.glob(f".{corpus.file_name(found.name)}-*{UNFINISHED}"):
        if folder != own:
            progress.say(
                f"{folder} is unfinished, of another text or by other settings; delete it if it is not to go on"
            )


def _check_vocabulary(kind: str, vocab_size: int | None) -> None:
    if kind not in saved.KINDS:
        raise UsageError(f"`tokenizer` {kind!r} is not one of {', '.join(saved.KINDS)}")
    if not saved.KINDS[kind].can_end:
        able = [name for name, other in saved.KINDS.items() if other.can_end]
        raise UsageError(
            f"`tokenizer` {kind} has no end-of-text token, which follows each document; use `tokenizer` "
            f"{', '.join(able[:-1])} or {able[-1]}"
        )
    if vocab_size is not None:
        saved.KINDS[kind].check_size(vocab_size, ends=True)


def _known_vocabulary(kind: str, gpt2_vocab: str | None) -> Tokenizer | None:
    """The vocabulary, unless it is to be trained."""
    if kind == "gpt2":
        return Gpt2Tokenizer.from_files(gpt2_vocab)
    if saved.KINDS[kind].default_size is None:
        return saved.KINDS[kind].made_from(Text("", lambda: [], None, ends=True))
    return None


def _key(found: Source, rules: Rules, helpers: Workers, progress: Bars) -> str:
    """The sha256 of all that decides the texts of the two splits: the files' content and order, and the rules."""
    parts = documents.byte_parts(found)
    digest = hashlib.sha256(json.dumps([READING, rules.text_key, rules.val_share]).encode())
    for content in progress.track(
        "reading", helpers.map(documents.content_hash, parts), list(map(documents.size, parts))
    ):
        digest.update(content.encode())
    return digest.hexdigest()


def _unfinished_folder(target: Path) -> Path:
    return target.with_name(f".{target.name}{UNFINISHED}")


def _delete_left(folder: Path) -> None:
    """Delete what is left beside a corpus that is complete, if the process died just then."""
    if folder.exists():
        with suppress(OSError, lock.Locked), lock.held(folder / ".lock"):
            shutil.rmtree(folder)


@contextmanager
def _unfinished(target: Path) -> Iterator[Path]:
    """The folder of an unfinished corpus. It stays if the process dies or the disk is full, and is deleted otherwise.

    Raises:
        UsageError: another process has it.
        OSError: it cannot be made.
    """
    parent, folder = target.parent, _unfinished_folder(target)
    try:
        with files.parents_of(folder):
            (folder / "corpus").mkdir(parents=True, exist_ok=True)
            with lock.held(folder / ".lock"):
                try:
                    yield folder
                except UsageError:
                    shutil.rmtree(folder)
                    raise
                shutil.rmtree(folder)
    except lock.Locked as error:
        raise UsageError(
            f"`data_dir` {parent}: process {error.owner} is preparing {target.name} there; wait for it, or stop it"
        ) from None


def _vocabulary_in(folder: Path, wanted: Tokenizer | None, kind: str, text: Text, progress: Bars) -> Tokenizer:
    """The vocabulary that an unfinished corpus began with, if it is the wanted one; else a new one, to begin anew."""
    path = folder / "tokenizer.json"
    with suppress(UsageError):  # none yet
        before = saved.load(path)
        if wanted is None or before == wanted:
            return before
    for record in folder.glob("[0-9]*.json"):
        record.unlink()
    if wanted is None:
        progress.say(f"training a vocabulary of {counted(text.vocab_size or 0, 'token')}")
        wanted = saved.KINDS[kind].made_from(text)
    wanted.save(path)
    return wanted


def _sample(parts: Sequence[Part], rules: Rules) -> Iterator[str]:
    """The texts that a vocabulary is trained on."""
    count = min(VOCABULARY_PARTS, len(parts))
    for part in (parts[len(parts) * number // count] for number in range(count)):
        for document in documents.read(part, rules.text_key):
            if rules.is_val(document) is False:
                yield from document


def _tokenized(tasks: Sequence[Task], helpers: Workers, progress: Bars) -> list[dict[str, Any]]:
    """The facts about the shards of each part, all of which are made now or were before."""
    kept = sum(task.record.exists() for task in tasks)
    if kept:
        progress.say(f"going on with {kept:,} of {counted(len(tasks), 'part')}, which were finished before")
    sizes = [documents.size(task.part) for task in tasks]
    return list(progress.track("tokenizing", helpers.map(make_shards, tasks), sizes))


def make_shards(task: Task) -> dict[str, Any]:
    """Make the shards of a part, unless they are there. Returns the facts about each, by split."""
    vocabulary = _vocabulary(task.folder / "tokenizer.json", task.vocabulary)
    if there := _finished(task, vocabulary.vocab_size):
        return there
    val: list[Document] = []
    counts = {split: Counter(documents=0, characters=0) for split in SPLITS}
    pieces = {
        "train": _train_pieces(task, val, counts["train"]),
        "val": (piece for document in val for piece in _ended(document, counts["val"])),
    }
    made = {split: token_file.write(task.shard(split), pieces[split], vocabulary) | counts[split] for split in SPLITS}
    for split in SPLITS:
        if not made[split]["tokens"]:
            task.shard(split).unlink()
    files.sync(task.folder / "corpus")
    files.write_atomic(task.record, json.dumps(made))
    return made


@functools.lru_cache(maxsize=1)
def _vocabulary(path: Path, sha256: str) -> Tokenizer:
    """The vocabulary in a file with this hash; a worker reads it once."""
    return saved.load(path)


def _finished(task: Task, vocab_size: int) -> dict[str, Any] | None:
    """The facts about the shards of a part, if they are whole."""
    try:
        made = json.loads(task.record.read_text(encoding="utf-8"))
        for split in SPLITS:
            if made[split]["tokens"]:
                token_file.check(task.shard(split), vocab_size, made[split]["tokens"], made[split]["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return made


def _train_pieces(task: Task, val: list[Document], count: Counter) -> Iterator[Piece]:
    """The documents of the train split; those of the val split are put into `val`."""
    for document in documents.read(task.part, task.rules.text_key):
        is_val = task.rules.is_val(document)
        if is_val:
            val.append(document)
        elif is_val is not None:
            yield from _ended(document, count)


def _ended(document: Document, count: Counter) -> Iterator[Piece]:
    for text in document:
        count["characters"] += len(text)
        yield text
    count["documents"] += 1
    yield None


def _finish(
    folder: Path,
    source: str,
    found: Source,
    rules: Rules,
    key: str,
    vocabulary: Tokenizer,
    made: Sequence[dict[str, Any]],
) -> None:
    """Write meta.json. Raises `UsageError` if a split holds no document."""
    splits = {split: _split(split, [facts[split] for facts in made]) for split in SPLITS}
    total = sum(split["documents"] for split in splits.values())
    if total < 2:
        raise UsageError(
            f"`source` {source} has {counted(total, 'document')} with text, and a corpus needs one to train on and one "
            "to validate on; prepare one text with `dataset` FILE"
        )
    for split in SPLITS:
        if not splits[split]["documents"]:
            other = "larger" if split == "val" else "smaller"
            raise UsageError(
                f"`source` {source} has {counted(total, 'document')} with text, and none in the {split} split by "
                f"`val_share` {rules.val_share}; try a {other} one, or more documents"
            )
    meta = {
        "format": DOCUMENTS_FORMAT,
        "dataset": found.name,
        "source_sha256": key,
        "text_key": rules.text_key,
        "val_share": rules.val_share,
        "characters": sum(facts[split]["characters"] for facts in made for split in SPLITS),
        "bytes": sum(split["bytes"] for split in splits.values()),
        "vocab_size": vocabulary.vocab_size,
        "dtype": token_file.dtype_of(vocabulary.vocab_size),
        **splits,
        "tokenizer": vocabulary.to_json(),
    }
    files.write(folder / "corpus" / "meta.json", [json.dumps(meta, indent=1).encode()])
    files.sync(folder / "corpus")


def _split(split: str, parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The entry of a split in meta.json, by the facts about its shards."""
    shards = [
        {"file": NAME.format(split=split, number=number)} | {name: part[name] for name in ("tokens", "bytes", "sha256")}
        for number, part in enumerate(parts)
        if part["tokens"]
    ]
    return {name: sum(part[name] for part in parts) for name in ("tokens", "bytes", "documents")} | {"shards": shards}
