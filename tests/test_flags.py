"""Whatever a flag is given: either it is taken, or one line names the flag and the value; nothing else ever happens.

Most values go through the parser alone, and a few through the whole command. There the model's construction is
replaced, so that a run whose flags are all taken ends.
"""

import contextlib
import dataclasses
import difflib
import io
import math
import os
import shlex
import sys
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastgpt import cli, generate, train
from fastgpt.config.generation import GenerateConfig
from fastgpt.config.sources import could_be_hub_name
from fastgpt.config.training import PRESETS, TrainConfig
from fastgpt.errors import nearest
from fastgpt.model.gpt import GPT
from fastgpt.prepare import PrepareConfig
from tests.helpers import runs

BASE = shlex.split(
    "--dataset text.txt --device cpu --dtype float32 --n_layer 1 --n_head 2 --n_embd 16 --block_size 8 --batch_size 2 "
    "--gradient_accumulation_steps 1 --max_iters 1 --eval_interval 1 --eval_iters 1 --sample_interval 0"
)
STARTS = ("scratch", "resume")
MOST = 9_223_372_036_854_775_807
HOSTILE = [
    "", " ", "-", "--", "--n_layer", "-1", "0", "-0", "1", "2", "3", "1_0", " 5 ", "٣", "1.5", "0x10", "1e3", "1e-400",
    "1e400", "nan", "inf", "-inf", "none", "None", "true", "off", "AUTO", "cuda", "cuda:0", "cuda:" + "9" * 5000, "mps",
    "50%", "1" * 30, "-" + "1" * 30, "1" * 5000, str(MOST), str(MOST + 1), str(-MOST - 2), "x" * 300, "x" * 100_000,
    "a/" * 5000, "a\0b", "\0", "\ud800", "\udcff", "a\nb", "a\r\x85\u2028b", "\x1b[2J", "'", '"', "%s", "{}", "é", "👍",
]  # fmt: skip
# A setting of these may be right by itself and not go with the defaults of others.
WITH_DEFAULTS = {
    "n_head", "n_kv_head", "n_embd", "position", "learning_rate", "min_lr", "text_key", "val_share", "jobs", "download",
    "head_size", "norm", "norm_gain", "rope_theta", "rope_factor", "rope_low_freq_factor", "rope_high_freq_factor",
    "rope_original_context",
}  # fmt: skip
# In a command it may also not go with the flags of BASE, or with this machine.
TOGETHER = {
    "n_head", "n_kv_head", "n_embd", "n_layer", "block_size", "batch_size", "gradient_accumulation_steps", "vocab_size",
    "learning_rate", "min_lr", "position", "tokenizer", "kernels", "init_from", "allow_data_change", "compile", "cache",
    "kv_memory", "device", "dtype", "async_save", "keep_last", "resume", "pack", "download", "head_size", "norm",
    "norm_gain", "rope_theta", "rope_factor", "rope_low_freq_factor", "rope_high_freq_factor", "rope_original_context",
    "optimizer",
}  # fmt: skip


class Reached(Exception):
    """Every flag was taken."""


@pytest.fixture(scope="module", autouse=True)
def little_memory() -> Iterator[None]:
    """Let no test take two more GiB: that would be a MemoryError."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        yield
        return
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    now = int(statm.read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + (2 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working folder, with a text and a run of it in `done`; nothing can be built or read from stdin in it."""
    folder = tmp_path_factory.mktemp("flags")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("text.txt").write_text(runs.TEXT, encoding="utf-8")
        Path("prompts.txt").write_text("The\n", encoding="utf-8")
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            assert cli.run(train.main, [*BASE, "--out_dir", "done"]) == 0

        def reached(*_, **__):
            raise Reached

        patch.setattr(GPT, "__init__", reached)
        patch.setattr(torch.cuda, "is_available", lambda: False)  # CUDA would take much address space
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
        yield folder


def parsed(kind: type, flags: list[str]) -> str | None:
    """The one error line of the parser; None where every flag was taken."""

    def main(argv: Sequence[str] | None) -> int:
        presets = PRESETS if kind is TrainConfig else None
        cli.parse(kind, argv, prog="program", description="A program.", presets=presets)
        raise Reached

    return error_line(main, flags)


def run(kind: type, flags: list[str]) -> str | None:
    """The one error line of the whole command; None where every flag was taken."""
    main, base = (train.main, BASE) if kind is TrainConfig else (generate.main, ["--out_dir=done", "--device=cpu"])
    return error_line(main, [*base, *flags])


