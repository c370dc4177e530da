"""--interactive: the text grows in turns, its cache is kept between them, and nothing that goes wrong loses it."""

import dataclasses
import io
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from fastgpt import cli, generate
from fastgpt.config.generation import SamplingParams
from fastgpt.generation import interactive, writing
from fastgpt.generation.generator import TextGenerator
from tests.helpers import runs
from tests.helpers.engines import pages, watched
from tests.helpers.untrained import fresh

BLOCK = 64
GREEDY = SamplingParams(temperature=0, max_new_tokens=6)


@pytest.fixture(scope="module")
def generator() -> TextGenerator:
    return fresh(block_size=BLOCK)


@pytest.fixture
def talk(monkeypatch, capsys, generator: TextGenerator) -> Callable[..., tuple[str, list[str]]]:
    """What a conversation writes to stdout, and the lines on stderr."""

    def talk(typed: str | bytes, text: str = "", params: SamplingParams = GREEDY, **options) -> tuple[str, list[str]]:
        content = typed if isinstance(typed, bytes) else typed.encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))
        options = {"kv_memory": pages(generator, 60, 4), "page_size": 4, "slide": True} | options
        interactive.run(watched(generator.engine(**options)), generator.tokenizer, params, text)
        captured = capsys.readouterr()
        return captured.out, captured.err.splitlines()

    return talk


def replies(generator: TextGenerator, text: str, lines: list[str], params: SamplingParams = GREEDY) -> list[str]:
    """The model's turns, each as the continuation of all that came before it."""
    settings = {field.name: getattr(params, field.name) for field in dataclasses.fields(params)}
    said = []
    for line in lines:
        text += line + "\n"
        said.append(generator.generate(text, **settings))
        text += said[-1]
    return said


@pytest.mark.parametrize("text", ["", "jih"])
@pytest.mark.parametrize("params", [GREEDY, SamplingParams(max_new_tokens=6, temperature=1.0)])
@pytest.mark.parametrize("options", [{}, {"speculate": "ngram"}, {"prefix_cache": False}], ids=str)
def test_the_model_goes_on_after_each_line(talk, generator, text: str, params: SamplingParams, options: dict):
    lines = ["abc", "", "defghij"]
    out, _ = talk("".join(line + "\n" for line in lines), text, params, **options)
    assert out == "".join(reply + "\n" for reply in replies(generator, text, lines, params))


def test_the_cache_is_kept_between_turns(talk):
    """All full pages but the one with the last token, which was never an input."""
    _, shown = talk("abc\n" * 4)
    assert shown == [  # 4, 14, 24 and 34 tokens; behind each but the first 9, 19 and 29 are computed
        "[0 of 4 tokens in the cache]",
        "[8 of 14 tokens in the cache]",
        "[16 of 24 tokens in the cache]",
        "[28 of 34 tokens in the cache]",
    ]
    _, shown = talk("abc\n" * 3, prefix_cache=False)
    assert [line.split()[0] for line in shown] == ["[0"] * 3


def test_line_breaks_of_windows_and_a_byte_order_mark_are_no_text(talk, generator):
    out, _ = talk(b"\xef\xbb\xbfabc\r\n\r\ndef\r\n", "jih")
    assert out == "".join(reply + "\n" for reply in replies(generator, "jih", ["abc", "", "def"]))
    _, shown = talk(b"abc\n\xef\xbb\xbfdef\n")
    assert "lacks '\\ufeff' (U+FEFF)" in shown[1]


def test_a_turn_begins_with_the_character_in_which_the_text_ends(capsys):
    """A byte model whose turn goes on inside a character of the text."""
    generator, half = fresh(chars=None, block_size=BLOCK), "가".encode()[:2]
    engine = generator.engine(kv_memory=1 << 20)
    params = SamplingParams(max_new_tokens=3, temperature=2.0, top_k=0)
    seeds = (dataclasses.replace(params, seed=seed) for seed in range(200))
    completing = next(one for one in seeds if engine.generate([list(half)], one)[0].tokens[0] & 0xC0 == 0x80)
    said, _ = interactive.take_turn(engine, list(half), completing)
    assert capsys.readouterr().out == (half + bytes(said)).decode(errors="replace")
    (found,) = engine.generate([list(half)], completing)
    alone = generator.stream(list(half), **vars(completing))
    assert found.text == "".join(alone) == (half + bytes(said)).decode(errors="replace")
    assert found.text[0] == (half + bytes(said[:1])).decode() != "\ufffd"


def test_a_last_line_without_a_break_counts_too(talk, generator):
    assert talk("abc")[0] == generator.generate("abc", temperature=0, max_new_tokens=6) + "\n"


def test_nothing_typed_is_no_turn(talk):
    assert talk("", "abc") == ("", [])


def test_a_line_with_unknown_characters_is_told_and_loses_nothing(talk, generator):
    out, shown = talk("abc\nx¿\ndef\n")
    assert out == "".join(reply + "\n" for reply in replies(generator, "", ["abc", "def"]))
    assert len(shown) == 3
    assert shown[1].startswith("error: the char vocabulary has only 11 characters and lacks 'x' (U+0078), '¿' (U+00BF)")


