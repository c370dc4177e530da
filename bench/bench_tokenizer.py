"""Preparing documents with GPT-2's tokens, from files to checked shards, against tiktoken alone, in memory.

The text is tiny Shakespeare, where it is at hand, Python's manual and its standard library, 48 MB in all, cut into
documents of up to 8,000 characters, a line each in a .jsonl file. Ours reads it twice, once for its hash, starts its
processes, parses, tokenizes, writes, and checks what it wrote. The peer is given the documents in memory and as many
threads as ours has processes.
"""

import itertools
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiktoken

from fastgpt.data import document_corpus, sources
from fastgpt.tokenizer.gpt2 import Gpt2Tokenizer

SHAKESPEARE = Path(__file__).parents[2] / "shared" / "data" / "tinyshakespeare.txt"
BYTES, LONGEST = 48_000_000, 8_000
ROUNDS = 5


def texts() -> Iterator[str]:
    if SHAKESPEARE.exists():
        yield SHAKESPEARE.read_text(encoding="utf-8")
    yield sources.pydocs().text
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        yield path.read_text(encoding="utf-8", errors="replace")


@pytest.fixture(scope="module")
def documents() -> list[str]:
    found, size = [], 0
    for text in texts():
        for at in range(0, len(text), LONGEST):
            found.append(text[at : at + LONGEST])
            size += len(found[-1].encode())
            if size >= BYTES:
                return found
    return found


@pytest.fixture(scope="module")
def source(documents: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("documents") / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def encoding() -> tiktoken.Encoding:
    return Gpt2Tokenizer.from_files()._encoding


@pytest.mark.parametrize("jobs", [1, 2])
def test_prepare(against, jobs: int, documents: list[str], source: Path, encoding: tiktoken.Encoding, tmp_path: Path):
    folders = (tmp_path / str(number) for number in itertools.count())
    made = []

    def prepare() -> None:
        corpus = document_corpus.prepare(str(source), jobs=jobs, data_dir=str(next(folders)), quiet=True)
        made.append(corpus.train_tokens + corpus.val_tokens)

    def encode() -> None:
        ids = encoding.encode_ordinary_batch(documents, num_threads=jobs)
        assert len(ids) == len(documents)

    against(
        prepare,
        {"tiktoken encode_ordinary_batch": encode},
        rounds=ROUNDS,
        units=sum(len(text.encode()) for text in documents) / 1e6,
        unit="MB",
        aim=0.8,
        jobs=jobs,
    )
    assert set(made) == {len(documents) + sum(map(len, encoding.encode_ordinary_batch(documents)))}
