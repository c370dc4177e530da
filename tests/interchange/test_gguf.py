"""GGUF files: ours come back as they were, and other programs' are read, or refused by name."""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastgpt.config.model import ModelConfig
from fastgpt.errors import UsageError
from fastgpt.interchange import gguf_export, gguf_file, gguf_header
from fastgpt.interchange.byte_level import BYTES, library_description
from fastgpt.interchange.exported import ExportedModel
from fastgpt.interchange.gguf_layout import gguf_name, our_name
from fastgpt.interchange.gguf_tokenizer import NO_MERGES
from fastgpt.tokenizer.base import Tokenizer
from fastgpt.tokenizer.bpe import BpeTokenizer
from fastgpt.tokenizer.byte import ByteTokenizer
from fastgpt.tokenizer.char import CharTokenizer
from fastgpt.tokenizer.gpt2 import Gpt2Tokenizer
from tests.helpers.corpora import TEXT, needs_gpt2
from tests.helpers.gguf_files import model_of, written

gguf = pytest.importorskip("gguf", reason="needs the extra gguf")
quants = pytest.importorskip("gguf.quants", reason="needs the extra gguf")

Type = gguf.GGMLQuantizationType
MATRICES = {"float32": Type.F32, "float16": Type.F16, "bfloat16": Type.BF16, "q8_0": Type.Q8_0}
UNREADABLE = {"I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K"}
NAMES = [kind.name for kind in Type if kind.name not in UNREADABLE]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


class TestRoundTrip:
    @pytest.mark.parametrize("settings", [{}, {"n_inner": 96, "norm_eps": 1e-6}, {"n_layer": 11, "n_head": 1}], ids=str)
    def test_float32_keeps_every_bit_and_the_shape(self, path: Path, settings: dict):
        model = written(path, ByteTokenizer(), **settings)
        found = gguf_file.load(path)
        assert found.shape == model.config
        assert found.tensors.keys() == model.tensors.keys()
        for name, tensor in model.tensors.items():
            assert found.tensors.shapes[name] == tuple(tensor.shape)
            assert torch.equal(found.tensors[name].view(torch.int32), tensor.view(torch.int32)), name

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "q8_0"])
    def test_other_types_hold_what_the_library_makes_of_the_matrices(self, path: Path, dtype: str):
        model = written(path, ByteTokenizer(), dtype)
        found = gguf_file.load(path)
        for name, tensor in model.tensors.items():
            kept = Type.F32 if tensor.dim() == 1 or name == "wpe.weight" else MATRICES[dtype]
            wanted = quants.dequantize(quants.quantize(tensor.numpy(), kept), kept)
            assert np.array_equal(found.tensors[name].float().numpy(), wanted.reshape(tensor.shape)), name
        matrix = found.tensors["wte.weight"]
        assert matrix.dtype == (torch.float32 if dtype == "q8_0" else getattr(torch, dtype))
        assert torch.equal(matrix.float(), model.tensors["wte.weight"]) is False

    def test_a_model_without_biases_gets_zeros(self, path: Path):
        model = written(path, ByteTokenizer(), bias=False)
        found = gguf_file.load(path)
        assert found.shape.bias
        added = found.tensors.keys() - model.tensors.keys()
        assert len(added) == 2 * 6 + 1
        assert not any(found.tensors[name].any() for name in added)

    def test_the_file_describes_the_model(self, path: Path):
        model = model_of(ByteTokenizer())
        named = ExportedModel(model.config, model.tokenizer, model.tensors, "small", {"steps": "500"})
        gguf_export.write(named, path, "q8_0")
        fields = gguf.GGUFReader(path).fields
        said = {name: fields[f"general.{name}"].contents() for name in ("architecture", "name", "file_type")}
        assert said == {"architecture": "gpt2", "name": "small", "file_type": gguf.LlamaFileType.MOSTLY_Q8_0}
        assert '"steps": "500"' in fields["general.description"].contents()

    def test_the_library_reads_our_tensors(self, path: Path):
        model = written(path, ByteTokenizer())
        tensors = {our_name(tensor.name): tensor.data for tensor in gguf.GGUFReader(path).tensors}
        assert tensors.keys() == model.tensors.keys()
        assert all(np.array_equal(tensors[name], tensor.numpy()) for name, tensor in model.tensors.items())


