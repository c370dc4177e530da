"""Tokenize a corpus before training: `python data/prepare.py --dataset pydocs --tokenizer char`.

Training prepares what it needs by itself; this does the same ahead of time and prints what came out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from fastgpt import cli
from fastgpt.config.fields import Settings, option
from fastgpt.data import corpus
from fastgpt.data.prepared import Corpus
from fastgpt.tokenizer.bpe import DEFAULT_BPE
from fastgpt.tokenizer.saved import KINDS


@dataclass(frozen=True)
class PrepareConfig(Settings):
    """What to prepare, and where."""

    dataset: str = option("pydocs", "pydocs, shakespeare, or a path: a text file, a folder of text, tokens", path=True)
    tokenizer: str = option("char", "characters, UTF-8 bytes, GPT-2's, or a BPE trained here", choices=tuple(KINDS))
    vocab_size: int | None = option(None, f"tokens of a bpe, {DEFAULT_BPE} where it is not given", low=1)
    corpus_file: str | None = option(None, "a local copy of tiny Shakespeare for --dataset shakespeare", path=True)
    gpt2_vocab: str | None = option(None, "folder with GPT-2's vocab.bpe and encoder.json", path=True)
    data_dir: str = option("data", "where prepared corpora are kept", path=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Prepare the corpus that the flags name and print a table about it on stdout."""
    config = cli.parse(PrepareConfig, argv, prog="data/prepare.py", description="Tokenize a corpus.")
    prepared = corpus.prepare(
        config.dataset,
        tokenizer=config.tokenizer,
        vocab_size=config.vocab_size,
        corpus_file=config.corpus_file,
        gpt2_vocab=config.gpt2_vocab,
        data_dir=config.data_dir,
        quiet=True,
    )
    _print_table(prepared)
    return 0


def _print_table(prepared: Corpus) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    tokens = prepared.train_tokens + prepared.val_tokens
    rows = {
        "name": prepared.name,
        "characters": "unknown" if prepared.characters is None else f"{prepared.characters:,}",
        "tokens": f"{tokens:,} ({prepared.train_tokens:,} train, {prepared.val_tokens:,} val)",
        "bytes per token": "unknown" if prepared.bytes is None else f"{prepared.bytes / tokens:.3f}",
        "vocabulary": f"{prepared.tokenizer.vocab_size:,} ({prepared.tokenizer.kind}, {prepared.dtype})",
        "folder": str(prepared.path),
    }
    table = Table(box=box.SIMPLE, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, value)
    Console(highlight=False, markup=False).print(table)


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