def test_a_line_that_is_no_text_is_told_and_loses_nothing(talk, generator):
    out, shown = talk(b"abc\n\xff\xfe\ndef\n")
    assert out == "".join(reply + "\n" for reply in replies(generator, "", ["abc", "def"]))
    assert shown[1].startswith("error: ")


def test_a_turn_that_the_pool_has_no_room_for_is_told(talk, generator):
    """A page holds 4 tokens: the second turn needs more pages than the 4 there are."""
    out, shown = talk("abc\nabcdefghij\n", kv_memory=pages(generator, 4, 4))
    assert out.startswith(replies(generator, "", ["abc"])[0] + "\n")
    assert any(line.startswith("error: ") and "`kv_memory`" in line for line in shown)


def test_a_text_that_outgrows_the_context_goes_on_from_its_last_half(talk, generator):
    long = "abcdefghij" * 7
    out, shown = talk(f"{long}\nabc\n")
    kept = (long + "\n")[-BLOCK // 2 :]
    (first,) = replies(generator, kept[:-1], [""])
    (second,) = replies(generator, kept + first, ["abc"])
    assert out == f"{first}\n{second}\n"
    assert shown[0] == f"[the text has outgrown the context of {BLOCK} tokens: its last {BLOCK // 2} count]"
    assert shown[1] == f"[0 of {BLOCK // 2} tokens in the cache]"


def test_every_setting_holds_in_a_turn(talk, generator):
    params = SamplingParams(max_new_tokens=30, temperature=0.5, stop=("a",), seed=3, repetition_penalty=1.1)
    out, _ = talk("jih\n", params=params)
    (wanted,) = replies(generator, "", ["jih"], params)
    assert out == wanted + "\n"
    assert len(wanted) < 30


def test_ctrl_c_stops_the_turn_alone(monkeypatch, capsys, generator):
    """What was said before it stays part of the text, and the cache in order."""
    engine = watched(generator.engine(kv_memory=pages(generator, 60, 4), page_size=4, slide=True))
    step = engine.step
    before = signal.getsignal(signal.SIGINT)

    def interrupted_step():
        if engine.stats.steps == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return step()

    engine.step = interrupted_step
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"abc\ndef\n")))
    interactive.run(engine, generator.tokenizer, GREEDY, "")
    whole = replies(generator, "", ["abc"])[0]
    cut, second, _ = capsys.readouterr().out.split("\n")
    assert cut == whole[: len(cut)]
    assert 3 <= len(cut) < 6
    assert second == replies(generator, f"abc\n{cut}", ["def"])[0]
    assert signal.getsignal(signal.SIGINT) is before
    assert engine.scheduler.allocator.used == 0


def test_ctrl_c_between_turns_ends_the_command(monkeypatch, capsys, tmp_path: Path, generator):
    class Keyboard(io.BytesIO):
        def readline(self, *_) -> bytes:
            line = super().readline()
            if not line:
                raise KeyboardInterrupt
            return line

    monkeypatch.setattr(writing, "load", lambda *_, **__: generator)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(Keyboard(b"abc\n")))
    flags = ["--interactive", "--no-compile", "--temperature", "0", "--max_new_tokens", "6", "--kv_memory", "100kB"]
    assert cli.run(generate.main, flags) == 130
    captured = capsys.readouterr()
    assert captured.out == replies(generator, "", ["abc"])[0] + "\n"
    assert captured.err.splitlines()[-1] == "stopped"


@pytest.mark.parametrize("flags", ["--cache dense", "--cache none", "--num_samples 2", "--output x"])
def test_flags_that_do_not_fit_a_conversation_are_refused(monkeypatch, capsys, generator, flags: str):
    monkeypatch.setattr(writing, "load", lambda *_, **__: generator)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"abc\n")))
    assert cli.run(generate.main, ["--interactive", "--kv_memory", "100kB", *flags.split()]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: --")
    assert flags.split()[0] in captured.err


@pytest.mark.usefixtures("workplace")
def test_a_conversation_with_the_command_itself():
    """Turn by turn: the model answers before the next line is typed, and Ctrl-C stops a turn without an end."""
    runs.run("--max_iters 2 --eval_interval 2 --block_size 32 --tokenizer byte")
    command = [
        sys.executable,
        "-m",
        "fastgpt.generate",
        "--interactive",
        "--no-compile",
        "--max_new_tokens",
        "100000000",
    ]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([*command, "--device", "cpu", "--kv_memory", "1MB"], bufsize=0, **pipes)
    watchdog = threading.Timer(60, process.kill)
    watchdog.start()
    for number, line in enumerate((b"The fox\n", b"The dog\n")):
        process.stdin.write(line)
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        said = b""
        while (shown := process.stderr.read(1)) and not said.endswith(b"in the cache]"):
            said += shown
        assert b"[0 of 8 tokens" in said or number == 1, said
        os.set_blocking(process.stdout.fileno(), False)  # what is left of this turn
        process.stdout.read()
        os.set_blocking(process.stdout.fileno(), True)
    process.stdin.close()
    assert process.wait() == 0, process.stderr.read()
    watchdog.cancel()