def trained(ends: bool = False) -> Tokenizer:
    return BpeTokenizer.train([TEXT], 300, ends)


def special() -> Tokenizer:
    """A BPE with special tokens in the midst, of which one ends a document."""
    vocab = {token: id for id, token in enumerate([*BYTES, "ab"])}
    vocab = {token: id + (id >= 100) for token, id in vocab.items()}
    names = {"<|pad|>": 100, "<|stop|>": 258}
    return BpeTokenizer(library_description(vocab, [("a", "b")]), special=names, end=258)


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "byte": ByteTokenizer,
    "byte with an end": lambda: ByteTokenizer(ends=True),
    "char": lambda: CharTokenizer("\n !abcdefghijklmn~"),
    "char of any kind": lambda: CharTokenizer("\0\t\n\r \\'\"xn0é안👩\u2028\x80"),
    "char, few": lambda: CharTokenizer("ba"),
    "bpe": trained,
    "bpe with an end": lambda: trained(ends=True),
    "bpe of bytes alone": lambda: BpeTokenizer.train(["ab"], 257),
    "bpe with special tokens": special,
}
KINDS = [*TOKENIZERS]


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> Path:
    """A file with GPT-2's vocabulary."""
    path = tmp_path_factory.mktemp("gpt2") / "model.gguf"
    written(path, Gpt2Tokenizer.from_files(), n_layer=1)
    return path


