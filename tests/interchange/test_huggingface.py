"""Folders of GPT-2 in transformers' layout: read in every form that they have, refused by name where they are bad, and
written so that they read the same."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastgpt.checkpoint.source import Source, open_model
from fastgpt.errors import UsageError
from fastgpt.interchange import huggingface_export
from fastgpt.model.gpt import GPT
from fastgpt.ops import table
from tests.helpers import gpt2_folders
from tests.helpers.exports import LETTERS, exported
from tests.helpers.gpt2_folders import Tensors, change_settings, folder_of, settings_of, theirs, write, write_json

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
HEAD, EMBEDDING = "lm_head.weight", "transformer.wte.weight"


def model_in(source: Source) -> GPT:
    config = source.config
    return GPT.from_weights(config, table.resolve("torch"), source.weights(config), torch.device("cpu"), torch.float32)


def same(source: Source, model: GPT, dtype: torch.dtype = torch.float32) -> None:
    """The source has these weights, to the bit."""
    wanted, found = model.weights(), source.tensors
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found.shapes[name] == tensor.shape
        assert torch.equal(found[name], tensor.to(dtype)), name


class TestRead:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("prefix", ["transformer.", ""])
    @pytest.mark.parametrize("head", [True, False])
    @pytest.mark.parametrize("shards", [1, 3])
    @pytest.mark.covering_array(2)
    def test_every_form_has_the_same_weights(self, tmp_path: Path, dtype, prefix: str, head: bool, shards: int):
        model, _ = exported()
        tensors = {name: tensor.to(dtype) for name, tensor in theirs(model, prefix).items()}
        if head:
            tensors[HEAD] = tensors[f"{prefix}wte.weight"].clone()
        same(open_model(write(tmp_path / "hf", tensors, settings_of(model), shards=shards)), model, dtype)

    def test_masks_of_old_versions_are_left_out(self, tmp_path: Path):
        model, _ = exported()
        masks = {
            "h.0.attn.bias": torch.ones(1, 1, 12, 12, dtype=torch.uint8),
            "h.1.attn.masked_bias": torch.tensor(-1e4),
        }
        same(open_model(write(tmp_path, theirs(model, "") | masks, settings_of(model))), model)

    @pytest.mark.parametrize(
        ("shape", "changes"),
        [
            ({}, {}),
            ({}, {"activation_function": "gelu_pytorch_tanh"}),
            ({}, {"activation_function": ...}),
            ({"mlp": "gelu_exact"}, {}),
            ({"mlp": "relu"}, {}),
            ({"n_inner": 24}, {}),
            ({}, {"n_inner": 64, "reorder_and_upcast_attn": True, "scale_attn_weights": True}),
            ({"norm_eps": 1e-3}, {}),
        ],
        ids=str,
    )
    def test_settings_are_honoured(self, tmp_path: Path, shape: dict, changes: dict):
        model = folder_of(tmp_path, **shape)
        change_settings(tmp_path, **changes)
        tokens = torch.arange(12)[None] % LETTERS.vocab_size
        assert torch.equal(model_in(open_model(tmp_path))(tokens), model(tokens))

    def test_rows_that_fill_up_the_embedding_are_no_tokens(self, tmp_path: Path):
        model, _ = exported()
        tensors, settings = theirs(model), settings_of(model) | {"vocab_size": 16}
        padded = tensors | {EMBEDDING: torch.cat([tensors[EMBEDDING], torch.full((2, 16), 9.0)])}
        source = open_model(write(tmp_path, padded, settings))
        assert (source.shape.vocab_size, source.config.vocab_size) == (16, 14)
        assert torch.equal(model_in(source).weights()["wte.weight"], model.weights()["wte.weight"])


def tensors(change: Callable[[Tensors], object]) -> Callable[[Path], object]:
    def act(folder: Path) -> None:
        held = load_file(folder / WEIGHTS)
        change(held)
        save_file(held, folder / WEIGHTS)

    return act


def with_tensor(name: str, value: torch.Tensor) -> Callable[[Path], object]:
    return tensors(lambda held: held.update({name: value}))


def with_head(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], object]:
    return tensors(lambda held: held.update({HEAD: change(held[EMBEDDING].clone())}))


def setting(**changes) -> Callable[[Path], object]:
    return lambda folder: change_settings(folder, **changes)


def content(name: str, data: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(data)


def index(weight_map: object) -> Callable[[Path], object]:
    return lambda folder: write_json(folder / INDEX, {"weight_map": weight_map})


NAN = torch.full((12, 16), float("nan"))
REFUSED: list[tuple[Callable[[Path], object], str]] = [
    (tensors(lambda held: held.pop("transformer.wpe.weight")), "lacks tensor wpe.weight"),
    (tensors(lambda held: held.pop("transformer.h.1.ln_1.bias")), "lacks tensor h.1.ln_1.bias"),
    (tensors(lambda held: [held.pop(n) for n in [*held] if ".h.1." in n]), "describe 2 layers, and its weights have 1"),
    (with_tensor("transformer.x", torch.zeros(1)), "has an unknown tensor x"),
    (with_tensor("score.weight", torch.zeros(1)), "has an unknown tensor score.weight"),
    (with_tensor("a\nb\x1b[1m", torch.zeros(1)), r"has an unknown tensor 'a\nb\x1b[1m'"),
    (with_tensor("transformer.wpe.weight", torch.zeros(12, 17)), "wpe.weight is (12, 17), and its settings need"),
    (with_tensor("transformer.h.0.mlp.c_fc.weight", torch.zeros(64, 16)), "c_fc.weight is (16, 64), and its settings"),
    (with_tensor("transformer.h.999999999.ln_1.bias", torch.zeros(16)), "its weights have 1,000,000,000"),
    (with_tensor("wte.weight", torch.zeros(14, 16)), "wte.weight is there twice"),
    (with_tensor("transformer.wpe.weight", NAN), "not finite: wpe.weight holds a NaN"),
    (with_tensor("transformer.wpe.weight", torch.zeros(12, 16).int()), "wpe.weight is of type torch.int32"),
    (with_head(lambda head: head + 1), "ties lm_head.weight to wte.weight, and their weights differ; set tie_word_"),
    (with_head(lambda head: head[1:].contiguous()), "lm_head.weight has not the shape of wte.weight"),
    (setting(tie_word_embeddings=False), "has tie_word_embeddings False, and there is no lm_head.weight"),
    (setting(model_type="llama"), "model_type 'llama' is not supported; only gpt2 is"),
    (setting(model_type=...), "model_type None is not supported"),
    (setting(activation_function="silu"), "activation_function 'silu' is not supported; only gelu_new"),
    (setting(activation_function=["relu"]), "activation_function ['relu'] is not supported"),
    (setting(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx True is not supported"),
    (setting(scale_attn_weights=False), "scale_attn_weights False is not supported"),
    (setting(add_cross_attention=True), "add_cross_attention True is not supported"),
    (setting(quantization_config={"bits": 4}), "quantization_config is not supported"),
    (setting(n_layer=3), "its settings describe 3 layers, and its weights have 2"),
    (setting(n_inner=65), "c_fc.weight is (64, 16), and its settings need (65, 16)"),
    (setting(n_head=3), "n_head 3 does not divide n_embd 16"),
    (setting(n_layer=10**12), "describe 1,000,000,000,000 layers"),
    (setting(n_positions=10**12), "its settings need (1000000000000, 16)"),
    (setting(n_embd=10**12), "n_embd 1000000000000 must be at most"),
    (setting(vocab_size=None), "config.json lacks vocab_size"),
    (setting(n_positions=...), "config.json lacks n_positions"),
    (setting(n_layer="2"), "n_layer '2' is not of type int"),
    (setting(layer_norm_epsilon=float("nan")), "layer_norm_epsilon nan is not a finite number"),
    (content("config.json", b"{"), "config.json is not JSON"),
    (content("config.json", b"[]"), "config.json holds no JSON object"),
    (content("config.json", b"[" * 10**6), "config.json is not JSON: it is nested too deep"),
    (content(WEIGHTS, b""), "model.safetensors cannot be read"),
    (content(WEIGHTS, (10**13).to_bytes(8, "little") + b"{}"), "model.safetensors cannot be read"),
    (content(WEIGHTS, b"\x80\x04cposix\nsystem\n(S'touch canary'\ntR."), "model.safetensors cannot be read"),
    (lambda folder: os.truncate(folder / WEIGHTS, 9_000), "model.safetensors cannot be read"),
    (lambda folder: (folder / WEIGHTS).unlink(), "has no model.safetensors"),
    (lambda folder: (folder / WEIGHTS).rename(folder / "pytorch_model.bin"), "pytorch_model.bin, a pickle, which"),
    (index([]), "has no weight_map"),
    (index({"a": "../model.safetensors"}), "names '../model.safetensors', which is no safetensors file of this folder"),
    (index({"a": "/etc/x.safetensors"}), "names '/etc/x.safetensors', which is no"),
    (index({"a": "..\\x.safetensors"}), r"names '..\\x.safetensors', which is no"),
    (index({"a": "a\0.safetensors"}), r"names 'a\x00.safetensors', which is no"),
    (index({"a": "pytorch_model.bin"}), "names 'pytorch_model.bin', which is no"),
    (index({"a": "gone.safetensors"}), "gone.safetensors cannot be read"),
    (content(INDEX, b"{"), "index.json is not JSON"),
]  # fmt: skip


def opened(folder: Path) -> None:
    """Open a folder and read all of it."""
    source = open_model(folder)
    dict(source.weights(source.config))


def refusal(folder: Path) -> str:
    """The one line with which a folder is refused."""
    with pytest.raises(UsageError) as error:
        opened(folder)
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)
    return str(error.value)


class TestRefused:
    @pytest.mark.parametrize(("change", "said"), REFUSED, ids=[said for _, said in REFUSED])
    def test_what_is_bad_is_named(self, tmp_path: Path, monkeypatch, change: Callable[[Path], object], said: str):
        monkeypatch.chdir(tmp_path)
        folder_of(tmp_path / "hf")
        change(tmp_path / "hf")
        assert said in refusal(tmp_path / "hf")
        assert [path.name for path in tmp_path.iterdir()] == ["hf"]

    @pytest.mark.parametrize("name", ["config.json", WEIGHTS, INDEX, "tokenizer.json"])
    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
    def test_a_pipe_is_not_waited_for(self, tmp_path: Path, name: str):
        folder_of(tmp_path)
        (tmp_path / name).unlink(missing_ok=True)
        os.mkfifo(tmp_path / name)
        assert f"{tmp_path / name} cannot be read: " in refusal(tmp_path)

    @pytest.mark.parametrize("seed", range(8))
    def test_a_flipped_bit_is_one_line_or_another_number(self, tmp_path: Path, seed: int):
        """In the header, where it changes names, types, shapes and offsets."""
        folder_of(tmp_path)
        whole, draw = (tmp_path / WEIGHTS).read_bytes(), random.Random(seed)
        header = 8 + int.from_bytes(whole[:8], "little")
        said = []
        for _ in range(12):
            data, at = bytearray(whole), draw.randrange(header)
            data[at] ^= 1 << draw.randrange(8)
            (tmp_path / WEIGHTS).write_bytes(data)
            try:
                opened(tmp_path)
            except UsageError as error:
                said.append(str(error))
        assert said
        assert not any("\n" in line for line in said)


class TestWritten:
    def write(self, folder: Path, dtype: str = "float32", **shape) -> tuple[GPT, Tensors]:
        model, export = exported(**shape)
        huggingface_export.write(export, folder, dtype)
        found = {}
        for file in folder.glob("*.safetensors"):
            found |= load_file(file)
        return model, found

    @pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
    def test_tensors_are_those_that_transformers_reads_and_no_others(self, tmp_path: Path, dtype: str):
        model, found = self.write(tmp_path, dtype)
        wanted = theirs(model)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name].to(getattr(torch, dtype))) for name in wanted)

    def test_missing_biases_are_zeros(self, tmp_path: Path):
        model, found = self.write(tmp_path, bias=False)
        biases = {name: tensor for name, tensor in found.items() if name.endswith("bias")}
        assert found.keys() - biases.keys() == theirs(model).keys()
        assert biases.keys() == {n for n in theirs(exported()[0]) if n.endswith("bias")}
        assert {name: tuple(tensor.shape) for name, tensor in biases.items() if ".h.1." in name} == {
            "transformer.h.1.ln_1.bias": (16,), "transformer.h.1.attn.c_attn.bias": (48,),
            "transformer.h.1.attn.c_proj.bias": (16,), "transformer.h.1.ln_2.bias": (16,),
            "transformer.h.1.mlp.c_fc.bias": (64,), "transformer.h.1.mlp.c_proj.bias": (16,),
        }  # fmt: skip
        assert not any(tensor.any() for tensor in biases.values())

    def test_shards_are_no_larger_than_asked_for(self, tmp_path: Path, monkeypatch):
        monkeypatch.setattr(huggingface_export, "SHARD", 5_000)
        model, _ = self.write(tmp_path)
        index = json.loads((tmp_path / INDEX).read_text())
        files = sorted(tmp_path.glob("*.safetensors"))
        assert [file.name for file in files] == [f"model-0000{n}-of-00007.safetensors" for n in range(1, 8)]
        assert {name: file.name for file in files for name in load_file(file)} == index["weight_map"]
        assert index["metadata"]["total_size"] == 4 * model.num_parameters()
        assert all(sum(t.nbytes for t in load_file(file).values()) <= 5_000 for file in files)
        same(open_model(tmp_path), model)

    @pytest.mark.parametrize(
        "shape",
        [{}, {"mlp": "gelu_exact"}, {"mlp": "relu", "n_inner": 24}, {"norm_eps": 1e-6, "block_size": 7}],
        ids=str,
    )
    def test_it_is_read_as_the_same_model(self, tmp_path: Path, shape: dict):
        model, _ = self.write(tmp_path, **shape)
        source = open_model(tmp_path)
        same(source, model)
        assert (source.config, source.tokenizer) == (model.config, LETTERS)

    def test_its_settings_are_gpt2s(self, tmp_path: Path):
        self.write(tmp_path, mlp="gelu_exact", dropout=0.25)
        settings = json.loads((tmp_path / "config.json").read_text())
        wanted = {"architectures": ["GPT2LMHeadModel"], "activation_function": "gelu", "attn_pdrop": 0.25}
        wanted |= {"bos_token_id": 0, "eos_token_id": None, "vocab_size": 14, "n_positions": 12, "model_type": "gpt2"}
        assert settings | wanted == settings
        generation = json.loads((tmp_path / "generation_config.json").read_text())
        assert (generation["bos_token_id"], generation["eos_token_id"]) == (0, None)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_loading_takes_little_more_memory_than_the_weights(tmp_path: Path):
    """In a process of its own, whose peak is counted from the moment before."""
    import subprocess
    import sys

    shape = {"n_layer": 6, "n_head": 8, "n_embd": 1024, "block_size": 64}
    folder_of(tmp_path, **shape)
    code = f"""
import re
from pathlib import Path
import torch
import fastgpt
from tests.helpers.exports import LETTERS
def kib(name): return int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
fastgpt.load({str(tmp_path / "small")!r}, device="cpu")
Path("/proc/self/clear_refs").write_text("5")
before = kib("VmRSS")
model = fastgpt.load({str(tmp_path)!r}, device="cpu", dtype="float32").model
print((kib("VmHWM") - before) * 1024, sum(p.nbytes for p in model.parameters()))
"""
    gpt2_folders.folder_of(tmp_path / "small")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    peak, weights = map(int, done.stdout.split())
    assert weights > 300e6
    assert peak < 1.2 * weights
