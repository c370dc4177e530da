"""The candidates of each drawn token: their probabilities against float64, the same tokens, and the table."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from fastgpt import cli, generate
from fastgpt.config.generation import SamplingParams
from fastgpt.generation.candidates import COUNT, Candidate
from fastgpt.generation.candidates_table import print_candidates, shown
from fastgpt.generation.generator import TextGenerator
from fastgpt.generation.sampler import Sampler
from fastgpt.tokenizer.base import Tokenizer
from fastgpt.tokenizer.byte import ByteTokenizer
from fastgpt.tokenizer.char import CharTokenizer
from tests.helpers import runs
from tests.helpers.untrained import fresh

VOCABULARY, PROMPT, SAID = 40, [0, 3, 7], [1, 4, 4, 0]
PENALTIES = {"repetition_penalty": 1.5, "presence_penalty": 0.4, "frequency_penalty": 0.6}
KINDS = [
    {"top_k": None},
    {"temperature": 0.5, "top_k": None},
    {"temperature": 1.7, "top_k": 4},
    {"top_k": 3},
    {"top_k": None, "top_p": 0.6},
    {"top_k": None, "min_p": 0.2},
    {"top_k": None, **PENALTIES},
    {"temperature": 1.3, "top_k": 9, "top_p": 0.8, "min_p": 0.1, **PENALTIES},
    {"temperature": 0.0},
    {"temperature": 0.0, **PENALTIES},
]


@pytest.fixture(scope="module")
def generator() -> TextGenerator:
    return fresh()


def softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def distribution(logits: np.ndarray, chosen: SamplingParams) -> np.ndarray:
    """The probabilities of the next token by the definitions, in float64."""
    scores = logits.copy()
    for token in {*PROMPT, *SAID}:
        scores[token] *= chosen.repetition_penalty ** (-1 if scores[token] > 0 else 1)
    for token in set(SAID):
        scores[token] -= chosen.presence_penalty + chosen.frequency_penalty * SAID.count(token)
    if chosen.temperature == 0:
        return np.eye(len(scores))[scores.argmax()]
    scores /= chosen.temperature
    order = np.argsort(-scores)
    if chosen.top_k:
        scores[order[chosen.top_k :]] = -np.inf
    if chosen.top_p is not None:
        shares = softmax(scores)[order]
        scores[order[np.cumsum(shares) - shares >= chosen.top_p]] = -np.inf
    if chosen.min_p is not None:
        shares = softmax(scores)
        scores[shares < chosen.min_p * shares.max()] = -np.inf
    return softmax(scores)


def test_probabilities_are_those_of_float64_and_the_tokens_those_without_candidates():
    logits = 2 * torch.randn(len(KINDS), VOCABULARY, generator=torch.Generator().manual_seed(0))
    slots, drawn = range(len(KINDS)), []
    for told in (True, False):
        sampler = Sampler(len(KINDS), VOCABULARY)
        for slot, kind in enumerate(KINDS):
            sampler.begin(slot, SamplingParams(**kind, candidates=told), PROMPT, SAID)
        drawn.append(sampler(logits, slots, [4] * len(KINDS)).to_host())
    assert [one.token for one in drawn[0]] == [one.token for one in drawn[1]]
    assert all(one.candidates is None for one in drawn[1])
    for one, kind, row in zip(drawn[0], KINDS, logits.double().numpy(), strict=True):
        found, before, after = one.candidates, softmax(row), distribution(row, SamplingParams(**kind))
        likeliest = np.argsort(-row)[:COUNT].tolist()
        assert [each.token for each in found] == likeliest + [one.token] * (one.token not in likeliest)
        assert [each.before for each in found] == pytest.approx([before[each.token] for each in found], rel=1e-5)
        assert [each.after for each in found] == pytest.approx([after[each.token] for each in found], rel=1e-5)
        assert after[one.token] > 0


def test_a_row_that_asks_for_none_beside_one_that_does_has_none():
    sampler = Sampler(2, 4)  # fewer tokens than candidates
    sampler.begin(0, SamplingParams(candidates=True, logprobs=1), [])
    sampler.begin(1, SamplingParams(temperature=0), [])
    told, other = sampler(torch.tensor([[0.0, 1.0, 2.0, 3.0]] * 2), [0, 1], [0, 0]).to_host()
    assert [one.token for one in told.candidates] == [3, 2, 1, 0]
    assert sum(one.after for one in told.candidates) == pytest.approx(1)
    assert told.logprob == pytest.approx(math.log(next(c.before for c in told.candidates if c.token == told.token)))
    assert other == (3, None, None, None)


@pytest.mark.parametrize("temperature", [0.0, 1.2])
def test_all_ways_to_generate_tell_the_same(generator: TextGenerator, temperature: float):
    chosen = {"temperature": temperature, "top_k": 4, "max_new_tokens": 20}
    wanted = "".join(generator.stream("abc", **chosen))
    streams = [generator.stream("abc", cache=cache, candidates=True, **chosen) for cache in ("none", "dense", "paged")]
    assert ["".join(stream) for stream in streams] == [wanted] * 3
    found = [stream.candidates for stream in streams]
    for speculate in ("none", "ngram"):
        engine = generator.engine(slide=True, speculate=speculate)
        (answer,) = engine.generate(["abc"], SamplingParams(**chosen, candidates=True))
        assert answer.text == wanted
        found.append(answer.candidates)
    for own in found[1:]:
        assert [[one.token for one in each] for each in own] == [[one.token for one in each] for each in found[0]]
        assert np.concatenate(own)[:, 1:] == pytest.approx(np.concatenate(found[0])[:, 1:], abs=1e-4)
    assert len(found[0]) == 20
    assert generator.stream("abc").completion(0, 0).candidates is None


TOKENS = [
    (CharTokenizer("\n ab'한"), 0, r"'\n'"),
    (CharTokenizer("\n ab'한"), 1, "' '"),
    (CharTokenizer("\n ab'한"), 5, "'한'"),
    (CharTokenizer("\u200bab"), 0, r"'\u200b'"),
    (ByteTokenizer(), 0xED, r"b'\xed'"),
    (ByteTokenizer(), 9, r"'\t'"),
    (ByteTokenizer(ends=True), 256, "'<|endoftext|>'"),
]


@pytest.mark.parametrize(("tokenizer", "token", "text"), TOKENS, ids=[text for _, _, text in TOKENS])
def test_a_token_is_shown_in_quotes_or_as_bytes(tokenizer: Tokenizer, token: int, text: str):
    assert shown(token, tokenizer) == text


def table(capsys: pytest.CaptureFixture[str], **settings) -> list[str]:
    told = [
        [Candidate(0, 0.9996, 1.0), Candidate(2, 0.0003, 0.0), Candidate(1, 0.0001, 0.0)],
        [Candidate(3, 0.51, 0.0449), Candidate(1, 0.3, 0.0996), Candidate(0, 0.19, 0.8555)],
    ]
    print_candidates([0, 0], told, CharTokenizer("\n 한x"), SamplingParams(**settings))
    return [line.rstrip() for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({}, "temperature 0.8, top_k 200"),
        ({"temperature": 0, "frequency_penalty": 0.5}, "frequency_penalty 0.5, temperature 0"),
        ({"temperature": 1, "top_k": 0}, "no setting that changes it"),
    ],
)
def test_the_settings_that_change_probabilities_are_named(
    settings: dict, named: str, capsys: pytest.CaptureFixture[str]
):
    assert table(capsys, **settings)[1] == f"probability by the model -> after {named}; * drawn"


WIDE = [
    r"drawn              likeliest           2nd             3rd",
    r"'\n' >99% -> 100%  *'\n' >99% -> 100%  '한' ~0% -> 0%  ' ' ~0% -> 0%",
    r"'\n' 19% -> 86%    'x' 51% -> 4.5%     ' ' 30% -> 10%  *'\n' 19% -> 86%",
]
TWO_LINES = [
    r"drawn        likeliest    2nd        3rd",
    r"'\n'         *'\n'        '한'       ' '",
    r">99% -> 100% >99% -> 100% ~0% -> 0%  ~0% -> 0%",
    r"'\n'         'x'          ' '        *'\n'",
    r"19% -> 86%   51% -> 4.5%  30% -> 10% 19% -> 86%",
]


@pytest.mark.parametrize(("columns", "lines"), [(80, WIDE), (50, TWO_LINES), (36, [line[:36] for line in TWO_LINES])])
def test_a_cell_has_one_line_where_the_terminal_is_wide_enough_else_two(
    columns: int, lines: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert table(capsys, temperature=1.0, top_k=0)[-len(lines) :] == [line.rstrip() for line in lines]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.run_in(tmp_path_factory.mktemp("candidates"), "--max_iters 3")


@pytest.mark.parametrize("flags", [[], ["--num_samples", "2"], ["--cache", "none", "--temperature", "0"]], ids=str)
def test_the_table_follows_each_continuation_on_stdout(run: Path, flags: list[str], capsys: pytest.CaptureFixture[str]):
    words = ["--out_dir", str(run), "--device", "cpu", "--prompt", "The ", "--max_new_tokens", "7", *flags]
    assert cli.run(generate.main, words) == 0
    plain = capsys.readouterr().out
    assert cli.run(generate.main, [*words, "--candidates"]) == 0
    out = capsys.readouterr().out
    tables = re.compile(r"\nprobability by the model -> .*\n(.+\n)+?(?=---|\Z)")
    assert tables.sub("", out) == plain
    found = list(tables.finditer(out))
    assert len(found) == (2 if "--num_samples" in flags else 1)
    assert all(match[0].count(" -> ") == 1 + 7 * 6 for match in found)
    assert "drawn" in found[0][0]


def test_answers_of_many_prompts_hold_them(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "prompts.txt").write_text("The \nhe qui\n")
    words = ["--out_dir", str(run), "--device", "cpu", "--prompts", str(tmp_path / "prompts.txt")]
    assert cli.run(generate.main, [*words, "--candidates", "--max_new_tokens", "3"]) == 0
    for line in map(json.loads, capsys.readouterr().out.splitlines()):
        assert len(line["candidates"]) == 3
        for token, own in zip(line["tokens"], line["candidates"], strict=True):
            assert token in [one["token"] for one in own]
            assert {*own[0]} == {"token", "before", "after"}


def test_turns_with_the_model_have_no_table(capsys: pytest.CaptureFixture[str]):
    assert cli.run(generate.main, ["--interactive", "--candidates"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        "error: --interactive and --candidates exclude each other; continue one text, by --prompt, to see its "
        "candidates\n"
    )