class TestVocabulary:
    @pytest.mark.parametrize("kind", KINDS)
    def test_it_comes_back(self, path: Path, kind: str):
        tokenizer = TOKENIZERS[kind]()
        written(path, tokenizer, n_layer=1)
        found = gguf_file.load(path).read_tokenizer()
        assert type(found) is type(tokenizer)
        assert found == tokenizer
        assert found is not None
        assert (found.end_token, found.start_token) == (tokenizer.end_token, tokenizer.start_token)
        assert found.to_json() == tokenizer.to_json()

    @needs_gpt2
    def test_gpt2s_comes_back(self, gpt2: Path):
        found, tokenizer = gguf_file.load(gpt2).read_tokenizer(), Gpt2Tokenizer.from_files()
        assert isinstance(found, Gpt2Tokenizer)
        assert found.to_json() == tokenizer.to_json()

    @pytest.mark.parametrize("kind", ["byte", "char", "char, few"])
    def test_so_does_the_token_that_generation_starts_from(self, path: Path, kind: str):
        written(path, TOKENIZERS[kind]().starting_from(1))
        found = gguf_file.load(path).read_tokenizer()
        assert found is not None
        assert found.start_token == 1

    def test_a_vocabulary_without_an_end_names_the_byte_that_no_text_holds(self, path: Path):
        """llama.cpp would take token 11 for the end."""
        for tokenizer, end in ((ByteTokenizer(), 255), (ByteTokenizer(ends=True), 256)):
            written(path, tokenizer)
            assert gguf.GGUFReader(path).fields["tokenizer.ggml.eos_token_id"].contents() == end

    def test_a_file_without_one_has_none(self, path: Path):
        raw(path, tokenizer=())
        assert gguf_file.load(path).read_tokenizer() is None

    @pytest.mark.parametrize(
        ("changes", "named"),
        [
            ({"model": "llama"}, "its model is 'llama'"),
            ({"pre": "llama-bpe"}, "parted as by 'llama-bpe'"),
            ({"tokens": ["a", "b", "a"]}, "twice"),
            ({"tokens": [1, 2, 3]}, "no texts"),
            ({"tokens": ["a", "b", "→"]}, "no spelling of bytes"),
            ({"tokens": ["a", "b", "c"], "merges": ["a  b"]}, "too many values"),
            ({"tokens": ["a", "b", "c"], "merges": ["ab"]}, "not enough values"),
            ({"tokens": ["a", "b", "c"], "token_type": [1]}, "3 tokens, and types of 1"),
            ({"token_type": [1.0, float("inf"), 1.0]}, "infinity"),
            ({"model": "rwkv", "tokens": ["a", "bc", "d"]}, "only single characters"),
            ({"model": "rwkv", "tokens": ["a", r"\xff", "d"]}, "utf-8"),
        ],
        ids=str,
    )
    def test_others_are_refused_by_name(self, path: Path, changes: dict[str, Any], named: str):
        vocabulary = {"model": "gpt2", "tokens": ["a", "b", "c"]} | changes
        raw(path, tokenizer=vocabulary)
        found = gguf_file.load(path)
        with pytest.raises(UsageError, match=named) as error:
            found.read_tokenizer()
        assert str(error.value).startswith(f"{path}: ")
        assert "\n" not in str(error.value)

    @needs_gpt2
    def test_an_old_converters_gpt2_is_gpt2(self, path: Path, gpt2: Path):
        """Without the types of tokens and the way in which a text is cut."""
        header = gguf_header.read(gpt2)
        kept = {name: header.arrays[f"tokenizer.ggml.{name}"] for name in ("tokens", "merges")}
        raw(path, tokenizer=kept | {"model": "gpt2", "bos_token_id": 50256, "eos_token_id": 50256})
        found = gguf_file.load(path).read_tokenizer()
        assert isinstance(found, Gpt2Tokenizer)
        assert found == Gpt2Tokenizer.from_files()

    def test_all_but_normal_tokens_are_special(self, path: Path):
        types = [gguf.TokenType.USER_DEFINED, gguf.TokenType.CONTROL, gguf.TokenType.UNUSED]
        names = ["<|user|>", "<|stop|>", "[PAD258]"]
        vocabulary = {"tokens": [*BYTES, *names], "token_type": [*[1] * 256, *types], "merges": [" ".join(NO_MERGES)]}
        raw(path, tokenizer={"model": "gpt2", "pre": "gpt-2", "eos_token_id": 257} | vocabulary)
        found = gguf_file.load(path).read_tokenizer()
        assert isinstance(found, BpeTokenizer)
        assert found.special_tokens == {name: 256 + i for i, name in enumerate(names)}
        assert found.end_token == 257
        assert found.encode("<|user|>").tolist() == list(b"<|user|>")

    def test_short_escapes_of_other_programs_are_read(self, path: Path):
        raw(path, tokenizer={"model": "rwkv", "tokens": [r"\n", r"\\", "é", r"\xc3\xa8", "a"]})
        found = gguf_file.load(path).read_tokenizer()
        assert found == CharTokenizer("\n\\éèa")