def error_line(main: Callable[[Sequence[str] | None], int], words: list[str]) -> str | None:
    """The one line by which `main` refuses the words; None where it takes them and raises `Reached`."""
    error = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline="\n")
    with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.redirect_stderr(error):
        try:
            code = cli.run(main, words)
        except Reached:
            return None
    error.seek(0)
    lines = error.read().rstrip("\n").split("\n")
    assert code == 2
    assert output.getvalue() == ""
    assert [i for i, line in enumerate(lines) if line.startswith("error: ")] == [len(lines) - 1], lines
    assert lines[-1].splitlines() == [lines[-1]]
    assert len(lines[-1]) < 1000
    return lines[-1]


def judge(field: dataclasses.Field, hint: typing.Any, text: str, *, whole: bool) -> bool | None:
    """Whether a value must be taken (True) or refused (False) by the parser or the whole command; None for either."""
    m, allowed = field.metadata, typing.get_args(hint) or (hint,)
    optional = type(None) in allowed
    if optional and text.lower() == "none":
        return True
    if m["auto"] and text.lower() == "auto":
        return True
    if bool in allowed:
        return text.lower() in {"true", "yes", "on", "1", "false", "no", "off", "0"}
    if m["choices"]:
        return text in m["choices"]
    if int in allowed or float in allowed:
        try:
            value = int(text) if int in allowed else float(text)
        except ValueError:
            return False
        fits = math.isfinite(value) if isinstance(value, float) else -MOST - 1 <= value <= MOST
        return (
            fits
            and (m["low"] is None or value >= m["low"])
            and (m["high"] is None or value <= m["high"])
            and (m["above"] is None or value > m["above"])
            and (m["below"] is None or value < m["below"])
        )
    if field.name == "prompt" and whole:
        return not any(0xD800 <= ord(char) < 0xE000 for char in text)
    if not m["path"]:
        return None if whole and field.name != "stop" else True
    if not text or "\0" in text or any(0xD800 <= ord(char) < 0xE000 for char in text):
        return False
    name_fits = all(len(part.encode()) <= 255 for part in text.split("/")) and len(text.encode()) < 3000
    if not name_fits:
        return False if os.name == "posix" else None
    if not whole:
        return field.name != "init_from" or text in STARTS or Path(text).exists() or could_be_new_name(text)
    new = field.name in ("out_dir", "data_dir", "output", "gpt2_vocab")  # need not exist
    return None if new or text in STARTS or Path(text).exists() else False


def could_be_new_name(text: str) -> bool:
    """Whether a text may name a model on the hub, and is not a misspelled `STARTS`."""
    return could_be_hub_name(text) and not nearest(text, STARTS)


def traces(text: str) -> set[str]:
    """How the beginning of a value may stand in a message."""
    spelled = {text, repr(text)[1:], " ".join(text.splitlines()), str(Path(text)) if "\0" not in text else ""}
    for number in (int, float):
        with contextlib.suppress(ValueError):
            spelled |= {str(number(text)), "thousands of digits"}
    spelled |= {one.encode(errors="backslashreplace").decode() for one in spelled}
    spelled |= {"".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in one) for one in spelled}
    spelled |= {f"U+{ord(char):04X}" for char in text if 0xD800 <= ord(char) < 0xE000}
    return {one[:15].rstrip() for one in spelled}


def flag(field: dataclasses.Field, text: str) -> list[str]:
    """The value, with what it needs beside it."""
    needed = {"output": ["--prompts=prompts.txt"]}.get(field.name, [])
    if field.name.startswith("muon_"):
        needed = ["--optimizer=muon"]
    return [*needed, f"--{field.name}={text}"]


def stays_inside(text: str) -> bool:
    """Whether a path cannot leave the working folder."""
    return not text.startswith("/") and ".." not in text.split("/")


def is_switch(hint: Any) -> bool:
    """Whether a setting is on or off. One that is on, and lacks another flag, is named without its value."""
    return bool in (hint, *typing.get_args(hint))


def check_parser(kind: type, field: dataclasses.Field, text: str) -> None:
    hint = typing.get_type_hints(kind)[field.name]
    due = judge(field, hint, text, whole=False)
    line = parsed(kind, flag(field, text))
    if line is None:
        assert due is not False, f"--{field.name} {text!r:.200} was taken"
        return
    assert due is not True or field.name in WITH_DEFAULTS, line
    check_line(field, text, line, text_is_named=not (is_switch(hint) and due))


