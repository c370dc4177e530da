"""Damaged and hostile GGUF files are refused in one line, and nothing that they claim is followed."""

import itertools
import random
import struct
import tracemalloc
from pathlib import Path

import pytest

from fastgpt.errors import UsageError
from fastgpt.interchange import gguf_file
from fastgpt.tokenizer.base import Tokenizer
from fastgpt.tokenizer.byte import ByteTokenizer
from fastgpt.tokenizer.char import CharTokenizer
from tests.helpers.gguf_files import written

pytest.importorskip("gguf", reason="needs the extra gguf")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


def read_whole(path: Path) -> None:
    found = gguf_file.load(path)
    found.read_tokenizer()
    for _ in found.tensors.values():
        pass


def outcome(path: Path) -> str | None:
    """The one line that refuses a file; None if all of it can be read."""
    said = None
    try:
        read_whole(path)
    except UsageError as error:
        said = str(error)
    assert said is None or (said.startswith(str(path)) and "\n" not in said and len(said) < 500)
    return said


@pytest.fixture(scope="module")
def content(tmp_path_factory) -> bytes:
    """A small file whose header holds numbers, texts, and arrays of both."""
    path = tmp_path_factory.mktemp("good") / "model.gguf"
    written(path, CharTokenizer("abc"), n_layer=1, n_embd=4)
    assert outcome(path) is None
    return path.read_bytes()


def header_size(content: bytes) -> int:
    return content.rindex(b"output_norm.bias") + 32


class TestDamagedFiles:
    def test_a_file_that_is_cut_off_is_refused_wherever(self, content: bytes, path: Path):
        for end in itertools.chain(range(0, header_size(content), 5), range(0, len(content) - 32, 997)):
            path.write_bytes(content[:end])
            assert outcome(path), end

    @pytest.mark.parametrize("claim", [2**64 - 1, 10 * 2**40, 2**32])
    def test_no_claim_in_the_header_is_followed(self, content: bytes, path: Path, claim: int):
        """At each place, so that each count, length, size and offset is among them."""
        refused = 0
        for at in range(4, header_size(content), 1 if claim == 10 * 2**40 else 7):
            path.write_bytes(content[:at] + struct.pack("<Q", claim) + content[at + 8 :])
            refused += outcome(path) is not None
        assert refused > 100

    @pytest.mark.parametrize("kind", [0, 5, 7, 8, 12])
    def test_a_forged_array_takes_no_memory(self, path: Path, kind: int):
        head = b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"a"
        path.write_bytes(head + struct.pack("<IIQ", 9, kind, 10**12) + bytes(1000))
        tracemalloc.start()
        try:
            assert "cut off, or claims more" in str(outcome(path))
            assert tracemalloc.get_traced_memory()[1] < 1 << 20
        finally:
            tracemalloc.stop()

    @pytest.mark.parametrize("tokenizer", [CharTokenizer("abc"), ByteTokenizer(ends=True)], ids=repr)
    def test_flipped_bits_are_refused_or_harmless(self, path: Path, tokenizer: Tokenizer):
        written(path, tokenizer, n_layer=1, n_embd=4)
        content, chance = path.read_bytes(), random.Random(5)
        refused = 0
        for _ in range(400):
            damaged = bytearray(content)
            damaged[chance.randrange(header_size(content))] ^= 1 << chance.randrange(8)
            path.write_bytes(damaged)
            refused += outcome(path) is not None
        assert refused > 100

    @pytest.mark.parametrize(
        ("content", "named"),
        [
            (b"", "does not begin with GGUF"),
            (b"PK\x03\x04", "does not begin with GGUF"),
            (b"GGUF\x01\0\0\0" + bytes(99), "version is 1"),
            (b"GGUF\0\0\0\x03" + bytes(99), "big-endian"),
            (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"a" + struct.pack("<IIQ", 9, 9, 1), "an array of type 9"),
            (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"a" + struct.pack("<I", 13), "a value of type 13"),
            (b"GGUF" + struct.pack("<IQQQ", 3, 1, 0, 1) + b"a" + struct.pack("<I", 9), "9 dimensions"),
            (b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + (struct.pack("<Q", 1) + b"a\0\0\0\0\0") * 2, "twice"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_the_fault_is_named(self, path: Path, content: bytes, named: str):
        path.write_bytes(content)
        assert named in str(outcome(path))

    def test_what_is_no_file_is_refused(self, tmp_path: Path):
        assert "cannot be read" in str(outcome(tmp_path))
        assert "cannot be read" in str(outcome(tmp_path / "missing.gguf"))

    def test_a_file_that_is_replaced_meanwhile_is_noticed(self, content: bytes, path: Path):
        path.write_bytes(content)
        found = gguf_file.load(path)
        path.write_bytes(content + bytes(32))
        with pytest.raises(UsageError, match="replaced while it was read"):
            found.tensors["wte.weight"]