class TestLimits:
    @pytest.mark.parametrize(
        ("settings", "named"),
        [
            ({"n_head": 2, "n_kv_head": 1}, "grouped queries (`n_kv_head` 1)"),
            ({"position": "rotary"}, "rotary positions"),
            ({"mlp": "relu"}, "ReLU (`mlp` relu)"),
            ({"mlp": "relu2"}, "ReLU (`mlp` relu2)"),
            ({"norm": "rmsnorm"}, "RMS norms (`norm` rmsnorm)"),
            ({"mlp": "swiglu"}, "a gated MLP (`mlp` swiglu)"),
            ({"qk_norm": True}, "norms of queries and keys (`qk_norm`)"),
            ({"head_size": 8}, "heads of another width than `n_embd` / `n_head` (`head_size` 8)"),
            ({"logit_softcap": 15.0}, "bounded logits (`logit_softcap` 15.0)"),
        ],
        ids=str,
    )
    def test_what_it_cannot_hold_is_named(self, path: Path, settings: dict, named: str):
        model = model_of(ByteTokenizer(), **settings)
        assert named in str(gguf_export.limit(model.config, model.tokenizer))
        with pytest.raises(UsageError, match=r"cannot hold") as error:
            gguf_export.write(model, path, "float32")
        assert named in str(error.value)
        assert not path.exists()

    @pytest.mark.parametrize(
        "settings",
        [{}, {"position": "none"}, {"position": "sinusoidal"}, {"mlp": "gelu_exact"}, {"tie": False, "head_size": 16}],
    )
    def test_what_it_can_hold_is_not(self, settings: dict):
        config = ModelConfig(vocab_size=256, n_embd=32, n_head=2, **settings)
        assert gguf_export.limit(config, ByteTokenizer()) is None

    def test_two_tokens_of_one_spelling_are_named(self):
        vocab = {token: id for id, token in enumerate(BYTES)}
        tokenizer = BpeTokenizer(library_description(vocab, []), special={"Ġ": 256}, end=256)
        assert "such as 'Ġ'" in str(gguf_export.limit(ModelConfig(n_embd=32, n_head=2), tokenizer))

    @pytest.mark.parametrize(("name", "sizes"), [("n_embd", {"n_embd": 36}), ("n_inner", {"n_inner": 40})])
    def test_q8_0_names_a_size_that_it_cannot_hold(self, path: Path, name: str, sizes: dict):
        with pytest.raises(UsageError, match=rf"`dtype` q8_0 .* 32 .*`{name}` is {sizes[name]}"):
            written(path, ByteTokenizer(), "q8_0", **sizes)
        assert not path.exists()

    def test_float16_names_a_weight_that_it_cannot_hold(self, path: Path):
        model = model_of(ByteTokenizer())
        model.tensors["h.1.attn.c_attn.weight"][3, 4] = 1e6
        with pytest.raises(UsageError, match=r"`dtype` float16 cannot hold h\.1\.attn\.c_attn\.weight.* 1e\+06"):
            gguf_export.write(model, path, "float16")

    def test_a_missing_library_is_named(self, path: Path, monkeypatch: pytest.MonkeyPatch):
        model = written(path, ByteTokenizer())
        monkeypatch.setitem(sys.modules, "gguf", None)
        for use in (lambda: gguf_file.load(path), lambda: gguf_export.write(model, path, "float32")):
            with pytest.raises(UsageError, match=r"pip install 'fastgpt-engine\[gguf\]'"):
                use()


SIZES = {"context_length": 8, "block_count": 1, "attention.head_count": 2, "embedding_length": 4}
SIZES |= {"feed_forward_length": 16}
EMBEDDING = "token_embd.weight"


