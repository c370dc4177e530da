"""llama.cpp makes of our GGUF files what our model makes of its weights, and reads texts with our vocabularies."""

import importlib.util
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastgpt.config.model import ModelConfig
from fastgpt.conversion.llama_cpp import LlamaCpp
from fastgpt.errors import RunFailed, UsageError
from fastgpt.interchange import gguf_export
from fastgpt.interchange.exported import ExportedModel
from fastgpt.model.gpt import GPT
from fastgpt.tokenizer.base import Tokenizer
from fastgpt.tokenizer.bpe import BpeTokenizer
from fastgpt.tokenizer.byte import ByteTokenizer
from fastgpt.tokenizer.char import CharTokenizer
from fastgpt.tokenizer.gpt2 import Gpt2Tokenizer
from tests.helpers.corpora import TEXT, needs_gpt2

pytest.importorskip("gguf", reason="needs the extra gguf")
HERE = importlib.util.find_spec("xllamacpp") is not None
needs_llama_cpp = pytest.mark.skipif(not HERE, reason="needs xllamacpp: pip install 'fastgpt-engine[peers]'")
BLOCK = 256
NEAR_TIE = 1e-2  # llama.cpp's GELU is a table of float16: logits differ in the third digit behind the point
LINES = Path(__file__).read_text(encoding="utf-8")
SPOKEN = "I'll go — café, 42 times!\n\n\tNo  more;<|endoftext|> 안녕 'twas\r\n   \0end  "


