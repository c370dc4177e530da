"""`fastgpt prepare`: which words mean documents and which one text, and what it imports."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from fastgpt import cli, prepare
from fastgpt.config.choices import TOKENIZERS
from fastgpt.tokenizer import saved
from fastgpt.tokenizer.bpe import DEFAULT_BPE
from tests.helpers.places import ROOT


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.run(prepare.main, words) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    return err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["docs", "--dataset", "pydocs"],
            "error: --dataset 'pydocs' is for one text, and --source 'docs' names documents; leave one of the two out",
        ),
        (["docs", "--corpus_file", "x"], "error: --corpus_file 'x' is for one text"),
        (["--jobs", "2"], "error: --jobs 2 is for documents; name them by --source, or leave it out"),
        (["--dataset", "pydocs", "--text_key", "body"], "error: --text_key 'body' is for documents"),
        (["--val_share", "0.1"], "error: --val_share 0.1 is for documents"),
        (["nowhere", "--tokenizer", "byte"], "error: --source 'nowhere' is no file or folder"),
        (["nowhere", "more"], "error: 'more' is not a flag"),
        (["nowhere", "--val_share", "1"], "error: --val_share 1.0 must be below 1"),
        (["nowhere", "--jobs", "0"], "error: --jobs 0 must be at least 1"),
        (["nowhere", "--tokenizer", "word"], "error: --tokenizer 'word' is not one of"),
        (["nowhere"], "error: --source 'nowhere' is no file or folder"),
        (["--tokenizer", "char", "docs"], "error: --tokenizer char has no end-of-text token"),
    ],
)
def test_words_that_do_not_go_together(words: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert refused(capsys, *words).startswith(message)


def test_settings_say_what_the_library_has():
    assert tuple(saved.KINDS) == TOKENIZERS
    (size,) = (field for field in dataclasses.fields(prepare.PrepareConfig) if field.name == "vocab_size")
    assert f"{DEFAULT_BPE} where it is not given" in size.metadata["help"]


@pytest.mark.parametrize("words", [["docs", "--tokenizer", "byte", "--val_share", "0.5"], ["--dataset", "docs/a.txt"]])
def test_preparing_imports_no_torch(words: list[str], tmp_path: Path):
    (tmp_path / "docs").mkdir()
    for name in "abcdef":
        (tmp_path / "docs" / f"{name}.txt").write_text(f"text {name}")
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.modules |= dict.fromkeys(('torch', 'triton'))\n"
        f"from fastgpt import cli, prepare; sys.exit(cli.run(prepare.main, {words!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "folder" in done.stdout
