"""Fixtures of the tests of conversions."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.gpt2_folders import folder_of
from tests.helpers.runs import run_in


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with hf/, a model that every format can hold."""
    monkeypatch.chdir(tmp_path)
    folder_of(tmp_path / "hf", mlp="gelu_exact")
    return tmp_path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes runs with some flags, each once, which no test changes."""
    made: dict[str, Path] = {}

    def make(flags: str = "") -> Path:
        if flags not in made:
            made[flags] = run_in(tmp_path_factory.mktemp("trained"), f"--max_iters 3 {flags}")
        return made[flags]

    return make
