"""Settings by name: in the forms that people give them, and known to type checkers; a wrong one is told the nearest."""

import dataclasses
import importlib.util
import inspect
import io
import json
import subprocess
import sys
import typing
from pathlib import Path

import numpy as np
import pytest
import torch

from fastgpt import cli, generate
from fastgpt.config import escapes
from fastgpt.config.fields import validate
from fastgpt.config.generation import GenerateConfig, SamplingParams
from fastgpt.config.model import ModelConfig
from fastgpt.errors import UsageError
from fastgpt.generation import prompts_file, writing
from fastgpt.generation.engine import Engine
from fastgpt.generation.generator import TextGenerator
from fastgpt.generation.settings import EngineOptions, SamplingSettings, sampling
from tests.helpers.engines import pages
from tests.helpers.places import ROOT
from tests.helpers.untrained import fresh

CHECKED = """\
import fastgpt

generator = fastgpt.load("out")
generator.generate("a", temperature=0.5, stop=["x"], stop_tokens=3)
generator.generate("a", temperatur=0.5)
generator.stream("a", top_k="many")
next(generator.stream("a", stop="x")).upper()
generator.engine(max_batch=4, speculate="ngram")
generator.engine(max_batc=4)
"""
WRONG_LINES = [5, 6, 9]


@pytest.fixture(scope="module")
def generator() -> TextGenerator:
    return fresh(block_size=32)


FORMS = [
    ({"stop": "x"}, {"stop": ("x",)}),
    ({"stop": ["x", "yz"]}, {"stop": ("x", "yz")}),
    ({"stop": np.array(["x", "yz"])}, {"stop": ("x", "yz")}),
    ({"stop": [np.str_("x")]}, {"stop": ("x",)}),
    ({"stop": []}, {"stop": ()}),
    ({"stop_tokens": 3}, {"stop_tokens": (3,)}),
    ({"stop_tokens": [3, np.int64(4)]}, {"stop_tokens": (3, 4)}),
    ({"stop_tokens": np.array([3, 4], np.uint8)}, {"stop_tokens": (3, 4)}),
    ({"stop_tokens": torch.tensor([3, 4])}, {"stop_tokens": (3, 4)}),
    ({"temperature": np.float32(0.5), "top_p": np.float64(0.25)}, {"temperature": 0.5, "top_p": 0.25}),
    ({"temperature": np.int8(1), "top_k": np.int64(7)}, {"temperature": 1, "top_k": 7}),
    ({"seed": np.uint64(7), "max_new_tokens": torch.tensor(5)}, {"seed": 7, "max_new_tokens": 5}),
]


@pytest.mark.parametrize(("given", "wanted"), FORMS, ids=str)
def test_settings_may_be_lists_single_values_and_numbers_of_numpy(given: dict, wanted: dict):
    plain = SamplingParams(**wanted)
    for made in (SamplingParams(**given), sampling(given), dataclasses.replace(SamplingParams(), **given)):
        validate(made)
        assert made == plain
        assert hash(made) == hash(plain)
        assert repr(made) == repr(plain), "a value of another type"
    assert GenerateConfig(**given).sampling() == plain
    assert ModelConfig(n_layer=np.int64(3), dropout=np.float64(0.5)) == ModelConfig(n_layer=3, dropout=0.5)


def test_they_are_accepted_wherever_a_setting_is(generator: TextGenerator, tmp_path: Path):
    given = {"stop": ["f", "g"], "stop_tokens": [1], "temperature": 0.5, "max_new_tokens": 30}
    plain = SamplingParams(stop=("f", "g"), stop_tokens=(1,), temperature=0.5, max_new_tokens=30)
    numbers = {"temperature": np.float64(0.5), "max_new_tokens": np.int32(30), "stop_tokens": np.array([1])}
    by_hand = SamplingParams(**given | numbers)
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "abc"} | given))
    ((_, read),) = prompts_file.read_prompts(str(tmp_path / "p.jsonl"), SamplingParams())
    assert by_hand == read == plain
    wanted = generator.generate("abc", **vars(plain))
    assert generator.generate("abc", **given | numbers) == wanted
    engine = generator.engine(kv_memory=pages(generator, 50), max_batch=np.int64(2))
    assert [one.text for one in engine.generate(["abc"] * 1, by_hand)] == [wanted]
    assert [one.text for one in engine.generate(["abc"], [by_hand])] == [wanted]


@pytest.mark.parametrize(
    "wrong",
    [
        *({"stop": value} for value in (1, [1], None, {"a": 1})),
        *({name: value} for name, value in (("stop_tokens", [1.0]), ("seed", np.float64(1)))),
    ],
)
def test_what_is_no_such_setting_is_still_refused(wrong: dict):
    with pytest.raises(UsageError, match=f"`{next(iter(wrong))}` "):
        sampling(wrong)


def test_a_wrong_name_is_told_with_the_nearest_one(generator: TextGenerator):
    for call in (generator.generate, generator.stream):
        with pytest.raises(UsageError, match="unknown setting 'temperatur'; did you mean temperature"):
            call("a", temperatur=0.5)
    with pytest.raises(UsageError, match="unknown setting 'max_batc'; did you mean max_batch"):
        generator.engine(max_batc=4)