def check_command(kind: type, field: dataclasses.Field, text: str) -> None:
    if field.name in ("data_dir", "dataset") and not stays_inside(text):
        return
    if field.name == "checkpoint" and Path(text).name in ("", ".."):  # a folder that is there, without a manifest
        return
    hint = typing.get_type_hints(kind)[field.name]
    due = judge(field, hint, text, whole=True)
    line = run(kind, flag(field, text))
    if line is None:
        assert due is not False, f"--{field.name} {text!r:.200} was taken"
        return
    assert due is not True or field.name in TOGETHER, line
    if field.name == "init_from" and due is None:  # a run to continue, which is looked for in its folder
        return
    check_line(field, text, line, text_is_named=not (is_switch(hint) and due))


def check_line(field: dataclasses.Field, text: str, line: str, *, text_is_named: bool) -> None:
    """An error line names the flag, its value, and of known words the nearest."""
    assert f"--{field.name}" in line
    assert not text_is_named or any(trace in line for trace in traces(text)), line
    if field.metadata["choices"] and difflib.get_close_matches(text[:80], field.metadata["choices"], cutoff=0.5):
        assert len(text) > 80 or "did you mean" in line or text in field.metadata["choices"], line


FIELDS = [
    pytest.param(kind, f, id=f"{kind.__name__}.{f.name}")
    for kind in (TrainConfig, GenerateConfig)
    for f in dataclasses.fields(kind)
]


PARSED = [
    *FIELDS,
    *(pytest.param(PrepareConfig, f, id=f"PrepareConfig.{f.name}") for f in dataclasses.fields(PrepareConfig)),
]


def values(field: dataclasses.Field) -> st.SearchStrategy[str]:
    """Numbers of any size, any text, and what resembles a right value."""
    near = [field.name, str(field.default), *(field.metadata["choices"] or ()), *PRESETS]
    misses = st.builds(
        lambda word, at, char: word[:at] + char + word[at + 1 :],
        st.sampled_from(near),
        st.integers(0, 12),
        st.characters(),
    )
    return st.one_of(
        st.sampled_from(HOSTILE),
        st.integers().map(str),
        st.integers(-5, 300).map(str),
        st.integers(0, 4000).map(lambda zeros: "1" + "0" * zeros),
        st.floats().map(repr),
        st.floats(0, 1).map(repr),
        st.text(st.characters(codec=None, categories=None)),
        misses,
    )


@pytest.mark.parametrize(("kind", "field"), PARSED)
@settings(max_examples=2, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_the_parser_takes_a_value_or_refuses_it_in_one_line(kind: type, field: dataclasses.Field, data):
    check_parser(kind, field, data.draw(values(field)))


@pytest.mark.parametrize(("kind", "field"), PARSED)
@pytest.mark.parametrize("share", [8, pytest.param(1, marks=pytest.mark.slow, id="all")])
def test_the_parser_takes_or_refuses_hostile_values(kind: type, field: dataclasses.Field, share: int):
    """By default each flag meets an eighth of them, and each of them many flags."""
    for text in HOSTILE[len(field.name) % share :: share]:
        check_parser(kind, field, text)


@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=st.one_of(st.sampled_from([*HOSTILE, *PRESETS, "bbay", "CPU", "gpt-2"]), st.text()))
def test_a_preset_is_known_or_refused(text: str):
    line = parsed(TrainConfig, [f"--preset={text}"])
    assert line is None if text in PRESETS else line is not None and line.startswith("error: --preset ")


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize(("kind", "field"), FIELDS)
@settings(max_examples=3, deadline=None, suppress_health_check=list(HealthCheck))  # 200 commands in all
@given(data=st.data())
def test_a_command_takes_a_value_or_refuses_it_in_one_line(kind: type, field: dataclasses.Field, data):
    check_command(kind, field, data.draw(values(field)))


@pytest.mark.slow
@pytest.mark.usefixtures("place")
@pytest.mark.parametrize(("kind", "field"), FIELDS)
@settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_500_commands_for_each_flag(kind: type, field: dataclasses.Field, data):
    check_command(kind, field, data.draw(values(field)))


@pytest.mark.slow
@pytest.mark.usefixtures("place")
@pytest.mark.parametrize(("kind", "field"), FIELDS)
def test_a_command_takes_or_refuses_every_hostile_value(kind: type, field: dataclasses.Field):
    for text in HOSTILE:
        check_command(kind, field, text)
