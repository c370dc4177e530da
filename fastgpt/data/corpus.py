"""Prepares corpora: a text becomes a folder with train.bin, val.bin and meta.json, once.

`prepare` finds the text, tokenizes it in two streaming passes and returns a `Corpus`. A folder that is already there
and whose source has not changed is reused. In a corpus of several documents, the files of a folder, each document is
followed by the vocabulary's end-of-text. A char vocabulary has none, and holds the characters only.
"""

import dataclasses
import hashlib
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastgpt.data import sources, token_file
from fastgpt.data.prepared import FORMAT, Corpus, is_prepared, load
from fastgpt.data.sources import Source, TextFiles
from fastgpt.errors import UsageError, nearest, shown
from fastgpt.system import files
from fastgpt.system.scratch_folder import scratch_folder
from fastgpt.system.units import counted
from fastgpt.tokenizer import saved
from fastgpt.tokenizer.base import Text, Tokenizer
from fastgpt.tokenizer.gpt2 import Gpt2Tokenizer

NAMES = ("pydocs", "shakespeare")
TRAIN_SHARE = 0.9
# The way text is read; a run keeps its own. 1, up to version 0.1.0: byte order marks are text, linked folders are left
# out, documents end in a newline at most, and generation starts from a token that may be in no text. 2: the way of now.
READING = 2


@dataclass(frozen=True)
class Statistics:
    """The results of the first pass over a text.

    Attributes:
        chars: its distinct characters in code point order.
        document_ends: for each document that a token of its own ends, the number of characters before that token.
    """

    sha256: str
    characters: int
    bytes: int
    chars: str
    document_ends: tuple[int, ...]

    @property
    def train_end(self) -> int:
        """Characters in the train split."""
        return int(TRAIN_SHARE * self.characters)

    @property
    def train_ends(self) -> int:
        """Documents that end in the train split."""
        return sum(end <= self.train_end for end in self.document_ends)


@dataclass(frozen=True)
class Unprepared:
    """A text that is not tokenized yet, and what `prepare` makes of it.

    Attributes:
        dataset: the name that it was found by.
        size: largest vocabulary of a kind that is trained to a size; None for the others.
        ends: a token of its own ends each document.
        vocabulary: the one to use, or None where the text decides.
        target: the folder to write.
    """

    dataset: str
    source: Source
    statistics: Statistics
    kind: type[Tokenizer]
    size: int | None
    ends: bool
    vocabulary: Tokenizer | None
    target: Path

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def vocab_size(self) -> int:
        """Tokens in the vocabulary; of one that is trained to a size, at most."""
        if self.vocabulary is not None:
            return self.vocabulary.vocab_size
        return self.kind.fixed_size(self.ends) or self.size or len(self.statistics.chars)

    @property
    def end_token(self) -> int | None:
        """The id that would end a document, or None: of a vocabulary that is yet to be made, the last one."""
        if self.vocabulary is not None:
            return self.vocabulary.end_token
        return (self.kind.fixed_size(True) or self.vocab_size) - 1 if self.kind.can_end else None

    @property
    def most_tokens(self) -> tuple[int, int]:
        """The most tokens that the train and the val split can have."""
        text, kind = self.statistics, type(self.vocabulary) if self.vocabulary else self.kind
        train, val = text.train_end, text.characters - text.train_end
        train_size, val_size = (min(4 * one, text.bytes - other) for one, other in ((train, val), (val, train)))
        train_most, val_most = kind.most_tokens(train, train_size), kind.most_tokens(val, val_size)
        return train_most + text.train_ends, val_most + len(text.document_ends) - text.train_ends

    def check_characters(self) -> None:
        """Raise `UsageError` for a character that the given vocabulary lacks."""
        if self.vocabulary is not None:
            with token_file.encoding(self.dataset):
                self.vocabulary.encode(self.statistics.chars)

    def write(self) -> Corpus:
        """Tokenize the text into `target`."""
        vocabulary = self.vocabulary or self.kind.made_from(_text(self.source, self.statistics, self.size, self.ends))
        return _write(self.target, self.dataset, self.source, self.statistics, vocabulary)


