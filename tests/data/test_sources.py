"""Sources of text: files, folders, the download; and their chunks."""

import functools
import hashlib
import http.server
import os
import socket
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastgpt.data import corpus, sources
from fastgpt.errors import UsageError
from tests.helpers.corpora import TEXT, needs_gpt2, prepare, refused, text_of


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "my text.txt"
    path.write_bytes(TEXT.encode())
    return path


class TestChunks:
    """Where a long text is cut, with chunks small enough to see."""

    @pytest.fixture(autouse=True)
    def small(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(sources, "CHUNK", 50)

    @given(st.text(st.sampled_from("ab,. \n\t가"), max_size=400), st.integers(1, 90))
    def test_chunks_are_the_text_however_it_arrives(self, text: str, size: int):
        pieces = [text[i : i + size] for i in range(0, len(text), size)]
        chunks = list(sources.chunks(pieces))
        assert "".join(chunks) == text
        assert chunks == list(sources.chunks([text]))
        assert all(0 < len(chunk) <= 50 for chunk in chunks)

    def test_a_chunk_ends_after_a_word_before_a_newline(self):
        text = "one two\n three four\n\n  five six seven\nand the rest of it is longer"
        assert next(sources.chunks([text])) == "one two\n three four\n\n  five six seven"
        assert next(sources.chunks(["word " * 20])) == "word " * 9 + "word"
        assert next(sources.chunks(["x" * 200])) == "x" * 50
        assert next(sources.chunks([" " * 200])) == " " * 50

    @needs_gpt2
    @pytest.mark.parametrize("kind", ["gpt2", "bpe"])
    def test_chunks_give_the_tokens_of_the_whole(self, kind: str, text_file: Path, tmp_path: Path):
        prepared = prepare(text_file, tmp_path, tokenizer=kind)
        assert prepared.train().tolist() == prepared.tokenizer.encode(TEXT[: int(0.9 * len(TEXT))]).tolist()

    @given(st.lists(st.text(max_size=5)), st.integers(0, 20), st.integers(0, 20))
    def test_span(self, texts: list[str], start: int, length: int):
        assert "".join(sources.span(texts, start, start + length)) == "".join(texts)[start : start + length]
        assert "".join(sources.span(texts, start)) == "".join(texts)[start:]


class TestFolders:
    def test_files_in_the_order_of_their_paths(self, tmp_path: Path):
        root = tmp_path / "texts"
        (root / "b").mkdir(parents=True)
        (root / ".git").mkdir()
        for name, text in {
            "z.txt": "last",
            "a.txt": "no newline",
            "b/1.md": "newline\n",
            "b/2.md": "",
            "b/3.md": "é",
            ".hidden": "hidden",
            ".git/config": "hidden",
        }.items():
            (root / name).write_text(text, encoding="utf-8")
        prepared = prepare(root, tmp_path)
        assert text_of(prepared) == "no newline\nnewline\né\nlast"
        assert prepared.name == "texts"

    def test_the_data_folder_inside_is_left_out(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        (tmp_path / "a.txt").write_text("the only text")
        monkeypatch.chdir(tmp_path)
        first = corpus.prepare(".", data_dir="data", quiet=True)
        assert corpus.prepare(".", data_dir="data", quiet=True) == first
        assert text_of(first) == "the only text"

    def test_linked_folders_and_files_are_followed_and_each_folder_is_read_once(self, tmp_path: Path):
        root, elsewhere = tmp_path / "texts", tmp_path / "elsewhere"
        (root / "own" / "deep").mkdir(parents=True)
        elsewhere.mkdir()
        (elsewhere / "x.txt").write_text("linked\n")
        (root / "own" / "deep" / "a.txt").write_text("own\n")
        (root / "again").symlink_to(root / "own" / "deep")  # which its own path leads to as well
        (root / "link").symlink_to(elsewhere)
        (root / "other").symlink_to(elsewhere)
        (elsewhere / "loop").symlink_to(root)
        (root / "own" / "deep" / "loop").symlink_to("..")
        (root / "z.txt").symlink_to(elsewhere / "x.txt")
        assert text_of(prepare(root, tmp_path)) == "linked\nown\nlinked\n"
        assert text_of(prepare(root, tmp_path, reading=1)) == "own\nlinked\n"
        (root / "lost").symlink_to("nowhere")
        assert refused(root, tmp_path) == f"{root / 'lost'} is a link to nothing; restore nowhere, or delete the link"

    def test_empty(self, tmp_path: Path):
        (tmp_path / "texts").mkdir()
        (tmp_path / "texts" / ".hidden").write_text("hidden")
        assert "holds no text file" in refused(tmp_path / "texts", tmp_path)
        (tmp_path / "texts" / "empty.txt").touch()
        assert "is empty" in refused(tmp_path / "texts", tmp_path)

    def test_the_bad_file_is_named(self, tmp_path: Path):
        (tmp_path / "texts").mkdir()
        (tmp_path / "texts" / "a.txt").write_text("fine")
        (tmp_path / "texts" / "b.txt").write_bytes(b"\xff")
        assert f"{tmp_path / 'texts' / 'b.txt'} is not UTF-8" in refused(tmp_path / "texts", tmp_path)

    @pytest.mark.parametrize("within", [os, Path], ids=["walk", "look"])
    def test_a_folder_that_may_not_be_entered_is_not_left_out_in_silence(self, within, tmp_path: Path, monkeypatch):
        closed = tmp_path / "text" / "closed"
        closed.mkdir(parents=True)
        (closed / "b.txt").write_text("b" * 500)
        (tmp_path / "text" / "a.txt").write_text("a" * 500)
        name = "scandir" if within is os else "exists"
        function = getattr(within, name)

        def unable(path, **rest):
            if closed in (Path(path), Path(path).parent):
                raise PermissionError(13, "Permission denied", str(closed))
            return function(path, **rest)

        monkeypatch.setattr(within, name, unable)
        assert f"{closed} cannot be read: Permission denied" in refused(tmp_path / "text", tmp_path)


class TestDownload:
    @pytest.fixture
    def served(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        """A folder behind a web server on this machine, from which tiny Shakespeare is to be fetched."""
        folder = tmp_path / "served"
        folder.mkdir()

        class Handler(http.server.SimpleHTTPRequestHandler):
            def log_message(self, *_):
                pass

        handler = functools.partial(Handler, directory=str(folder))
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        monkeypatch.setenv("no_proxy", "*")
        monkeypatch.setattr(sources, "SHAKESPEARE_URL", f"http://127.0.0.1:{server.server_port}/input.txt")
        yield folder
        server.shutdown()
        server.server_close()

    @pytest.mark.parametrize("quiet", [False, True])
    def test_download(
        self,
        served: Path,
        quiet: bool,
        tmp_path: Path,
        cache: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ):
        (served / "input.txt").write_bytes(TEXT.encode())
        monkeypatch.setattr(sources, "SHAKESPEARE_SHA256", hashlib.sha256(TEXT.encode()).hexdigest())
        assert text_of(prepare("shakespeare", tmp_path, quiet=quiet)) == TEXT
        assert [(p.name, p.read_bytes()) for p in cache.iterdir()] == [("tinyshakespeare.txt", TEXT.encode())]
        out, err = capsys.readouterr()
        assert out == ""
        assert bool(err) is not quiet
        (served / "input.txt").unlink()
        assert text_of(prepare("shakespeare", tmp_path)) == TEXT

    def test_another_text_is_not_kept(self, served: Path, tmp_path: Path, cache: Path):
        (served / "input.txt").write_bytes(b"x" * 3_000_000)
        message = refused("shakespeare", tmp_path)
        assert f"sha256 expected {sources.SHAKESPEARE_SHA256}, got" in message
        assert list(cache.iterdir()) == []

    def test_not_found(self, served: Path, tmp_path: Path):
        assert "cannot be downloaded (HTTP Error 404: " in refused("shakespeare", tmp_path)

    def test_offline_names_the_ways_out(self, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("no_proxy", "*")
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            address = f"http://127.0.0.1:{unused.getsockname()[1]}/input.txt"
            monkeypatch.setattr(sources, "SHAKESPEARE_URL", address)
            message = refused("shakespeare", tmp_path)
        assert "`dataset` shakespeare cannot be downloaded" in message
        for way_out in ("`corpus_file` PATH", str(cache / "tinyshakespeare.txt"), "`dataset` pydocs"):
            assert way_out in message

    def test_a_server_that_never_answers(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("no_proxy", "*")
        monkeypatch.setattr(sources, "TIMEOUT_SECONDS", 0.1)
        with socket.create_server(("127.0.0.1", 0)) as silent:
            address = f"http://127.0.0.1:{silent.getsockname()[1]}/input.txt"
            monkeypatch.setattr(sources, "SHAKESPEARE_URL", address)
            assert "timed out" in refused("shakespeare", tmp_path)


class TestDocuments:
    """Files of documents that are named as one text."""

    def test_json_lines_are_read_as_text_and_this_is_said(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
        path = tmp_path / "a.jsonl"
        path.write_text(content := '{"text": "a"}\n')
        assert "".join(filter(None, sources.text_files(path).texts())) == content
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert err == (
            f"warning: `dataset` {path} is read as plain text, its JSON included; prepare its documents first, by: "
            f"python -m fastgpt.prepare {path}\n"
        )

    def test_parquet_is_refused(self, tmp_path: Path):
        (path := tmp_path / "a.parquet").write_bytes(b"PAR1")
        with pytest.raises(UsageError, match=r"a\.parquet is a Parquet file, no text; prepare its documents first"):
            sources.text_files(path)
