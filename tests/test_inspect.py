"""`fastgpt inspect`: its views, found by their names, with help of their own."""

import re
from pathlib import Path

import pytest

from fastgpt import cli, inspect
from fastgpt.config.inspection import MemoryConfig
from fastgpt.config.training import PRESETS, TrainConfig
from fastgpt.errors import UsageError


def run(*words: str) -> int:
    return cli.run(inspect.main, words)


@pytest.mark.parametrize("words", [(), ("--help",), ("-h",)])
def test_the_views_are_listed_a_line_each(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]):
    assert run(*words) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert re.findall(r"^  (\w+)  +\w.*\w$", out, re.MULTILINE) == list(inspect.VIEWS)


@pytest.mark.parametrize(
    ("word", "saying"), [("atention", "unknown view 'atention'; did you mean attention?"), ("--preset", "unknown view")]
)
def test_an_unknown_view_is_refused(word: str, saying: str, capsys: pytest.CaptureFixture[str]):
    assert run(word, "--png", "a.png") == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"error: {saying}")
    assert err.endswith(f"; the views are {', '.join(inspect.VIEWS)}\n")


@pytest.mark.parametrize("view", inspect.VIEWS)
def test_a_view_has_help_and_names_the_nearest_flag(view: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        inspect.main([view, "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: python -m fastgpt.inspect {view} [--flag value ...]")
    assert run(view, "--thread", "1") == 2
    assert capsys.readouterr().err == "error: unknown flag --thread; did you mean --threads?\n"


def read(path: Path) -> dict[str, object]:
    presets = {"gpt2": MemoryConfig.of(PRESETS["gpt2"])}
    words = ["--config", str(path)]
    return cli.read(MemoryConfig, words, prog="", description="", presets=presets, shares=TrainConfig)[1]


def test_a_recipe_of_train_is_taken_for_what_concerns_the_view(tmp_path: Path):
    path = tmp_path / "recipe.toml"
    path.write_text('preset = "gpt2"\nbatch_size = 3\nlearning_rate = 0.1\n')
    assert read(path) == {"batch_size": 3}
    path.write_text("batch_sise = 3\n")
    with pytest.raises(UsageError, match=r"unknown key 'batch_sise'; did you mean batch_size\?"):
        read(path)
