"""Lines of a .jsonl file, in ranges that cut it anywhere, and what is no document."""

import json
from pathlib import Path

import pytest

from fastgpt.data import json_lines
from fastgpt.errors import UsageError

TEXTS = ["a", "zwei Wörter", "한국어 \U0001f600", "line\nbreak \r\n", " ", '"quoted"']


def read(path: Path, step: int | None = None, key: str = "text") -> list[str]:
    size = path.stat().st_size
    starts = range(0, size, step or size)
    return [text for at in starts for text in json_lines.texts(path, at, min(at + starts.step, size), key)]


@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\n\n  \n"])
@pytest.mark.parametrize("ascii", [True, False])
def test_each_line_belongs_to_one_range(tmp_path: Path, end: str, ascii: bool):
    path = tmp_path / "x.jsonl"
    lines = [json.dumps({"id": number, "text": text}, ensure_ascii=ascii) for number, text in enumerate(TEXTS)]
    path.write_bytes(b"\xef\xbb\xbf" + (("\r\n" if end == "\r\n" else "\n").join(lines) + end).encode())
    for step in (None, *range(1, path.stat().st_size + 2)):
        assert read(path, step) == TEXTS


def test_a_whole_number_of_any_length_beside_the_text(tmp_path: Path):
    (tmp_path / "x.jsonl").write_text('{"n": ' + "1" * 5000 + ', "body": "text"}')
    assert read(tmp_path / "x.jsonl", key="body") == ["text"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"[1]", "is a list, not an object; each line is to be one"),
        (b'"text"', "is text, not an object"),
        (b"7", "is a number, not an object"),
        (b"null", "is null, not an object"),
        (b"{", "is not JSON: Expecting property name"),
        (b'{"text": "a"} {"text": "b"}', "is not JSON: Extra data at column 15"),
        (b"[" * 100_000, "is nested too deep"),
        (b'{"txt": "a", "n": 1}', "has no 'text', only ['txt', 'n']; name the key of the text by `text_key`"),
        (b'{"text": 5}', "has a number under 'text', not text"),
        (b'{"text": null}', "has null under 'text', not text"),
        (b'{"text": ["a"]}', "has a list under 'text', not text"),
        (b'{"text": "a\\ud800"}', "is not valid Unicode: a lone surrogate, U+D800, at character 1"),
        (b'{"text": "\xff"}', "is not UTF-8: invalid start byte at byte 10 of the line (0xff); convert it"),
    ],
)
def test_a_line_that_is_no_document_is_named(tmp_path: Path, line: bytes, message: str):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "a"}\n\n' + line + b'\n{"text": "b"}\n')
    for step in (None, 7):
        with pytest.raises(UsageError) as error:
            read(path, step)
        assert str(error.value).startswith(f"{path}, line 3 ")
        assert message in str(error.value)
        assert "\n" not in str(error.value)