def prepare(
    dataset: str = "pydocs",
    *,
    tokenizer: str = "char",
    vocab_size: int | None = None,
    corpus_file: str | None = None,
    gpt2_vocab: str | None = None,
    vocabulary: Tokenizer | None = None,
    data_dir: str = "data",
    reading: int = READING,
    quiet: bool = False,
) -> Corpus:
    """Tokenize a corpus into `data_dir`, or find it there, and open it.

    The first 90 % of the characters are for training, the rest for validation, tokenized apart.

    Args:
        dataset: pydocs, shakespeare, a text file, a folder of text files, a prepared folder, or the name of a
            prepared folder in `data_dir`; tried in that order.
        tokenizer: char, byte, gpt2 or bpe. A prepared folder keeps its own; only char, the default, and the
            folder's own kind are accepted for it.
        vocab_size: largest vocabulary of a bpe, default 1024; otherwise None or the tokenizer's own size.
        corpus_file: a local copy of tiny Shakespeare; for shakespeare only.
        gpt2_vocab: folder with GPT-2's vocab.bpe and encoder.json.
        vocabulary: tokenize a text with this one instead of its own; not for a prepared folder.
        reading: 1 reads a text as version 0.1.0 did; see `READING`.
        quiet: do not say on stderr what was prepared.

    Raises:
        UsageError: an argument, the text or the folder is wrong in a way that a user can mend.
    """
    verb, found = find(
        dataset,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        corpus_file=corpus_file,
        gpt2_vocab=gpt2_vocab,
        vocabulary=vocabulary,
        data_dir=data_dir,
        reading=reading,
        quiet=quiet,
    )
    if isinstance(found, Unprepared):
        verb, found = "prepared", found.write()
    own = vocabulary if verb != "opened" or vocabulary == found.tokenizer else None
    return _announced(verb, _started(found, own, reading), quiet)


def has_tokens(dataset: str, data_dir: str = "data") -> bool:
    """Whether a `dataset` is a prepared folder, which keeps its own tokenizer."""
    try:
        return dataset not in NAMES and is_prepared(_find(dataset, Path(data_dir)))
    except UsageError:  # `find` says why
        return False


def find(
    dataset: str,
    *,
    tokenizer: str,
    vocab_size: int | None,
    corpus_file: str | None,
    gpt2_vocab: str | None,
    data_dir: str,
    vocabulary: Tokenizer | None = None,
    reading: int = READING,
    quiet: bool = False,
    download: bool = True,
) -> tuple[str, Corpus | Unprepared]:
    """Find the data of `prepare`: "opened" or "reused" and the corpus, or "found" and the text to tokenize.

    Nothing is written, unless tiny Shakespeare is downloaded. The arguments and errors are those of `prepare`.

    Args:
        download: False raises instead of downloading.
    """
    _check_arguments(dataset, tokenizer, vocab_size, corpus_file)
    if dataset == "pydocs":
        source = sources.pydocs()
    elif dataset == "shakespeare":
        source = sources.shakespeare(corpus_file, quiet=quiet, download=download)
    else:
        path = _find(dataset, Path(data_dir))
        if is_prepared(path):
            corpus = load(path, gpt2_vocab)
            _check_prepared(corpus, tokenizer, vocab_size)
            return "opened", corpus
        source = sources.text_files(path, skip=Path(data_dir), as_before=reading == 1)
    kind = saved.KINDS[tokenizer]
    can_end = vocabulary.end_token is not None if vocabulary else kind.can_end
    ends = can_end and reading > 1 and isinstance(source, TextFiles) and len(source.paths) > 1
    if ends:
        source = dataclasses.replace(source, ended=True)
    if vocab_size is not None:
        kind.check_size(vocab_size, ends)

    statistics = _measure(dataset, source)
    size = (vocab_size or kind.default_size) if kind.default_size else None
    label = [file_name(source.name), tokenizer, *([str(size)] if size else []), statistics.sha256[:8]]
    if vocabulary is not None:
        label = [file_name(source.name), vocabulary.kind, f"of-{vocabulary.sha256()[:8]}", statistics.sha256[:8]]
    elif tokenizer == "gpt2" and gpt2_vocab is not None:
        vocabulary = Gpt2Tokenizer.from_files(gpt2_vocab)
    target = Path(data_dir) / "-".join(label)
    if corpus := reusable(target, statistics.sha256, vocabulary):
        return "reused", corpus
    return "found", Unprepared(dataset, source, statistics, kind, size, ends, vocabulary, target)


