"""JSON from files and lines that may be damaged or hostile."""

import json
from pathlib import Path

import pytest

from fastgpt.errors import CorruptCheckpoint, UsageError
from fastgpt.system import json_files

LONG = "1" * 5000  # a whole number that Python refuses


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "is not JSON: Expecting property name enclosed in double quotes at column 2"),
        ("[" * 100_000, "is not JSON: it is nested too deep"),
        ("7", "is a number, not an object with x"),
        ("0.5", "is a number, not an object with x"),
        (LONG, "is a number, not an object with x"),
        ("true", "is true or false, not an object with x"),
        ("null", "is null, not an object with x"),
    ],
)
def test_a_line_that_is_no_object(line: str, message: str):
    with pytest.raises(ValueError) as error:
        json_files.parse_object(line, " with x")
    assert str(error.value) == message


def test_a_number_of_thousands_of_digits_in_a_line_is_an_infinity():
    assert json_files.parse_object(f'{{"a": -{LONG}, "b": {2**70}}}', "") == {"a": float("-inf"), "b": 2**70}


@pytest.mark.parametrize("refusal", [UsageError, CorruptCheckpoint])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "holds no JSON object"),
        ("{", "is not JSON: Expecting property name"),
        ("[" * 100_000, "is not JSON: it is nested too deep"),
        (LONG, "is not JSON: it has a whole number of thousands of digits"),
        (f"{'1' * (1 << 20)} ", "is not JSON: it is larger than 1 MiB"),
        (None, "cannot be read: No such file or directory"),
    ],
)
def test_a_file_that_holds_no_object(tmp_path: Path, content: str | None, message: str, refusal: type[UsageError]):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(refusal) as error:
        json_files.read_object(path, 1 << 20, refusal)
    assert type(error.value) is refusal
    assert str(error.value).startswith(f"{path} {message}")


def test_a_file_of_the_largest_size_is_read(tmp_path: Path):
    content = {"a": ["é", 2**70, 0.5, None]}
    (tmp_path / "x.json").write_text(text := json.dumps(content))
    assert json_files.read_object(tmp_path / "x.json", len(text)) == content
    with pytest.raises(ValueError, match="larger"):
        json_files.read(tmp_path / "x.json", len(text) - 1)
