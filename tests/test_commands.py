"""`fastgpt` and `python -m fastgpt`: the commands, found by their names, and help without PyTorch."""

import re
import subprocess
import sys
import tomllib

import pytest

import fastgpt
from fastgpt import __main__ as commands
from fastgpt import cli, inspect
from tests.helpers.places import ROOT

HEAVY = ("torch", "numpy", "triton", "rich", "safetensors", "matplotlib")


def run(*words: str) -> int:
    return cli.run(commands.main, words)


@pytest.mark.parametrize("words", [(), ("--help",), ("-h",)])
def test_the_commands_are_listed_a_line_each(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]):
    assert run(*words) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert re.findall(r"^  (\w+)  +\w.*\w$", out, re.MULTILINE) == list(commands.COMMANDS)


def test_every_command_is_a_module_and_every_module_with_flags_a_command():
    modules = {path.stem for path in (ROOT / "fastgpt").glob("*.py") if "cli.run(main)" in path.read_text("utf-8")}
    assert modules - {"__main__"} == set(commands.COMMANDS)


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]):
    assert run("--version") == 0
    assert capsys.readouterr() == (f"fastgpt {fastgpt.__version__}\n", "")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "fastgpt.__version__"}


@pytest.mark.parametrize(
    ("word", "saying"),
    [
        ("trian", "unknown command 'trian'; did you mean train?; "),
        ("xyz", "unknown command 'xyz'; "),
        ("--preset", "unknown command '--preset'"),
    ],
)
def test_an_unknown_command_is_refused_and_the_nearest_named(
    word: str, saying: str, capsys: pytest.CaptureFixture[str]
):
    assert run(word, "--n_layer", "3") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: {saying}")
    assert err.endswith(f"; the commands are {', '.join(commands.COMMANDS)}\n")
    assert err.count("\n") == 1


def test_a_command_gets_the_words_after_its_name(capsys: pytest.CaptureFixture[str]):
    assert run("train", "--n_layr", "3") == 2
    assert capsys.readouterr().err == "error: unknown flag --n_layr; did you mean --n_layer?\n"
    assert run("verify", "nowhere") == 2
    assert "error: nowhere holds no run" in capsys.readouterr().err


def test_the_console_script_is_the_same_program(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["scripts"]
    assert scripts == {"fastgpt": "fastgpt.__main__:run"}
    monkeypatch.setattr(sys, "argv", ["fastgpt", "trian"])
    assert commands.run() == 2
    done = subprocess.run([sys.executable, "-m", "fastgpt", "trian"], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", capsys.readouterr().err)


@pytest.mark.parametrize(
    "words",
    [
        ["fastgpt"],
        *([*start, "--help"] for name in commands.COMMANDS for start in (["fastgpt", name], [f"fastgpt.{name}"])),
        *(["fastgpt", "inspect", view, "--help"] for view in inspect.VIEWS),
    ],
)
def test_help_imports_nothing_heavy(words: list[str]):
    code = (
        f"import runpy, sys; sys.modules |= dict.fromkeys({HEAVY!r}); sys.argv = {words!r}\n"
        f"runpy.run_module({words[0]!r}, run_name='__main__', alter_sys=True)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: ")