def raw(
    path: Path,
    tensors: Mapping[str, tuple[np.ndarray, Any]] | None = None,
    tokenizer: Mapping[str, Any] | tuple = (),
    settings: Mapping[str, Any] | None = None,
    architecture: str = "gpt2",
) -> None:
    """A file with any tensors and values."""
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in (SIZES | dict(settings or {})).items():
        writer.add_uint32(f"gpt2.{name}", value)
    writer.add_float32("gpt2.attention.layer_norm_epsilon", 1e-5)
    for name, value in dict(tokenizer).items():
        add = {str: writer.add_string, int: writer.add_uint32}.get(type(value), writer.add_array)
        add(f"tokenizer.ggml.{name}", value)
    for name, (array, kind) in (tensors or {EMBEDDING: (np.ones((3, 4), np.float32), Type.F32)}).items():
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class TestOtherPrograms:
    @pytest.mark.parametrize("name", NAMES)
    def test_every_type_that_the_library_dequantizes_is_read(self, path: Path, name: str):
        kind = Type[name]
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        try:
            rows = quants.quantize(np.random.default_rng(1).standard_normal((3, 2 * block)).astype(np.float32), kind)
        except NotImplementedError:  # any bytes are blocks; those below 0x70 hold no infinite scale
            rows = np.random.default_rng(1).integers(0x70, size=(3, 2 * block_bytes), dtype=np.uint8)
        raw(path, {EMBEDDING: (rows, kind)})
        try:
            wanted = quants.dequantize(rows, kind)
        except NotImplementedError:  # a type that this version of the library cannot read either
            with pytest.raises(UsageError, match=f"of type {kind.value}"):
                gguf_file.load(path)
            return
        found = gguf_file.load(path).tensors["wte.weight"]
        assert found.shape == (3, 2 * block)
        assert np.array_equal(found.float().numpy(), wanted)
        assert found.any()

    @pytest.mark.parametrize("name", sorted(UNREADABLE))
    def test_a_type_that_it_cannot_dequantize_is_named(self, path: Path, name: str):
        kind = Type[name]
        rows = np.zeros((3, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8)
        raw(path, {EMBEDDING: (rows, kind)})
        with pytest.raises(UsageError, match=f"of type {kind.value}, which the installed gguf cannot read"):
            gguf_file.load(path)

    def test_names_are_mapped_and_unknown_ones_stay(self):
        for name in model_of(ByteTokenizer()).tensors:
            assert our_name(gguf_name(name)) == name
        assert our_name("blk.11.attn_qkv.bias") == "h.11.attn.c_attn.bias"
        for name in ("blk.0.attn_gate.weight", "rope_freqs.weight", "blk.weight"):
            assert our_name(name) == name

    @pytest.mark.parametrize("kind", [Type.F32, Type.F16])
    def test_an_output_layer_that_is_the_embedding_is_dropped(self, path: Path, kind: Any):
        rows = np.arange(12, dtype=np.float32).reshape(3, 4)
        raw(path, {EMBEDDING: (rows, Type.F32), "output.weight": (quants.quantize(rows, kind), kind)})
        assert list(gguf_file.load(path).tensors) == ["wte.weight"]

    def test_an_output_layer_of_another_shape_is_refused(self, path: Path):
        rows = {name: (np.ones((n, 4), np.float32), Type.F32) for name, n in ((EMBEDDING, 3), ("output.weight", 4))}
        raw(path, rows)
        with pytest.raises(UsageError, match=r"output\.weight .* token_embd\.weight"):
            gguf_file.load(path)

    def test_an_output_layer_of_its_own_goes_out_and_in(self, path: Path):
        model = written(path, ByteTokenizer(), tie=False)
        found = gguf_file.load(path)
        assert not found.shape.tie
        assert torch.equal(found.tensors["lm_head.weight"], model.tensors["lm_head.weight"])
        assert not torch.equal(found.tensors["lm_head.weight"], found.tensors["wte.weight"])

    @pytest.mark.parametrize(
        ("changes", "named"),
        [
            ({"architecture": "llama"}, "architecture 'llama' is not supported; only gpt2 is"),
            ({"settings": {"attention.head_count_kv": 1}}, "head_count_kv 1 is not supported"),
            (
                {"settings": {"attention.head_count": 3}},
                "gpt2.attention.head_count 3 does not divide gpt2.embedding_length 4",
            ),
            ({"settings": {"block_count": 0}}, "gpt2.block_count 0"),
            ({"tensors": {"output_norm.weight": (np.ones(4, np.float32), Type.F32)}}, f"no matrix {EMBEDDING}"),
            ({"tensors": {EMBEDDING: (np.ones(4, np.float32), Type.F32)}}, f"no matrix {EMBEDDING}"),
        ],
        ids=str,
    )
    def test_what_is_not_supported_is_named(self, path: Path, changes: dict, named: str):
        raw(path, **changes)
        with pytest.raises(UsageError) as error:
            gguf_file.load(path)
        assert named in str(error.value)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_weights_that_are_not_finite_are_named(self, path: Path, value: float):
        raw(path, {EMBEDDING: (np.full((3, 4), value, np.float32), Type.F32)})
        with pytest.raises(UsageError, match=r"not finite: wte\.weight"):
            gguf_file.load(path).tensors["wte.weight"]


def test_the_merge_that_stands_for_none_spells_no_byte():
    assert not set("".join(NO_MERGES)) & set("".join(BYTES))
