"""Tokenize text before training.

    fastgpt prepare SRC --tokenizer gpt2         documents: files of .txt, .jsonl, .parquet, into shards of tokens
    fastgpt prepare --dataset book.txt           one text, as training prepares it by itself

Exit code 0: the corpus is there, and a table about it on stdout; 2: the text or a setting is wrong, and nothing was
written.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastgpt import cli
from fastgpt.config.choices import TOKENIZERS
from fastgpt.config.fields import Settings, option
from fastgpt.errors import UsageError, shown
from fastgpt.system.tables import print_rows

if TYPE_CHECKING:
    from fastgpt.data.prepared import Corpus

OF_DOCUMENTS, OF_ONE_TEXT = ("text_key", "val_share", "jobs"), ("dataset", "corpus_file")


@dataclass(frozen=True)
class PrepareConfig(Settings):
    """The text to prepare, its tokenizer, and the folder for the corpus."""

    source: str | None = option(
        None,
        "SRC: a folder of .txt, .jsonl and .parquet files, or one such file; the flag's name may be left out",
        path=True,
        group="Documents, into shards of tokens with an end-of-text token after each document",
    )
    text_key: str = option("text", "key of a .jsonl file's lines, or column of a .parquet file, with the text")
    val_share: float = option(0.005, "share of the documents to validate on, by a hash of the text", above=0, below=1)
    jobs: int | None = option(None, "processes; auto: one for each CPU that may be used", low=1, high=1024, auto=True)
    dataset: str | None = option(
        None,
        "pydocs, where neither is given, shakespeare, or a path: a text file, a folder of text, tokens",
        path=True,
        group="Or one text, its end to validate on, as training prepares it by itself",
    )
    corpus_file: str | None = option(None, "a local copy of tiny Shakespeare for `dataset` shakespeare", path=True)
    tokenizer: str | None = option(
        None,
        "characters (not of documents), UTF-8 bytes, GPT-2's, or a BPE trained here; where it is not given, gpt2 for "
        "documents and char for one text",
        choices=TOKENIZERS,
        group="Tokens",
    )
    vocab_size: int | None = option(None, "tokens of a bpe, 1024 where it is not given", low=1)
    gpt2_vocab: str | None = option(None, "folder with GPT-2's vocab.bpe and encoder.json", path=True)
    data_dir: str = option("data", "where prepared corpora are kept", path=True)

    def check(self) -> None:
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        names = OF_DOCUMENTS if self.source is None else OF_ONE_TEXT
        why = (
            "is for documents; name them by `source`, or leave it out"
            if self.source is None
            else f"is for one text, and `source` {shown(self.source)} names documents; leave one of the two out"
        )
        for name in names:
            if (value := getattr(self, name)) != defaults[name]:
                raise UsageError(f"`{name}` {shown(value)} {why}")


def main(argv: Sequence[str] | None = None) -> int:
    """Prepare the corpus that the flags name and print a table about it on stdout."""
    config = cli.parse(
        PrepareConfig,
        argv,
        prog="python -m fastgpt.prepare",
        description="Tokenize text before training: documents, by `python -m fastgpt.prepare SRC`, or one text.",
        unnamed=("source",),
    )
    print_rows(_rows(_prepare(config)))
    return 0


def _prepare(config: PrepareConfig) -> "Corpus":
    # Only now, as these import NumPy, which --help and a mistyped flag do not wait for.
    from fastgpt.data import corpus, document_corpus

    if config.source is None:
        return corpus.prepare(
            config.dataset or "pydocs",
            tokenizer=config.tokenizer or "char",
            vocab_size=config.vocab_size,
            corpus_file=config.corpus_file,
            gpt2_vocab=config.gpt2_vocab,
            data_dir=config.data_dir,
            quiet=True,
        )
    return document_corpus.prepare(
        config.source,
        tokenizer=config.tokenizer or "gpt2",
        vocab_size=config.vocab_size,
        gpt2_vocab=config.gpt2_vocab,
        text_key=config.text_key,
        val_share=config.val_share,
        jobs=config.jobs,
        data_dir=config.data_dir,
    )


def _rows(prepared: "Corpus") -> dict[str, str]:
    tokens = prepared.train_tokens + prepared.val_tokens
    rows = {
        "name": prepared.name,
        "characters": "unknown" if prepared.characters is None else f"{prepared.characters:,}",
        "tokens": f"{tokens:,} ({prepared.train_tokens:,} train, {prepared.val_tokens:,} val)",
        "bytes per token": "unknown" if prepared.bytes is None else f"{prepared.bytes / tokens:.3f}",
        "vocabulary": f"{prepared.tokenizer.vocab_size:,} ({prepared.tokenizer.kind}, {prepared.dtype})",
    }
    if prepared.documents:
        rows["shards"] = f"{len(prepared.train_files):,} train, {len(prepared.val_files):,} val"
    return rows | {"folder": str(prepared.path)}


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
