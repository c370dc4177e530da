"""Reads a part of a text as tokens of a vocabulary that is given: for a model that was trained elsewhere.

The parts are those of `fastgpt.data.corpus`: the first 90 % of the characters are `train`, the rest is `val`, and `all`
is the whole text. The text is tokenized in memory, with two or four bytes a token, and nothing is written.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastgpt.data import corpus, prepared, sources, token_file
from fastgpt.data.prepared import Tokens
from fastgpt.data.sources import Source, TextFiles
from fastgpt.errors import UsageError, shown
from fastgpt.system.units import counted
from fastgpt.tokenizer.base import Tokenizer


@dataclass(frozen=True)
class Dataset:
    """A text by its name, as `fastgpt train` takes it, and where it may lie; see `corpus.prepare`."""

    name: str
    split: str = "val"
    data_dir: str = "data"
    corpus_file: str | None = None
    gpt2_vocab: str | None = None

    def tokens(self, vocabulary: Tokenizer) -> Tokens:
        """The tokens of the split, (N,) uint16 or uint32, N at least 2. Those of a prepared folder are mapped.

        Documents, the files of a folder, each end with the vocabulary's end-of-text, if it has one.

        Raises:
            UsageError: there is no such text, it has a character that the vocabulary lacks, it is prepared with another
                vocabulary, or the split has less than 2 tokens.
        """
        path = Path(corpus.located(self.name, self.data_dir))
        if self.name not in corpus.NAMES and prepared.is_prepared(path):
            tokens = self._prepared(path, vocabulary)
        else:
            tokens = self._encoded(self._source(path), vocabulary)
        if len(tokens) < 2:
            raise UsageError(
                f"`dataset` {shown(self.name)}: its {self.split} split holds {counted(len(tokens), 'token')}, and the "
                "first one is not predicted; use a longer text, or `split` all"
            )
        return tokens

    def _prepared(self, path: Path, vocabulary: Tokenizer) -> Tokens:
        folder = prepared.load(path, self.gpt2_vocab)
        if folder.tokenizer != vocabulary:
            own = folder.tokenizer
            raise UsageError(
                f"`dataset` {shown(self.name)} is prepared with another vocabulary ({own.kind}, "
                f"{counted(own.vocab_size, 'token')}) than the model's ({vocabulary.kind}, "
                f"{counted(vocabulary.vocab_size, 'token')}); give `dataset` the text itself"
            )
        if self.split == "all":
            return folder.whole()
        return folder.train() if self.split == "train" else folder.val()

    def _source(self, path: Path) -> Source:
        if self.corpus_file is not None and self.name != "shakespeare":
            raise UsageError(f"`corpus_file` {self.corpus_file} is for `dataset` shakespeare; leave it out")
        if self.name == "pydocs":
            return sources.pydocs()
        if self.name == "shakespeare":
            return sources.shakespeare(self.corpus_file)
        return sources.text_files(path, skip=Path(self.data_dir))

    def _encoded(self, source: Source, vocabulary: Tokenizer) -> np.ndarray:
        if vocabulary.end_token is not None and isinstance(source, TextFiles) and len(source.paths) > 1:
            source = dataclasses.replace(source, ended=True)
        pieces = source.texts()
        if self.split != "all":
            cut = int(corpus.TRAIN_SHARE * sum(len(piece) for piece in source.texts() if piece is not None))
            pieces = sources.span(pieces, 0, cut) if self.split == "train" else sources.span(pieces, cut)
        dtype = token_file.dtype_of(vocabulary.vocab_size)
        with token_file.encoding(self.name):
            blocks = [
                np.array([vocabulary.end_token] if chunk is None else vocabulary.encode(chunk)).astype(dtype)
                for chunk in sources.chunks(pieces)
            ]
        return np.concatenate(blocks) if blocks else np.empty(0, dtype)