def model_of(tokenizer: Tokenizer, block_size: int = BLOCK, **settings) -> GPT:
    """An untrained model with weights so large that each next token depends on those before it."""
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 64} | settings
    torch.manual_seed(4)
    model = GPT(ModelConfig(vocab_size=tokenizer.vocab_size, block_size=block_size, **sizes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(6.0 if ".c_" in name else 4.0)
            if name.endswith("bias"):
                parameter.normal_(0.0, 0.3)
    return model


def trained() -> GPT:
    """A model of bytes after a few steps, whose next tokens are as unequal as those of a trained one."""
    torch.manual_seed(1)
    model = GPT(ModelConfig(vocab_size=256, block_size=BLOCK, n_layer=2, n_head=2, n_embd=64))
    text, optimizer = torch.tensor(ByteTokenizer().encode(LINES)), torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        starts = torch.randint(len(text) - 65, (8, 1))
        batch = text[starts + torch.arange(65)]  # (8, 65)
        model(batch[:, :-1], batch[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def written(path: Path, model: GPT, tokenizer: Tokenizer, dtype: str = "float32") -> Path:
    gguf_export.write(ExportedModel(model.config, tokenizer, model.weights()), path, dtype)
    return path


def logits(model: GPT, tokens: list[int]) -> torch.Tensor:
    """Of each next token, (T, V)."""
    with torch.no_grad():
        return model(torch.tensor([tokens]))[0]


def perplexity(model: GPT, tokens: list[int]) -> float:
    loss = torch.nn.functional.cross_entropy(logits(model, tokens)[:-1], torch.tensor(tokens[1:]))
    return math.exp(loss)


def drawn(vocab_size: int, count: int, seed: int = 1) -> list[int]:
    return torch.randint(vocab_size, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("gguf")


@pytest.mark.peers
@needs_llama_cpp
class TestModel:
    @pytest.fixture(scope="class")
    @staticmethod
    def model() -> GPT:
        return model_of(ByteTokenizer())

    @pytest.fixture(scope="class")
    @staticmethod
    def judge(folder: Path, model: GPT) -> Iterator[LlamaCpp]:
        with LlamaCpp(written(folder / "bytes.gguf", model, ByteTokenizer()), BLOCK, 1) as judge:
            yield judge

    def test_it_continues_prompts_as_we_do(self, model: GPT, judge: LlamaCpp):
        """The same 64 tokens, or the same ones up to a place where two are nearly as likely."""
        compared = 0
        for seed in range(5):
            prompt = drawn(256, 3 + 5 * seed, seed)
            choices = judge.greedy(prompt, 64)
            theirs = [choice.token for choice in choices]
            best, tokens = logits(model, prompt + theirs).topk(2)
            best, tokens = best[len(prompt) - 1 : -1], tokens[len(prompt) - 1 : -1, 0]  # (64, 2), (64,)
            margins = best[:, 0] - best[:, 1]
            differ = (tokens != torch.tensor(theirs)).nonzero().flatten().tolist()
            assert all(margins[i] < NEAR_TIE for i in differ)
            same = len(theirs) if not differ else differ[0]
            assert torch.allclose(torch.tensor([c.margin for c in choices])[:same], margins[:same], atol=NEAR_TIE)
            compared += same
            assert len(set(theirs)) > 5
        assert compared > 200

    def test_its_perplexity_is_ours(self, model: GPT, judge: LlamaCpp):
        """Also of bytes that are parts of characters, of which the server says nothing by themselves."""
        tokens = drawn(256, 256)
        assert judge.perplexity(tokens) == pytest.approx(perplexity(model, tokens), rel=1e-3)

    def test_what_does_not_fit_is_an_error(self, judge: LlamaCpp):
        with pytest.raises(ValueError, match="257 tokens do not fit"):
            judge.perplexity([1] * 257)
        with pytest.raises(ValueError, match="257 tokens do not fit"):
            judge.greedy([1] * 200, 57)
        with pytest.raises(RunFailed, match=r"llama\.cpp refuses"):
            judge.greedy([300], 1)

    @pytest.mark.parametrize(
        "settings",
        [
            {"n_inner": 96, "norm_eps": 1e-2},
            {"n_head": 4, "n_layer": 3, "block_size": 40},
            {"bias": False, "tie": False},
        ],
        ids=str,
    )
    def test_every_setting_reaches_it(self, folder: Path, settings: dict):
        model = model_of(ByteTokenizer(), **settings)
        tokens = drawn(128, 40)
        with LlamaCpp(written(folder / "settings.gguf", model, ByteTokenizer()), model.config.block_size, 1) as judge:
            assert judge.perplexity(tokens) == pytest.approx(perplexity(model, tokens), rel=1e-3)


@pytest.mark.peers
@needs_llama_cpp
class TestTrainedModel:
    @pytest.fixture(scope="class")
    @staticmethod
    def model() -> GPT:
        return trained()

    @pytest.mark.parametrize(
        ("dtype", "tolerance"), [("float32", 1e-3), ("float16", 1e-3), ("bfloat16", 1e-2), ("q8_0", 1e-2)]
    )
    def test_its_perplexity_is_ours(self, tmp_path: Path, model: GPT, dtype: str, tolerance: float):
        tokens = ByteTokenizer().encode(LINES[4000:4300]).tolist()[:256]
        wanted = perplexity(model, tokens)
        assert 2 < wanted < 40
        with LlamaCpp(written(tmp_path / "model.gguf", model, ByteTokenizer(), dtype), BLOCK, 1) as judge:
            found = judge.perplexity(tokens)
        assert found == pytest.approx(wanted, rel=tolerance)


TOKENIZERS = {
    "byte": ByteTokenizer,
    "byte with an end": lambda: ByteTokenizer(ends=True),
    "char": lambda: CharTokenizer("".join(sorted(set(SPOKEN)))),
    "bpe": lambda: BpeTokenizer.train([TEXT, SPOKEN], 300),
    "bpe with an end": lambda: BpeTokenizer.train([TEXT, SPOKEN], 300, ends=True),
    "gpt2": Gpt2Tokenizer.from_files,
}


@pytest.mark.peers
@needs_llama_cpp
@pytest.mark.parametrize(
    "kind", [*TOKENIZERS][:3] + [pytest.param(name, marks=needs_gpt2) for name in [*TOKENIZERS][3:]]
)
def test_it_reads_texts_with_our_vocabulary(tmp_path: Path, kind: str):
    tokenizer = TOKENIZERS[kind]()
    model = model_of(tokenizer, n_layer=1, block_size=8)
    with LlamaCpp(written(tmp_path / "model.gguf", model, tokenizer), 8, 1) as judge:
        for text in (SPOKEN, SPOKEN[::-1], " ", "\n"):
            assert judge.tokenize(text) == tokenizer.encode(text).tolist()
        choices = judge.greedy([1, 2], 5)  # past what it takes for the end of a text
        assert len(choices) == 5


@pytest.mark.peers
@needs_llama_cpp
def test_a_file_that_it_cannot_load_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + b"\xff" * 100)
    with pytest.raises(RunFailed, match=r"llama\.cpp cannot load .*bad\.gguf: .*version"):
        LlamaCpp(tmp_path / "bad.gguf", 8, 1)
    assert capfd.readouterr() == ("", "")


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install xllamacpp"):
        LlamaCpp(Path("model.gguf"), 8, 1)