def _started(corpus: Corpus, vocabulary: Tokenizer | None, reading: int) -> Corpus:
    """The corpus with a vocabulary that starts from a trained token.

    That is the end of a document if the train split holds one, else the first token of the split. A given vocabulary
    stays as it is, and so does that of a run with `reading` 1.
    """
    if vocabulary is not None:
        return dataclasses.replace(corpus, tokenizer=vocabulary)
    if reading == 1:
        return corpus
    train, end = corpus.train(), corpus.tokenizer.end_token
    start = end if end is not None and token_file.holds(train, end) else int(train[0])
    return dataclasses.replace(corpus, tokenizer=corpus.tokenizer.starting_from(start))


def _check_arguments(dataset: str, kind: str, vocab_size: int | None, corpus_file: str | None) -> None:
    if kind not in saved.KINDS:
        raise UsageError(f"`tokenizer` {kind!r} is not one of {', '.join(saved.KINDS)}")
    if vocab_size is not None:
        saved.KINDS[kind].check_size(vocab_size)
    if corpus_file is not None and dataset != "shakespeare":
        raise UsageError(
            f"`corpus_file` {corpus_file} is a copy of tiny Shakespeare, and `dataset` is {dataset}; "
            f"for your own text use `dataset` {corpus_file}"
        )


def _check_prepared(corpus: Corpus, kind: str, vocab_size: int | None) -> None:
    own = corpus.tokenizer
    if kind not in ("char", own.kind) or vocab_size not in (None, own.vocab_size):
        asked = f"`tokenizer` {kind}" + (f" `vocab_size` {vocab_size}" if vocab_size else "")
        raise UsageError(
            f"{asked}: {corpus.path} is already prepared with {own.kind}, {counted(own.vocab_size, 'token')}; "
            "leave it out, or give `dataset` the text itself"
        )


def _find(dataset: str, data_dir: Path) -> Path:
    """The file or folder that `dataset` names, if it is none of `NAMES`."""
    prepared = data_dir / dataset
    try:
        if dataset and Path(dataset).exists():
            return Path(dataset)
        if dataset and is_prepared(prepared):
            return prepared
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise UsageError(f"`dataset` {shown(dataset)} cannot be read: {error.strerror}") from None
    known = [*NAMES, *sorted(path.name for path in data_dir.glob("[!.]*/") if is_prepared(path))]
    more = f" and {len(known) - 8} more in {data_dir}" if len(known) > 8 else ""
    raise UsageError(
        f"`dataset` {shown(dataset)} is no file or folder and no known name ({', '.join(known[:8])}{more})"
        f"{nearest(dataset, known)}"
    )


def located(dataset: str, data_dir: str) -> str:
    """The dataset by a name that is valid in any working folder: one of `NAMES`, or an absolute path.

    Raises:
        UsageError: there is none.
    """
    return dataset if dataset in NAMES else files.absolute(_find(dataset, Path(data_dir)))


def file_name(name: str) -> str:
    """A name as a part of a folder's."""
    return re.sub(r"[^\w.-]+", "_", name)[:40].strip(".") or "corpus"


def _announced(verb: str, corpus: Corpus, quiet: bool) -> Corpus:
    if not quiet:
        tokens = corpus.train_tokens + corpus.val_tokens
        amount = counted(tokens, "token") if corpus.characters is None else counted(corpus.characters, "character")
        print(
            f"{verb} {corpus.name}: {amount}, {counted(corpus.tokenizer.vocab_size, 'token')} in the vocabulary "
            f"-> {corpus.path}",
            file=sys.stderr,
        )
    return corpus


