"""Conversions as a user types them, in the working folder."""

import shlex
from pathlib import Path

from fastgpt import cli, convert
from tests.helpers.runs import contents

FORMATS = ("huggingface", "nanogpt", "fastgpt")
UNVERIFIED = "--verify False"


def call(flags: str) -> int:
    return cli.run(convert.main, shlex.split(flags))


def refusal(capsys, flags: str, code: int = 2) -> str:
    """The one line of a conversion that is refused, and that leaves all as it was."""
    before, names = contents(Path()), sorted(Path().rglob("*"))
    capsys.readouterr()
    assert call(flags) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    assert err.startswith("error: " if code == 2 else "")
    assert contents(Path()) == before
    assert sorted(Path().rglob("*")) == names
    return err
