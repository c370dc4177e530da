"""Fixtures of the kernels' tests: what was launched, or that nothing was."""

from typing import Any

import pytest


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every launch that was made."""
    from fastgpt_kernels.launch import Launch

    made, call = [], Launch.__call__
    monkeypatch.setattr(Launch, "__call__", lambda self: (made.append(self), call(self))[1])
    return made


@pytest.fixture
def no_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every launch an error."""
    from fastgpt_kernels.launch import Launch

    def launched(self: Launch) -> None:
        raise AssertionError(f"{self.kernel} was launched")

    monkeypatch.setattr(Launch, "__call__", launched)