def _measure(dataset: str, source: Source) -> Statistics:
    """The first pass. Raises `UsageError` if the text is too short for a train and a val split.

    The hash is that of the text. The end of a document counts as a byte that never occurs in UTF-8.
    """
    digest, characters, length, ends = hashlib.sha256(), 0, 0, list[int]()
    seen = np.zeros(sys.maxunicode + 1, dtype=bool)
    for text in source.texts():
        if text is None:
            digest.update(b"\xff")
            ends.append(characters)
            continue
        data = text.encode()
        digest.update(data)
        characters += len(text)
        length += len(data)
        seen[np.frombuffer(text.encode("utf-32-le"), dtype="<u4")] = True
    if characters < 2:
        what = "is empty" if characters == 0 else "has 1 character"
        raise UsageError(
            f"`dataset` {shown(dataset)} {what}; a corpus needs at least 2 characters, "
            "one to train on and one to validate with"
        )
    chars = "".join(map(chr, np.flatnonzero(seen)))
    return Statistics(digest.hexdigest(), characters, length, chars, tuple(ends))


def _text(source: Source, statistics: Statistics, vocab_size: int | None, ends: bool) -> Text:
    """The text that a vocabulary is made from."""

    def train() -> Iterator[str]:
        pieces = sources.chunks(sources.span(source.texts(), 0, statistics.train_end))
        return (text for text in pieces if text is not None)

    return Text(statistics.chars, train, vocab_size, ends)


def reusable(target: Path, sha256: str, vocabulary: Tokenizer | None) -> Corpus | None:
    """The corpus at `target`; None if it is missing or damaged, or has another text or vocabulary than the given."""
    if not target.exists():
        return None
    try:
        corpus = load(target)
    except UsageError:
        return None
    same = corpus.source_sha256 == sha256 and vocabulary in (None, corpus.tokenizer)
    return corpus if same else None


def _write(target: Path, dataset: str, source: Source, statistics: Statistics, vocabulary: Tokenizer) -> Corpus:
    """The second pass. It writes to a hidden sibling of `target`, which is renamed when it is complete."""
    train_end = statistics.train_end
    try:
        with scratch_folder(target) as temporary:
            splits = sources.span(source.texts(), 0, train_end), sources.span(source.texts(), train_end)
            with token_file.encoding(dataset):
                train = token_file.write(temporary / "train.bin", splits[0], vocabulary)
                val = token_file.write(temporary / "val.bin", splits[1], vocabulary)
            if train["bytes"] + val["bytes"] != statistics.bytes:
                raise UsageError(f"`dataset` {shown(dataset)} changed while it was read; run again when it is complete")
            meta = {
                "format": FORMAT,
                "dataset": source.name,
                "source_sha256": statistics.sha256,
                "characters": statistics.characters,
                "bytes": statistics.bytes,
                "vocab_size": vocabulary.vocab_size,
                "dtype": token_file.dtype_of(vocabulary.vocab_size),
                "train": train,
                "val": val,
                "tokenizer": vocabulary.to_json(),
            }
            files.write(temporary / "meta.json", [json.dumps(meta, indent=1).encode()])
            publish(temporary, target, statistics.sha256, vocabulary)
    except OSError as error:
        raise UsageError(
            f"`data_dir` {target.parent}: cannot write {target.name}: {error.strerror}; name another"
        ) from None
    return load(target)


def publish(temporary: Path, target: Path, sha256: str, vocabulary: Tokenizer) -> None:
    """Rename `temporary` to `target`, unless another process has finished the same corpus there meanwhile."""
    try:
        temporary.rename(target)
    except OSError:
        if reusable(target, sha256, vocabulary) is not None:
            return
        target.rename(temporary.with_name(temporary.name + ".damaged"))
        temporary.rename(target)
