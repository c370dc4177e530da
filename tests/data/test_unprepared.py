"""A text that is not tokenized yet: what its statistics tell about the corpus that becomes of it."""

from pathlib import Path

import numpy as np
import pytest

from fastgpt.data import corpus


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
@pytest.mark.parametrize(
    "texts",
    [["a" * 95 + "häuser"], ["ab\n" * 30, "cé👍" * 5, "d"], ["a" * 90, "b" * 10], ["a" * 91, "b" * 9], ["é" * 9]],
)
def test_the_statistics_tell_the_splits_before_they_are_tokenized(tmp_path: Path, texts: list[str], kind: str):
    (tmp_path / "texts").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "texts" / f"{number}.txt").write_text(text, encoding="utf-8", newline="")
    _, found = corpus.find(
        str(tmp_path / "texts"),
        tokenizer=kind,
        vocab_size=None,
        corpus_file=None,
        gpt2_vocab=None,
        data_dir=str(tmp_path / "data"),
    )
    assert isinstance(found, corpus.Unprepared)
    written = found.write()
    most, has = found.most_tokens, (written.train_tokens, written.val_tokens)
    if kind == "char" or (kind == "byte" and found.statistics.bytes == found.statistics.characters):
        assert most == has
    assert all(upper >= number for upper, number in zip(most, has, strict=True))
    end = written.tokenizer.end_token
    assert found.statistics.train_ends == (0 if end is None else np.count_nonzero(np.asarray(written.train()) == end))
    assert kind != "byte" or end in (None, found.end_token)
