"""`fastgpt plot`: what it writes for runs that are whole, still training or damaged, and what it refuses."""

import json
import os
import re
import xml.etree.ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fastgpt import cli, plot
from tests.helpers.histories import healthy, write

BEGINNINGS = {"html": b"<!DOCTYPE html>", "png": b"\x89PNG\r\n\x1a\n", "svg": b"<?xml"}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, which holds the runs a and b."""
    monkeypatch.chdir(tmp_path)
    write(Path("a"), healthy()[:40])
    write(Path("b"), healthy()[:30], learning_rate=3e-3)
    return tmp_path


class Elements(HTMLParser):
    """Counts the elements of a page, each of which must be closed, and collects the ids."""

    def __init__(self, page: str):
        super().__init__()
        self.counts, self.ids, self.open = {}, [], []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.ids += [value for name, value in attrs if name == "id"]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def run(*words: str) -> int:
    return cli.run(plot.main, words)


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert run(*words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize("kind", BEGINNINGS)
def test_every_kind_of_file_is_written_and_replaced(kind: str, capsys: pytest.CaptureFixture[str]):
    Path(f"two.{kind}").write_text("before")
    assert run("a", "b", "--output", f"two.{kind}") == 0
    content = Path(f"two.{kind}").read_bytes()
    assert content.startswith(BEGINNINGS[kind])
    out, err = capsys.readouterr()
    assert re.fullmatch(rf"wrote two\.{kind}: \d+ KiB\n", out)
    assert err == ""
    if kind == "svg":
        assert xml.etree.ElementTree.fromstring(content).tag == "{http://www.w3.org/2000/svg}svg"
        assert b"<!-- learning_rate 0.003 -->" in content  # matplotlib draws texts as paths, and names each


@pytest.mark.parametrize("name", ["pay$a_{$b", "한국어 💡"])
def test_any_name_is_drawn_as_it_is(name: str, capsys: pytest.CaptureFixture[str]):
    Path("a").rename(name)
    Path("b").rename("other")
    for folder in (name, "other"):
        (Path(folder) / "config.json").unlink()
    assert run(name, "other", "--output", "named.svg") == 0
    assert f"<!-- {name} -->" in Path("named.svg").read_text(encoding="utf-8")
    assert "Warning" not in capsys.readouterr().err


def test_the_page_is_whole_by_itself_and_follows_the_theme():
    names = "<script>alert(1)</script>", "B&B"
    for name, text in zip(names, ("a", "b"), strict=True):
        Path(text).rename(name.replace("/", "∕"))
    runs = [name.replace("/", "∕") for name in names]
    assert run(*runs) == 0
    page = Path("curves.html").read_text(encoding="utf-8")
    elements = Elements(page)
    assert (elements.counts["svg"], elements.counts["tr"]) == (6, 3)
    assert "script" not in elements.counts
    assert len(set(elements.ids)) == len(elements.ids)
    assert re.findall(r"(?:src|href)=\"(?!#)[^\"]*\"|url\((?!#)", page) == []
    assert "prefers-color-scheme: dark" in page
    assert page.count("var(--run-1)") > 6
    assert "#0a0b0c" not in page
    text = re.sub(r"<svg.*?</svg>", "", page, flags=re.S)
    assert "B&amp;B" in text
    rows = [re.findall(r"<td>([^<]*)</td>", row)[1:3] for row in text.split("<tr>")[2:]]
    assert rows == [["0.001", "380"], ["0.003", "290"]]


def test_a_run_that_is_being_written_is_drawn_without_its_last_line(capsys: pytest.CaptureFixture[str]):
    before = {path: path.read_bytes() for path in Path("a").iterdir()}
    path = Path("a/metrics.jsonl")
    path.write_bytes(path.read_bytes() + b'{"step": 400, "tok')
    before[path] = path.read_bytes()
    assert run("a", "--output", "a.svg") == 0
    assert capsys.readouterr().err == ""
    assert {path: path.read_bytes() for path in Path("a").iterdir()} == before


def test_damaged_lines_are_left_out_and_counted(capsys: pytest.CaptureFixture[str]):
    lines = Path("a/metrics.jsonl").read_bytes().splitlines(keepends=True)
    lines[3:3] = [b'{"step": 35, "tok\n', b"\xff\xfe\0\n", b'{"step": 1e400, "tokens": 3}\n', b'{"step": 36}\n']
    Path("a/metrics.jsonl").write_bytes(b"".join(lines))
    Path("a/config.json").write_text(json.dumps({"config": {"n_layer": "six", "strange": 1, "max_iters": 10**400}}))
    assert run("a", "b", "--output", "a.svg") == 0
    err = capsys.readouterr().err
    assert err == f"{Path('a/metrics.jsonl')}: 4 damaged lines left out\n"


def test_a_run_without_settings_goes_by_its_folder(capsys: pytest.CaptureFixture[str]):
    Path("b/config.json").unlink()
    assert run("a", "b") == 0
    assert capsys.readouterr().err == "b has no config.json: a run's settings are known once it has a checkpoint\n"
    assert "learning_rate" not in Path("curves.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("words", "saying"),
    [
        (["nowhere"], "--runs nowhere does not exist; name the folder of a run"),
        ([], "--runs out does not exist; name the folder of a run"),
        (["a/metrics.jsonl"], "--runs a/metrics.jsonl is a file; name the folder of a run"),
        (["."], "--runs . has no metrics.jsonl; name the folder of a run"),
        (["a", "b", "a"], "--runs a is given twice; leave one out"),
        (["a", "b/../a"], "--runs b/../a is given twice; leave one out"),
        (["a", "--output", "x.pdf"], "--output x.pdf ends in none of .html, .png, .svg; name such a file"),
        (["a", "--output", "x"], "--output x ends in none of"),
        (["a", "--output", "no/x.png"], "--output no/x.png: there is no folder no; make it, or name another file"),
        (["a", "--output", "folder.png"], "--output folder.png is a folder; name a file in it"),
        (["a", "--smooth", "1"], "--smooth 1.0 must be below 1"),
        (["empty"], "--runs empty: no step is logged there yet; wait for the first, or name another run"),
        (["garbage"], "garbage/metrics.jsonl holds no record of a run: 1 damaged line; name another run"),
        (["skipped"], "--runs skipped: no loss is logged there yet; wait for its first records"),
        (["pipe"], "pipe/metrics.jsonl cannot be read: metrics.jsonl is no regular file"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_a_line(words: list[str], saying: str, capsys: pytest.CaptureFixture[str]):
    Path("folder.png").mkdir()
    write(Path("empty"), [])
    write(Path("skipped"), [{"step": 1, "tokens": 8, "skipped": "its loss is nan", "batch": 0}])
    write(Path("garbage"), [])
    Path("garbage/metrics.jsonl").write_bytes(bytes(range(256)))
    if "pipe" in words:
        if not hasattr(os, "mkfifo"):
            pytest.skip("this system has no named pipes")
        write(Path("pipe"), [])
        Path("pipe/metrics.jsonl").unlink()
        os.mkfifo("pipe/metrics.jsonl")
    before = set(Path().rglob("*"))
    assert saying in refused(capsys, *words)
    assert set(Path().rglob("*")) == before


def test_an_output_that_may_not_be_written_is_refused_before_anything_is_drawn(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # as for a user who is not root
    assert refused(capsys, "nowhere") == "error: --output curves.html: . cannot be written to; name another file\n"
