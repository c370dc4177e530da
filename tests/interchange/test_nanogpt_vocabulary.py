"""Folders that nanoGPT prepared, and a meta.pkl that means harm."""

import io
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from fastgpt.errors import UsageError
from fastgpt.interchange import nanogpt_vocabulary
from fastgpt.system.files import sha256
from fastgpt.tokenizer.char import CharTokenizer
from fastgpt.tokenizer.gpt2 import Gpt2Tokenizer
from tests.helpers.corpora import needs_gpt2, prepare, refused, text_of


class Canary:
    """Unpickling this creates a file: what a meta.pkl must never be able to do."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


class TestNanogptFolders:
    @pytest.fixture
    def foreign(self, tmp_path: Path) -> Path:
        """A folder as nanoGPT's shakespeare_char: uint16 tokens and a pickled vocabulary."""
        folder = tmp_path / "data" / "foreign_char"
        folder.mkdir(parents=True)
        np.array([2, 0, 1, 1], dtype=np.uint16).tofile(folder / "train.bin")
        np.array([0, 2], dtype=np.uint16).tofile(folder / "val.bin")
        itos = {0: "z", 1: "é", 2: "a"}
        meta = {"vocab_size": 3, "itos": itos, "stoi": {char: id for id, char in itos.items()}}
        (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
        return folder

    def test_nanogpt_with_characters(self, foreign: Path, tmp_path: Path):
        for dataset in (str(foreign), "foreign_char"):
            prepared = prepare(dataset, tmp_path)
            assert prepared.tokenizer == CharTokenizer("zéa")
            assert (prepared.name, prepared.dtype) == ("foreign_char", "uint16")
            assert (prepared.train_tokens, prepared.val_tokens, prepared.val_bytes) == (4, 2, None)
            assert prepared.source_sha256 == sha256(foreign / "train.bin", foreign / "val.bin")
            assert text_of(prepared) == "azéé" + "za"

    def test_a_val_split_that_is_older_than_the_train_split_is_named(self, foreign: Path, tmp_path: Path, capsys):
        for age, warned in ((0, False), (30, False), (7200, True)):
            os.utime(foreign / "train.bin", (1e9, 1e9))
            os.utime(foreign / "val.bin", (1e9 - age, 1e9 - age))
            prepare(foreign, tmp_path)
            err = capsys.readouterr().err
            assert (f"warning: {foreign / 'val.bin'} is 2:00:00 older than train.bin; if" in err) is warned
            assert err.count("\n") == warned

    @needs_gpt2
    def test_nanogpt_without_meta_is_gpt2(self, foreign: Path, tmp_path: Path):
        (foreign / "meta.pkl").unlink()
        np.array([15496, 995], dtype=np.uint16).tofile(foreign / "val.bin")
        prepared = prepare(foreign, tmp_path)
        assert prepared.tokenizer == Gpt2Tokenizer.from_files()
        assert prepared.tokenizer.decode(prepared.val()) == "Hello world"

    def test_nanogpt_bad_token_files(self, foreign: Path, tmp_path: Path):
        (foreign / "val.bin").write_bytes(b"abc")
        assert "3 bytes, which is no whole number of uint16 tokens" in refused(foreign, tmp_path)
        (foreign / "val.bin").write_bytes(b"")
        assert "0 bytes" in refused(foreign, tmp_path)
        (foreign / "val.bin").unlink()
        assert "has no val.bin" in refused(foreign, tmp_path)

    def test_a_meta_that_would_run_code_does_not(self, foreign: Path, tmp_path: Path):
        canary = tmp_path / "canary"
        payload = {"vocab_size": 1, "itos": {0: "a"}, "extra": Canary(canary)}
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            data = pickle.dumps(payload, protocol)
            (foreign / "meta.pkl").write_bytes(data)
            assert "which is no plain data" in refused(foreign, tmp_path)
            with pytest.raises(pickle.UnpicklingError, match="no code is loaded"):
                nanogpt_vocabulary._PlainUnpickler(io.BytesIO(data)).load()
            assert not canary.exists()
        pickle.loads(pickle.dumps(payload))
        assert canary.exists()  # the canary does sing where nothing stops it

    @pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
    @pytest.mark.parametrize("size", [1, 65, 300, 1 << 16])
    @pytest.mark.covering_array(1)
    def test_every_protocol_and_size(self, protocol: int, size: int, foreign: Path, tmp_path: Path):
        chars = [chr(code if code < 0xD800 else code + 0x800) for code in range(size)]
        meta = {
            "vocab_size": size,
            "itos": dict(enumerate(chars)),
            "stoi": {c: i for i, c in enumerate(chars)},
        }
        (foreign / "meta.pkl").write_bytes(pickle.dumps(meta, protocol))
        assert nanogpt_vocabulary.vocabulary(foreign / "meta.pkl") == CharTokenizer("".join(chars))

    @pytest.mark.parametrize(
        "data",
        [
            pytest.param(b"Nr\xff\xff\xff\x7f.", id="a memo of 16 GiB"),
            pytest.param(b"\x8e" + (1 << 40).to_bytes(8, "little") + b"abc.", id="bytes of 1 TiB"),
            pytest.param(b"}(" + b")" + b"2\x86" * 60 + b"K\x00u.", id="a key that takes years to hash"),
            pytest.param(b"Pname\n.", id="a persistent id"),
        ],
    )
    def test_a_meta_that_would_exhaust_the_machine(self, data: bytes, foreign: Path, tmp_path: Path):
        (foreign / "meta.pkl").write_bytes(data)
        assert "is not nanoGPT's" in refused(foreign, tmp_path)

    @pytest.mark.parametrize(
        "content",
        [
            [],
            {"vocab_size": 3},
            {"itos": 3},
            {"itos": {}},
            {"itos": {0: "a", 2: "b"}},
            {"itos": {0: "a", 1: "a"}},
            {"itos": {0: "ab"}},
            {"itos": {0: 7}},
            {"itos": {0: "a"}, "vocab_size": 2},
        ],
    )
    def test_a_meta_that_is_no_vocabulary(self, content: object, foreign: Path, tmp_path: Path):
        (foreign / "meta.pkl").write_bytes(pickle.dumps(content))
        assert f"{foreign / 'meta.pkl'} is not nanoGPT's" in refused(foreign, tmp_path)

    @pytest.mark.parametrize("data", [b"", b"\x80", b"garbage", b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f."])
    def test_a_meta_that_is_no_pickle(self, data: bytes, foreign: Path, tmp_path: Path):
        (foreign / "meta.pkl").write_bytes(data)
        assert "is not nanoGPT's" in refused(foreign, tmp_path)

    def test_a_huge_meta_is_not_read(self, foreign: Path, tmp_path: Path):
        os.truncate(foreign / "meta.pkl", nanogpt_vocabulary.LARGEST_META + 1)
        assert "larger than 4 MiB" in refused(foreign, tmp_path)


class TestOfCheckpoint:
    """The vocabulary of nanogpt/out/ckpt.pt; it need not exist itself."""

    CKPT = Path("nanogpt/out/ckpt.pt")

    @pytest.fixture(autouse=True)
    def folders(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "nanogpt" / "out").mkdir(parents=True)
        monkeypatch.chdir(tmp_path)

    @staticmethod
    def put(meta: Path | str, chars: str) -> Path:
        meta = Path(meta)
        meta.parent.mkdir(parents=True, exist_ok=True)
        meta.write_bytes(pickle.dumps({"vocab_size": len(chars), "itos": dict(enumerate(chars))}))
        return meta

    def found(self, size: int = 3, dataset: str | None = "letters"):
        return nanogpt_vocabulary.of_checkpoint(self.CKPT, size, dataset)

    def test_the_nearest_that_fits_is_taken(self):
        places = ["nanogpt/out/meta.pkl", "data/letters/meta.pkl", "nanogpt/data/letters/meta.pkl"]
        for place, chars in zip(places, ("abc", "def", "ghi"), strict=True):
            self.put(place, chars)
        for place, chars in zip(places, ("abc", "def", "ghi"), strict=True):
            assert self.found() == CharTokenizer(chars)
            self.put(place, "12345")
        assert self.found() is None

    def test_an_absolute_name_is_a_folder(self, tmp_path: Path):
        self.put("elsewhere/meta.pkl", "abc")
        assert self.found(dataset=str(tmp_path / "elsewhere")) == CharTokenizer("abc")

    @pytest.mark.parametrize("dataset", ["", ".", "..", "../secret", "a/b", "a\\b", "//host/share", "\\\\host\\share"])
    def test_no_other_path_is_opened(self, dataset: str):
        for place in ("data", "data/a/b", "secret", "nanogpt", "nanogpt/data", "."):
            self.put(Path(place) / "meta.pkl", "abc")
        assert self.found(dataset=dataset) is None

    @pytest.mark.parametrize("dataset", [None, "missing", "x" * 5000, "a\0b", "\ud800"])
    def test_a_name_of_nothing_is_no_vocabulary(self, dataset: str | None):
        assert self.found(dataset=dataset) is None

    @needs_gpt2
    @pytest.mark.parametrize(("size", "gpt2"), [(50_257, True), (50_304, True), (50_256, False), (3, False)])
    def test_a_model_of_gpt2s_size_has_its_vocabulary(self, size: int, gpt2: bool):
        assert self.found(size) == (Gpt2Tokenizer.from_files() if gpt2 else None)

    def test_nothing_in_it_is_run(self, tmp_path: Path):
        meta = self.put("data/letters/meta.pkl", "abc")
        meta.write_bytes(pickle.dumps({"itos": {0: "a"}, "extra": Canary(tmp_path / "canary")}))
        with pytest.raises(
            UsageError, match=r"^data.letters.meta\.pkl is not nanoGPT's .* no plain data; copy the one"
        ):
            self.found()
        assert not (tmp_path / "canary").exists()
