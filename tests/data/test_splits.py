"""The tokens of a split by a given vocabulary: those that a prepared corpus has, and nothing is written."""

from pathlib import Path

import numpy as np
import pytest

from fastgpt.data.splits import Dataset
from fastgpt.errors import UsageError
from fastgpt.tokenizer.byte import ByteTokenizer
from fastgpt.tokenizer.char import CharTokenizer
from tests.helpers.corpora import TEXT, every_kind, needs_shakespeare, prepare
from tests.helpers.places import SHAKESPEARE

SPLITS = ("train", "val", "all")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8", newline="")
    return path


def folder(tmp_path: Path) -> Path:
    path = tmp_path / "folder"
    path.mkdir()
    for name, content in (("a.txt", "one two\n" * 20), ("b.txt", "three four\n" * 20), ("c.txt", "five\n" * 5)):
        (path / name).write_text(content)
    return path


@every_kind
@pytest.mark.parametrize("documents", [False, True])
def test_tokens_are_those_of_the_prepared_corpus(tmp_path: Path, text: Path, kind: str, documents: bool):
    path = folder(tmp_path) if documents else text
    corpus = prepare(path, tmp_path, tokenizer=kind)
    before = sorted(tmp_path.rglob("*"))
    expected = {"train": corpus.train(), "val": corpus.val(), "all": np.concatenate([corpus.train(), corpus.val()])}
    for split in SPLITS:
        for name in (path, corpus.path):
            found = Dataset(str(name), split, data_dir=str(tmp_path / "data")).tokens(corpus.tokenizer)
            if (name, split) == (path, "all"):  # BPE may join what the split parts
                assert corpus.tokenizer.decode(found) == corpus.tokenizer.decode(expected[split])
            else:
                assert np.array_equal(found, expected[split])
            assert found.dtype == corpus.dtype
    assert sorted(tmp_path.rglob("*")) == before


def test_a_prepared_folder_is_found_by_its_name(tmp_path: Path, text: Path):
    corpus = prepare(text, tmp_path)
    found = Dataset(corpus.path.name, data_dir=str(tmp_path / "data")).tokens(corpus.tokenizer)
    assert np.array_equal(found, corpus.val())


def test_pydocs_is_a_text_of_its_own():
    assert len(Dataset("pydocs").tokens(ByteTokenizer())) > 10_000


@needs_shakespeare
def test_shakespeare_may_be_a_local_copy():
    tokens = Dataset("shakespeare", corpus_file=str(SHAKESPEARE)).tokens(ByteTokenizer())
    assert len(tokens) == 111_540


@pytest.mark.parametrize(
    ("content", "split", "saying"),
    [
        ("", "val", "val split holds 0 tokens"),
        ("abcdefghij", "val", "val split holds 1 token, and the first one is not predicted"),
        ("a", "all", "all split holds 1 token"),
    ],
)
def test_a_split_without_a_token_to_predict_is_refused(tmp_path: Path, content: str, split: str, saying: str):
    (tmp_path / "short.txt").write_text(content)
    with pytest.raises(UsageError, match=saying):
        Dataset(str(tmp_path / "short.txt"), split).tokens(ByteTokenizer())


def test_what_does_not_fit_is_refused(tmp_path: Path, text: Path):
    corpus = prepare(text, tmp_path)
    with pytest.raises(UsageError, match=r"prepared with another vocabulary .*char.* than the model's .*byte, 256"):
        Dataset(str(corpus.path)).tokens(ByteTokenizer())
    with pytest.raises(UsageError, match=r"`dataset` '.*': the char vocabulary has only 2 characters and lacks"):
        Dataset(str(text)).tokens(CharTokenizer("\nF"))
    with pytest.raises(UsageError, match="is no file or folder and no known name"):
        Dataset(str(tmp_path / "nowhere")).tokens(ByteTokenizer())
    with pytest.raises(UsageError, match="`corpus_file` x is for `dataset` shakespeare"):
        Dataset(str(text), corpus_file="x").tokens(ByteTokenizer())
