"""Layers and checkpoints that a text asks for."""

from pathlib import Path

import pytest

from fastgpt.errors import UsageError
from fastgpt.inspection import selection


@pytest.mark.parametrize(
    ("count", "chosen"), [(1, [9]), (2, [0, 9]), (3, [0, 4, 9]), (4, [0, 3, 6, 9]), (9, [0, 1, 2, 3, 4, 6, 7, 8, 9])]
)
def test_evenly_spaced_items_have_the_first_and_the_last(count: int, chosen: list[int]):
    assert selection.evenly(range(10), count) == chosen
    assert selection.evenly(range(10), 10) == selection.evenly(range(10), 99) == list(range(10))


@pytest.mark.parametrize(
    ("text", "chosen"),
    [(None, [0, 1, 2, 3, 4, 5]), ("0,5", [0, 5]), ("2-4", [2, 3, 4]), (" 4 , 0 - 1,1", [0, 1, 4]), ("3-3", [3])],
)
def test_layers(text: str | None, chosen: list[int]):
    assert selection.layers(text, 6) == chosen


@pytest.mark.parametrize(
    ("text", "saying"),
    [
        ("6", "there is no layer 6; the model's 6 layers are 0 to 5"),
        ("2-9", "there is no layer 9"),
        ("4-2", "4-2 is no range"),
        ("", "'' is no list of layers"),
        ("1,,2", "is no list of layers"),
        ("-1", "is no list of layers"),
        ("١", "is no list of layers"),
        ("one", "'one' is no list of layers; give numbers and ranges"),
    ],
)
def test_no_layers(text: str, saying: str):
    with pytest.raises(UsageError, match=saying) as error:
        selection.layers(text, 6)
    assert str(error.value).startswith("`layers`")


@pytest.mark.parametrize("text", ["0", "13", "-1", "", "some", "1.5", "²"])
def test_no_number_of_checkpoints(text: str):
    with pytest.raises(UsageError, match="is neither all nor a number from 1 to 12"):
        selection.check_count(text)


def test_checkpoints_beyond_latest_do_not_count(tmp_path: Path):
    for step in range(1, 16):
        (tmp_path / f"step-{step:06d}").mkdir()
    (tmp_path / "latest").write_text("step-000014\n")
    found, known = selection.checkpoints("all", tmp_path)
    assert known == 14
    assert [path.name[-2:] for path in found] == [
        "01",
        "02",
        "03",
        "05",
        "06",
        "07",
        "08",
        "09",
        "10",
        "12",
        "13",
        "14",
    ]
    assert [path.name[-2:] for path in selection.checkpoints("2", tmp_path)[0]] == ["01", "14"]
