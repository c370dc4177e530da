"""GPT-2's tokens are those of transformers' GPT2TokenizerFast, which is built from the same two files."""

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastgpt.tokenizer import gpt2 as gpt2_module
from fastgpt.tokenizer.gpt2 import Gpt2Tokenizer
from tests.helpers.corpora import needs_gpt2, needs_shakespeare
from tests.helpers.places import SHAKESPEARE

pytestmark = [pytest.mark.peers, needs_gpt2]
# Texts of any script, of what GPT-2's pattern tells apart, and of parts of a special token's name.
ANY = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
CUT = st.text(st.sampled_from(" \n\t\r'sdtlvrem09.,!_-a\u00e9\u4e2d\u00a0\u2003\u0300\U0001f600\u0661Z"), max_size=60)
NAMES = st.lists(st.sampled_from(["<|endoftext|>", "<|", "|>", "endoftext", " ", "a", "\n"]), max_size=12).map("".join)


@pytest.fixture(scope="module")
def ours() -> Gpt2Tokenizer:
    return Gpt2Tokenizer.from_files()


@pytest.fixture(scope="module")
def peer() -> Any:
    transformers = pytest.importorskip("transformers", reason="compares with transformers, which is not installed")
    folder = gpt2_module._find_gpt2_files(None)
    vocabulary = json.loads((folder / "encoder.json").read_text(encoding="utf-8"))
    lines = (folder / "vocab.bpe").read_text(encoding="utf-8").splitlines()[1:]
    merges = [tuple(line.split(" ")) for line in lines if line]
    return transformers.GPT2TokenizerFast(vocab=vocabulary, merges=merges)


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_any_text(ours: Gpt2Tokenizer, peer: Any, count: int):
    @settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck))
    @given(text=st.one_of(ANY, ANY, CUT, NAMES))
    def check(text: str) -> None:
        assert ours.encode_special(text).tolist() == peer(text).input_ids
        if "<|endoftext|>" not in text:
            assert ours.encode(text).tolist() == ours.encode_special(text).tolist()

    check()


@needs_shakespeare
def test_tiny_shakespeare(ours: Gpt2Tokenizer, peer: Any):
    text = SHAKESPEARE.read_text(encoding="utf-8")
    assert ours.encode(text).tolist() == peer(text).input_ids


def test_the_name_of_a_special_token_is_text_unless_asked_for(ours: Gpt2Tokenizer, peer: Any):
    text = "one<|endoftext|> two<|endoftext|>"
    assert ours.encode(text).tolist() == peer(text, split_special_tokens=True).input_ids
    assert 50256 not in ours.encode(text)
    assert ours.encode_special(text).tolist() == peer(text).input_ids
    assert ours.encode_special(text).tolist().count(50256) == 2
