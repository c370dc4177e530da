"""The choice of packing, and the first tokens of documents in a window."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastgpt.config.training import TrainConfig
from fastgpt.data import packing
from fastgpt.data.loader import Loader
from fastgpt.data.prepared import Corpus
from fastgpt.errors import UsageError
from tests.helpers.corpora import prepare
from tests.helpers.packed import documents

END = 256  # of the byte vocabulary


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    (tmp_path / "texts").mkdir()
    for name in "abcd":
        (tmp_path / "texts" / f"{name}.txt").write_text(f"document {name}\n" * 3)
    return tmp_path / "texts"


def corpus(texts: Path, kind: str) -> Corpus:
    """The four documents; of "late", the only end lies in the val split; of "one", there is one document."""
    if kind == "late":
        (texts / "a.txt").write_text("a document" * 90)
    if kind == "one":
        texts = texts / "a.txt"
    return prepare(texts, texts.parent, tokenizer="char" if kind == "char" else "byte")


@pytest.mark.parametrize("pack", [True, False, None])
def test_documents_are_packed_where_it_is_asked_for_or_they_are_shards(pack: bool | None, texts: Path):
    files = corpus(texts, "byte")
    shards = dataclasses.replace(files, documents=True)
    assert files.documents is False
    assert packing.chosen(pack, files) is bool(pack)
    assert packing.chosen(pack, shards) is (pack is not False)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("char", "the char vocabulary of texts has none"),
        ("one", "the byte vocabulary of a has none"),
        ("late", "the train split of texts has none"),
    ],
)
def test_what_has_no_ends_is_refused_with_the_way_out(kind: str, why: str, texts: Path):
    whole = corpus(texts, kind)
    with pytest.raises(UsageError, match=f"^`pack` .*{why}; give `dataset` a folder of text files with .*leave `pack`"):
        packing.chosen(True, whole)
    assert packing.chosen(None, whole) is False
    assert packing.chosen(None, dataclasses.replace(whole, documents=True)) is False


def test_only_a_packed_run_has_an_end_token(texts: Path):
    files = corpus(texts, "byte")
    assert [packing.end_token(TrainConfig(pack=pack), files) for pack in (True, False)] == [END, None]
    assert packing.document_ids(torch.zeros(2, 3), None) is None


@given(st.lists(st.lists(st.integers(0, 2), min_size=6, max_size=6), min_size=1, max_size=4))
def test_each_end_begins_a_document(rows: list[list[int]]):
    ids = packing.document_ids(torch.tensor(rows), 0)
    assert ids is not None
    for row, numbers in zip(rows, ids.tolist(), strict=True):
        assert numbers == sorted(numbers)
        parts = [set(numbers[part]) for part in documents(row, 0)]
        assert [len(part) for part in parts] == [1] * len(set(numbers))


def test_the_ids_of_a_window_are_those_of_the_corpus(texts: Path):
    """Wherever a window begins, two of its tokens have one id if no end lies between them in the corpus."""
    files = corpus(texts, "byte")
    tokens = files.train()
    whole = np.cumsum(tokens == END)
    loader = Loader(tokens, 60, 257, seed=1, device=torch.device("cpu"), name="texts")
    (x, y, _), starts = next(loader.windows(9, 9)), np.arange(9) * (len(tokens) - 61) // 8
    ids = packing.document_ids(x, END)
    assert ids is not None
    expected = np.stack([whole[start : start + 60] for start in starts])
    assert np.array_equal(ids - ids[:, :1], expected - expected[:, :1])
    assert torch.equal(y[:, :-1], x[:, 1:])  # the end is the target of the document before it, the next one's first
    assert len(np.unique(expected[0])) > 1
