"""Documents end in a token that is trained, generation starts from one, and runs of version 0.1.0 stay as they were."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

import fastgpt
from fastgpt import cli, generate, train, verify
from fastgpt.checkpoint import run_folder
from fastgpt.data.prepared import Corpus
from fastgpt.tokenizer.bpe import BpeTokenizer
from fastgpt.tokenizer.byte import ByteTokenizer
from fastgpt.tokenizer.char import CharTokenizer
from fastgpt.tokenizer.saved import from_json
from fastgpt.tokenizer.saved import load as load_tokenizer
from tests.helpers.corpora import SHAKESPEARE, needs_gpt2, needs_shakespeare, prepare, refused, text_of
from tests.helpers.places import GOLDEN
from tests.helpers.runs import FLAGS, records, resume

BEFORE = GOLDEN / "run-0.1.0"
FILES = {"a.txt": "one two three four\n", "b.txt": "", "c/d.txt": "fünf", "e.txt": "six seven eight nine ten"}
DOCUMENTS = [text for text in FILES.values() if text]
ending = pytest.mark.parametrize("kind", ["byte", pytest.param("gpt2", marks=needs_gpt2), "bpe"])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "texts"
    for name, text in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


def tokens(prepared: Corpus) -> list[int]:
    return [*prepared.train().tolist(), *prepared.val().tolist()]


class TestEnds:
    @ending
    def test_each_file_of_a_folder_ends_in_a_token_that_no_text_spells(self, kind: str, folder: Path, tmp_path: Path):
        prepared = prepare(folder, tmp_path, tokenizer=kind)
        vocabulary = prepared.tokenizer
        end = vocabulary.end_token
        assert end == vocabulary.vocab_size - 1
        assert vocabulary.start_token == end
        assert text_of(prepared) == "".join(text + "<|endoftext|>" for text in DOCUMENTS)
        assert tokens(prepared).count(end) == len(DOCUMENTS)
        assert end not in vocabulary.encode("<|endoftext|>")
        assert (prepared.characters, prepared.bytes) == (len("".join(DOCUMENTS)), len("".join(DOCUMENTS).encode()))
        assert prepare(folder, tmp_path, tokenizer=kind) == prepared
        assert prepare(prepared.path, tmp_path) == prepared

    def test_characters_stay_those_of_the_text(self, folder: Path, tmp_path: Path):
        prepared = prepare(folder, tmp_path)
        text = "one two three four\nfünf\nsix seven eight nine ten"
        assert text_of(prepared) == text
        assert prepared.tokenizer.chars == "".join(sorted(set(text)))
        assert (prepared.tokenizer.end_token, prepared.tokenizer.opening) == (None, "o")

    def test_bytes_of_documents_have_a_257th_token(self, folder: Path, tmp_path: Path):
        assert prepare(folder, tmp_path, tokenizer="byte", vocab_size=257).tokenizer == ByteTokenizer(ends=True)
        assert "leave it out" in refused(folder, tmp_path, tokenizer="byte", vocab_size=256)
        (folder / "alone").mkdir()
        (folder / "alone" / "a.txt").write_text("a single file in a folder")
        assert prepare(folder / "alone", tmp_path, tokenizer="byte").tokenizer == ByteTokenizer()
        assert "leave it out" in refused(folder / "alone", tmp_path, tokenizer="byte", vocab_size=257)

    def test_the_end_counts_in_the_size_of_a_bpe(self, tmp_path: Path):
        learned = BpeTokenizer.train(["ab ab ab abab " * 50], 258, ends=True)
        assert (learned.vocab_size, learned.end_token, learned.token_bytes(257)) == (258, 257, b"<|endoftext|>")
        assert len(learned.encode("ab")) == 1
        assert BpeTokenizer.train(["ab ab"], 257, ends=True).vocab_size == 257

    def test_a_document_that_the_split_cuts_ends_only_in_the_second_part(self, tmp_path: Path):
        (tmp_path / "texts").mkdir()
        for name, text in {"a": "a" * 95, "b": "b" * 5}.items():
            (tmp_path / "texts" / name).write_text(text)
        prepared = prepare(tmp_path / "texts", tmp_path, tokenizer="byte")
        assert prepared.train().tolist() == [97] * 90
        assert prepared.val().tolist() == [*[97] * 5, 256, *[98] * 5, 256]
        assert prepared.tokenizer.start_token == 97  # the end is in no text that is trained on

    def test_a_document_that_ends_where_the_split_is_ends_in_the_first_part(self, tmp_path: Path):
        (tmp_path / "texts").mkdir()
        for name, text in {"a": "a" * 90, "b": "b" * 10}.items():
            (tmp_path / "texts" / name).write_text(text)
        prepared = prepare(tmp_path / "texts", tmp_path, tokenizer="byte")
        assert prepared.train().tolist() == [*[97] * 90, 256]
        assert prepared.val().tolist() == [*[98] * 10, 256]

    def test_moving_text_from_one_document_to_another_is_another_corpus(self, tmp_path: Path):
        (tmp_path / "texts").mkdir()
        found = []
        for first, second in (("ab\ncd\n", "ef"), ("ab\n", "cd\nef")):
            (tmp_path / "texts" / "1").write_text(first)
            (tmp_path / "texts" / "2").write_text(second)
            found.append(prepare(tmp_path / "texts", tmp_path, tokenizer="byte"))
        assert found[0].path != found[1].path


class TestStart:
    @needs_shakespeare
    def test_a_single_file_stays_as_it_is_and_starts_from_its_first_token(self, tmp_path: Path):
        for kind, size in (("char", 65), ("byte", 256)):
            prepared = prepare("shakespeare", tmp_path, tokenizer=kind, corpus_file=str(SHAKESPEARE))
            assert prepared.path.name == f"shakespeare-{kind}-86c4e6aa"
            assert (prepared.tokenizer.vocab_size, prepared.tokenizer.end_token) == (size, None)
            assert prepared.tokenizer.opening == "F"
            assert "start" not in json.loads((prepared.path / "meta.json").read_text())["tokenizer"]

    @needs_gpt2
    def test_a_single_file_in_gpt2s_tokens_starts_from_its_first_token(self, tmp_path: Path):
        (tmp_path / "x.txt").write_text("Once upon a time, " * 20)
        prepared = prepare(tmp_path / "x.txt", tmp_path, tokenizer="gpt2")
        assert (prepared.tokenizer.end_token, prepared.tokenizer.opening) == (50256, "Once")

    def test_the_start_is_saved_with_the_vocabulary_and_is_no_part_of_its_equality(self, tmp_path: Path):
        chars = CharTokenizer("ab\n")
        assert "start" not in chars.to_json()
        started = chars.starting_from(1)
        assert (chars.start_token, started.start_token, started.opening) == (2, 1, "b")
        started.save(tmp_path / "t.json")
        again = load_tokenizer(tmp_path / "t.json")
        assert (again.start_token, again.sha256()) == (1, started.sha256())
        assert again == chars
        assert again.sha256() != chars.sha256()
        assert from_json(ByteTokenizer(ends=True).starting_from(256).to_json()).opening == ""
        assert ByteTokenizer().starting_from(0xC3).opening == ""  # the first byte of a longer character

    @pytest.mark.parametrize("start", [-1, 3, "a", 1.0, True, None])
    def test_a_start_outside_the_vocabulary_is_refused(self, start):
        with pytest.raises(fastgpt.UsageError, match="not a char tokenizer: its start"):
            from_json({"kind": "char", "chars": "abc", "start": start})

    def test_an_end_that_is_no_switch_is_refused(self):
        with pytest.raises(fastgpt.UsageError, match="not a byte tokenizer: end_of_text 1 "):
            from_json({"kind": "byte", "end_of_text": 1})


class TestRuns:
    def test_an_empty_prompt_starts_from_what_was_trained_and_shows_it(self, workplace: Path, capsys):
        assert cli.run(train.main, FLAGS) == 0
        text = Path("text.txt").read_text(encoding="utf-8")
        saved = load_tokenizer("out/tokenizer.json")
        assert saved.opening == text[0]
        capsys.readouterr()
        flags = ["--max_new_tokens", "5", "--temperature", "0"]
        assert cli.run(generate.main, flags) == 0
        assert cli.run(generate.main, [*flags, "--prompt", text[0]]) == 0
        shown = capsys.readouterr().out
        assert shown[: len(shown) // 2] == shown[len(shown) // 2 :]
        assert shown.startswith(text[0])
        assert verify.main([]) == 0
        assert resume("--max_iters 7") == 0

    def test_samples_begin_with_words_of_the_text(self, workplace: Path, capsys):
        Path("text.txt").write_text("the first line\nand a second line\n" * 100)
        assert cli.run(train.main, [*FLAGS, "--sample_interval", "3"]) == 0
        out = capsys.readouterr().out
        assert "--- sample at step 3\n" in out
        assert out.count("--- sample") == 2
        for part in out.split("--- sample")[1:]:
            assert part.split("\n")[1].startswith(("the first line", "and a second"))

    def test_a_folder_of_bytes_is_trained_resumed_and_generated_from(self, folder: Path, workplace: Path):
        for i in range(8):
            (folder / f"{i}.txt").write_text(f"document {i} says something about {i}\n" * 4)
        assert cli.run(train.main, [*FLAGS, "--dataset", str(folder), "--tokenizer", "byte"]) == 0
        saved = load_tokenizer("out/tokenizer.json")
        assert (saved.vocab_size, saved.start_token) == (257, 256)
        assert resume("--max_iters 7") == 0
        assert verify.main([]) == 0
        assert fastgpt.load("out", device="cpu").generate("", max_new_tokens=3, temperature=0)

    def test_the_run_of_version_0_1_0_goes_on_as_before(self, workplace: Path):
        """Its files hold a byte order mark, end in a newline at most, and lie beside a linked folder."""
        shutil.copytree(BEFORE / "texts", "texts")
        shutil.copytree(BEFORE / "run", "out")
        shutil.copytree(BEFORE / "texts-byte-f3c3787d", "data/texts-byte-f3c3787d")
        Path("elsewhere").mkdir()
        Path("elsewhere/c.txt").write_text("never read before")
        Path("texts/linked").symlink_to("../elsewhere")
        assert verify.main([]) == 0
        assert fastgpt.load("out", device="cpu").generate("", temperature=0, max_new_tokens=20) == " " * 20
        assert load_tokenizer("out/tokenizer.json").start_token == ord("\n")
        assert resume("--max_iters 6") == 0
        losses = records(Path("out"))
        assert [losses[step] for step in (4, 5, 6)] == pytest.approx([5.431706, 5.363682, 5.322502], abs=1e-4)
        assert json.loads(Path("out/tokenizer.json").read_text()) == {"kind": "byte"}
        assert run_folder.reading(run_folder.load(Path("out"))[1]) == 1
        assert [path.name for path in Path("data").iterdir()] == ["texts-byte-f3c3787d"]
        assert resume("--max_iters 7") == 0

    @pytest.mark.parametrize("reading", [0, 3, "2", None])
    def test_rules_of_another_version_are_refused(self, reading):
        with pytest.raises(fastgpt.UsageError, match=r"fastgpt 9\.9 wrote"):
            run_folder.reading({"fastgpt": "9.9", "corpus": {"reading": reading}})


class TestOpening:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("cut\n\n  \nThe first whole line.\nnext", "The first whole "),
            ("no line begins here at all", "no line begins h"),
            ("cut\n", "cut\n"),
            ("a\n가나다라마바사", "가나다라마"),
        ],
    )
    def test_words_of_the_val_split(self, text: str, expected: str, tmp_path: Path):
        (tmp_path / "x.txt").write_text("x" * 9 * len(text) + text, encoding="utf-8")
        prepared = prepare(tmp_path / "x.txt", tmp_path, tokenizer="byte")
        assert prepared.tokenizer.decode(prepared.val()) == text
        assert prepared.opening() == expected

    def test_it_ends_with_its_document(self, tmp_path: Path):
        (tmp_path / "texts").mkdir()
        for name, text in {"a": "x" * 300, "b": "short", "c": "and more text"}.items():
            (tmp_path / "texts" / name).write_text(text)
        assert prepare(tmp_path / "texts", tmp_path, tokenizer="byte").opening() == "short"

    def test_nanogpts_folders_have_one_too(self, tmp_path: Path):
        (tmp_path / "openwebtext").mkdir()
        ids = np.array([0, 1, 2, 1], dtype=np.uint16)
        for file in ("train.bin", "val.bin"):
            ids.tofile(tmp_path / "openwebtext" / file)
        meta = pickle.dumps({"vocab_size": 3, "itos": {0: "c", 1: "\n", 2: "b"}})
        (tmp_path / "openwebtext" / "meta.pkl").write_bytes(meta)
        prepared = prepare(tmp_path / "openwebtext", tmp_path)
        assert (prepared.opening(), prepared.tokenizer.opening) == ("b\n", "c")