def test_the_typed_names_are_those_of_the_classes():
    hints = typing.get_type_hints(SamplingParams)
    typed = typing.get_type_hints(SamplingSettings)
    assert list(typed) == [field.name for field in dataclasses.fields(SamplingParams)]
    several = {"stop", "stop_tokens"}
    assert {n: t for n, t in typed.items() if n not in several} == {n: t for n, t in hints.items() if n not in several}
    options, parameters = typing.get_type_hints(EngineOptions), inspect.signature(Engine.__init__).parameters.values()
    assert list(options) == [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    taken = typing.get_type_hints(Engine.__init__)
    assert options == {name: taken[name] for name in options}


STRICT = """
import torch

import fastgpt
from fastgpt_kernels import causal_attention

summary = fastgpt.fit(preset="mini", dataset="book.txt", on_log=lambda record: print(record))
generator = fastgpt.load(summary.out_dir)
text: str = generator.generate("The ", max_new_tokens=20, temperature=0.8)
for piece in generator.stream("The "):
    print(piece, end="")
print(summary.history[-1], causal_attention(*torch.randn(3, 1, 4, 2, 16).unbind()).shape)
"""


def diagnostics(folder: Path, script: str, mode: str) -> list[tuple[int, str]]:
    """Pyright's findings in a user's script: each line and rule."""
    (folder / "user.py").write_text(script)
    about = {"extraPaths": [str(ROOT), str(ROOT / "kernels")], "include": ["user.py"], "typeCheckingMode": mode}
    (folder / "pyrightconfig.json").write_text(json.dumps(about))
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "--outputjson", "-p", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    try:
        report = json.loads(done.stdout)
    except ValueError:
        pytest.skip(f"pyright does not run here: {done.stderr:.200}")
    return [(one["range"]["start"]["line"] + 1, one["rule"]) for one in report["generalDiagnostics"]]


needs_pyright = pytest.mark.skipif(importlib.util.find_spec("pyright") is None, reason="needs pyright")


@pytest.mark.slow
@needs_pyright
def test_pyright_finds_a_wrong_name(tmp_path: Path):
    found = diagnostics(tmp_path, CHECKED, "basic")
    assert [line for line, _ in found] == WRONG_LINES
    assert {rule for _, rule in found} <= {"reportCallIssue", "reportArgumentType"}


@pytest.mark.slow
@needs_pyright
def test_a_users_script_is_right_even_where_pyright_is_strict(tmp_path: Path):
    assert diagnostics(tmp_path, STRICT, "strict") == []


def test_a_stream_is_an_iterator(generator: TextGenerator):
    whole = generator.generate("abc", max_new_tokens=6)
    stream = generator.stream("abc", max_new_tokens=6)
    assert iter(stream) is stream
    assert next(stream) == whole[0]
    assert "".join(stream) == whole[1:]
    assert next(stream, None) is None
    assert stream.finish_reason == "length"
    stream = generator.stream("abc", max_new_tokens=6)
    next(stream)
    assert stream.completion(0, 0).text == whole


@pytest.mark.parametrize(
    ("spelled", "text"),
    [
        *((r"\n", "\n"), (r"a\tb\r", "a\tb\r"), (r"\\n", r"\n"), (r"\x41\u00e9\U0001f600\0", "Aé😀\0")),
        *(("äé", "äé"), ("\n", "\n")),
    ],
)
def test_escapes_of_a_stop_text_are_read_where_a_flag_says_so(spelled: str, text: str):
    assert cli.parse(GenerateConfig, ["--stop", spelled], prog="p", description="d").sampling().stop == (spelled,)
    flags = ["--stop", spelled, "--stop_escapes", "--stop", "a"]
    assert cli.parse(GenerateConfig, flags, prog="p", description="d").sampling().stop == (text, "a")


@pytest.mark.parametrize("spelled", ["\\", r"a\q", r"\x4", r"\ud800", r"\U00110000"])
def test_what_is_no_escape_is_refused(spelled: str, capsys):
    assert cli.run(generate.main, ["--stop_escapes", "--stop", spelled]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --stop ")
    assert r"known are \n, \r, \t" in line


def test_a_stop_text_with_an_escape_that_is_none_is_said(monkeypatch, capsys, generator: TextGenerator):
    monkeypatch.setattr(writing, "load", lambda *_, **__: generator)
    whole = generator.generate("a", max_new_tokens=60, temperature=2.0)
    flags = ["--prompt", "a", "--max_new_tokens", "60", "--temperature", "2"]
    said = {}
    for stop in ([r"--stop=\n"], ["--stop=\n"], [r"--stop=\n", "--stop_escapes"], ["--stop=absent\\"]):
        assert cli.run(generate.main, [*flags, *stop]) == 0
        out, err = capsys.readouterr()
        said[tuple(stop)] = (out, r"--stop \n" in err and "--stop_escapes" in err)
    assert "\n" in whole
    until = f"a{whole[: whole.index(chr(10))]}\n"
    assert list(said.values()) == [(f"a{whole}\n", True), (until, False), (until, False), (f"a{whole}\n", False)]
    assert all(escapes.holds_escape(text) for text in (r"\t", r"a\u00e9", r"\x0a"))
    assert not any(escapes.holds_escape(text) for text in ("\\", r"\q", "/n", "\n"))


@pytest.mark.parametrize("content", [b"abc\ndef", b"abc\r\ndef", b"\xef\xbb\xbfabc\r\ndef"])
def test_a_prompt_of_a_file_or_stdin_has_line_breaks_of_one_kind_and_no_mark(
    monkeypatch, tmp_path: Path, content: bytes
):
    (tmp_path / "p.txt").write_bytes(content)
    assert prompts_file.read_prompt(f"FILE:{tmp_path / 'p.txt'}") == "abc\ndef"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert prompts_file.read_prompt("-") == "abc\ndef"
