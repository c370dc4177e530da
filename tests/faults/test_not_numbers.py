"""Logits that are not numbers end their own request with an error, wherever and beside whatever it runs."""

import dataclasses
import json
import math
import shlex
from pathlib import Path

import pytest
import torch

from fastgpt import cli, generate
from fastgpt.config.generation import SamplingParams
from fastgpt.errors import RunFailed
from fastgpt.generation import answers, writing
from fastgpt.generation.generator import TextGenerator
from fastgpt.generation.request import Completion, Timings
from tests.helpers.engines import pages, watched
from tests.helpers.untrained import fresh

BLOCK = 32
PLACE = 12  # the position that makes a sequence's logits NaN
PROMPTS = ["abc", "abcdefghijabc", "b", "jihgfedcba", "abcabcabcabcabc"]
GREEDY = SamplingParams(temperature=0, max_new_tokens=8)
WAYS = {
    "greedy": GREEDY,
    "sampled": SamplingParams(max_new_tokens=8, temperature=1.0),
    "filtered": SamplingParams(max_new_tokens=8, top_k=3, top_p=0.9, min_p=0.01, logprobs=2),
    "penalized": SamplingParams(max_new_tokens=8, temperature=0, frequency_penalty=1.0, repetition_penalty=1.3),
}


@pytest.fixture(scope="module")
def sound() -> TextGenerator:
    return fresh(block_size=BLOCK)


@pytest.fixture(scope="module")
def damaged() -> TextGenerator:
    generator = fresh(block_size=BLOCK)
    with torch.no_grad():
        generator.model.wpe.weight[PLACE] = math.nan
    return generator


def lengths(params: SamplingParams) -> list[int]:
    """How many tokens each prompt's continuation has before it meets the position, or its end."""
    return [max(0, min(params.max_new_tokens, PLACE + 1 - len(prompt))) for prompt in PROMPTS]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("options", [{}, {"speculate": "ngram", "page_size": 4}, {"max_batch_tokens": 5}], ids=str)
def test_the_engine_ends_them_and_goes_on_with_the_others(sound, damaged, way: str, options: dict):
    params = WAYS[way]
    wanted = [one.tokens for one in sound.engine(kv_memory=pages(sound, 50)).generate(PROMPTS, params)]
    engine = watched(damaged.engine(kv_memory=pages(damaged, 60, options.get("page_size", 16)), **options))
    for _ in range(2):  # the second time over pages that held NaN
        found = engine.generate(PROMPTS, params)
        for one, tokens, length in zip(found, wanted, lengths(params), strict=True):
            assert one.tokens == tokens[:length]
            assert one.finish_reason == ("length" if length == params.max_new_tokens else "error")
            assert (one.error is None) == (one.finish_reason == "length")
            assert one.logprobs is None or len(one.logprobs) == length
        assert "after 13 tokens are not numbers (NaN or infinite)" in found[1].error
        assert not engine.busy


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("cache", ["none", "dense"])
def test_a_single_continuation_ends_and_says_so(sound, damaged, way: str, cache: str):
    settings = vars(WAYS[way])
    for prompt, length in zip(PROMPTS, lengths(WAYS[way]), strict=True):
        made = damaged.stream(prompt, cache=cache, **settings)
        text = "".join(made)
        assert text == sound.generate(prompt, cache=cache, **settings | {"max_new_tokens": length})
        assert made.finish_reason == ("length" if length == 8 else "error")
        assert (made.error is None) == (length == 8)
    with pytest.raises(RunFailed, match="after 13 tokens are not numbers"):
        damaged.generate(PROMPTS[1], cache=cache, **settings)


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("cache", ["none", "dense", "paged"])
def test_the_command_shows_what_there_is_and_fails(monkeypatch, capsys, sound, damaged, cache: str, samples: int):
    monkeypatch.setattr(writing, "load", lambda *_, **__: damaged)
    flags = shlex.split(f"--prompt abcdefghij --temperature 0 --cache {cache} --num_samples {samples}")
    assert cli.run(generate.main, [*flags, "--max_new_tokens", "9"]) == 1
    shown = capsys.readouterr()
    assert shown.out.splitlines()[-1] == "abcdefghij" + sound.generate("abcdefghij", temperature=0, max_new_tokens=3)
    last = shown.err.splitlines()[-1]
    assert last.startswith("error: the model's logits after 13 tokens are not numbers")


@pytest.mark.parametrize("cache", ["none", "dense", "paged"])
def test_a_file_of_prompts_has_a_line_for_each_continuation(monkeypatch, capsys, tmp_path: Path, damaged, cache: str):
    monkeypatch.setattr(writing, "load", lambda *_, **__: damaged)
    (tmp_path / "p.txt").write_text("\n".join([*PROMPTS, "a¿"]) + "\n")
    flags = shlex.split(f"--prompts {tmp_path / 'p.txt'} --cache {cache} --num_samples 2 --max_new_tokens 8")
    assert cli.run(generate.main, [*flags, "--logprobs", "1", "--temperature", "0"]) == 1
    out, err = capsys.readouterr()
    lines = [json.loads(line, parse_constant=pytest.fail) for line in out.splitlines()]
    told = [(line["index"], line["sample"], line["finish_reason"]) for line in lines]
    ends = ["length" if length == 8 else "error" for length in lengths(GREEDY)]
    assert told == [*((i, n, ends[i]) for i in range(5) for n in range(2)), (5, 0, "error")]
    assert f"{ends.count('error') + 1} of 6 prompts could not be continued" in err


def test_a_turn_of_a_conversation_ends_and_the_next_one_begins(monkeypatch, capsys, damaged):
    import io
    import sys

    monkeypatch.setattr(writing, "load", lambda *_, **__: damaged)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"abc\nabcdefgh\n")))
    flags = shlex.split("--interactive --no-compile --temperature 0 --max_new_tokens 4 --kv_memory 100kB")
    assert cli.run(generate.main, flags) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "logits after 17 tokens" in errors[0]


def test_no_line_of_json_holds_what_json_has_not():
    infinite = [(-math.inf, [(1, -0.5), (2, -math.inf)])]
    made = Completion(0, 0, "a", "b", [0], "length", Timings(0.0, 0.0, 0.0), logprobs=infinite)
    line = json.loads(answers.to_line(made), parse_constant=pytest.fail)
    assert line["logprobs"] == [{"logprob": None, "top": [[1, -0.5], [2, None]]}]
    with pytest.raises(ValueError):
        answers.to_line(dataclasses.replace(made, timings=Timings(0.0, 0.0, math.nan)))
