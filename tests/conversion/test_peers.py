"""Both ways through transformers itself, on weights with unusual scales: logits, greedy tokens, losses, gradients."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

import fastgpt
from fastgpt import cli, convert
from fastgpt.checkpoint.source import open_model
from fastgpt.config.generation import SamplingParams
from fastgpt.interchange import huggingface_export, huggingface_tokenizer
from fastgpt.interchange.exported import ExportedModel
from fastgpt.model.gpt import GPT
from fastgpt.tokenizer.base import Tokenizer
from fastgpt.tokenizer.bpe import BpeTokenizer
from fastgpt.tokenizer.byte import ByteTokenizer
from fastgpt.tokenizer.char import CharTokenizer
from fastgpt.tokenizer.gpt2 import Gpt2Tokenizer
from tests.helpers.corpora import KINDS
from tests.helpers.exports import exported
from tests.helpers.gpt2_folders import BY_COLUMNS

pytestmark = pytest.mark.peers
transformers = pytest.importorskip("transformers", reason="needs the extra peers")
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

LOGITS, GRADIENTS, NEAR_TIE = 1e-5, 1e-4, 1e-2
# GPT-2's sizes, with fewer layers: n_layer, n_head, n_embd.
SIZES = {"gpt2": (12, 12, 768), "gpt2-medium": (4, 16, 1024), "gpt2-large": (3, 20, 1280), "gpt2-xl": (2, 25, 1600)}
TEXT = "The cat's 12 häuser,\n\n\t  and 👩‍👩‍👧‍👦 e\u0301 don't  \r\n 안녕 "


def unusual(peer: Any) -> None:
    """Scales of GPT-2's own weights: gains of up to ten, a few channels of the embeddings far larger than the rest."""
    torch.manual_seed(11)
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            if name.endswith("ln_1.weight") or name.endswith("ln_2.weight"):
                parameter.copy_(torch.rand_like(parameter) * 2)
            elif name.endswith("bias"):
                parameter.copy_(torch.randn_like(parameter) * 0.1)
            elif name.endswith("ln_f.weight"):
                parameter.copy_(torch.rand_like(parameter) * 10)
            elif name.endswith(("wte.weight", "wpe.weight")):
                parameter.mul_(5)
                parameter[:, 7] += 3.0
                parameter[:, 138 % parameter.shape[1]] -= 10.0
            else:
                parameter.mul_(3)


def peer_of(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()


def saved_peer(folder: Path, tokenizer: Tokenizer | None = None, **changes: Any) -> Any:
    """A model that transformers made and saved, with a vocabulary of ours beside it."""
    tokenizer = tokenizer or ByteTokenizer()
    settings = {"vocab_size": tokenizer.vocab_size, "n_positions": 96, "n_layer": 2, "n_head": 4, "n_embd": 48}
    settings |= {"bos_token_id": None, "eos_token_id": None} | changes
    peer = transformers.GPT2LMHeadModel(transformers.GPT2Config(**settings)).eval()
    unusual(peer)
    peer.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps(huggingface_tokenizer.to_library(tokenizer)), encoding="utf-8")
    return peer


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference over the largest value."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


@torch.no_grad()
def greedy(peer: Any, ids: list[int], count: int) -> tuple[list[int], int]:
    """The likeliest tokens by whole forward passes, and how many come before a near-tie."""
    made, sure = list(ids), None
    for at in range(count):
        best = peer(torch.tensor([made])).logits[0, -1].topk(2)
        if sure is None and float(best.values[0] - best.values[1]) < NEAR_TIE:
            sure = at
        made.append(int(best.indices[0]))
    return made[len(ids) :], count if sure is None else sure


def assert_the_same_model(ours: GPT, peer: Any) -> None:
    """Logits, the loss and its gradients."""
    torch.manual_seed(2)
    V, T = ours.config.known_vocab, min(48, ours.config.block_size)
    tokens, targets = torch.randint(V, (2, T)), torch.randint(V, (2, T))
    with torch.no_grad():
        assert difference(ours(tokens), peer(tokens).logits) < LOGITS
    ours.train().requires_grad_(True)
    loss = ours(tokens, targets)
    loss.backward()
    theirs = torch.nn.functional.cross_entropy(peer(tokens).logits.flatten(0, 1), targets.flatten())
    theirs.backward()
    assert abs(loss.item() - theirs.item()) < LOGITS * theirs.item()
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    for name, parameter in peer.transformer.named_parameters():
        found, wanted = gradients[name], parameter.grad
        wanted = wanted.t() if name.endswith(BY_COLUMNS) else wanted
        assert difference(found[: len(wanted)], wanted) < GRADIENTS, name


@pytest.mark.parametrize("size", [pytest.param(name, marks=pytest.mark.slow) for name in SIZES])
def test_gpt2s_sizes_compute_the_same(tmp_path: Path, size: str):
    n_layer, n_head, n_embd = SIZES[size]
    peer = saved_peer(tmp_path, n_layer=n_layer, n_head=n_head, n_embd=n_embd)
    generator = fastgpt.load(tmp_path, device="cpu", dtype="float32")
    wanted, sure = greedy(peer, list(b"The "), 64)
    assert sure >= 8
    assert tokens_of(generator, "The ", 64)[:sure] == wanted[:sure]
    assert_the_same_model(generator.model, peer)


def tokens_of(generator: Any, text: str, count: int) -> list[int]:
    engine = generator.engine(max_batch=1)
    return engine.generate([text], SamplingParams(max_new_tokens=count, temperature=0))[0].tokens


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"activation_function": "gelu"},
        {"activation_function": "relu", "n_inner": 100},
        {"layer_norm_epsilon": 1e-3, "reorder_and_upcast_attn": True},
        {"n_head": 1, "n_embd": 20, "n_layer": 3},
        {"activation_function": "relu2", "tie_word_embeddings": False},
    ],
    ids=str,
)
def test_what_transformers_saves_is_read_as_it_computes(tmp_path: Path, changes: dict):
    peer = saved_peer(tmp_path, **changes)
    assert_the_same_model(fastgpt.load(tmp_path, device="cpu", dtype="float32").model, peer)


def test_every_cache_continues_as_transformers_does(tmp_path: Path):
    peer = saved_peer(tmp_path)
    generator = fastgpt.load(tmp_path, device="cpu", dtype="float32")
    prompts = ["The ", "a", "12 häuser"]
    wanted = [greedy(peer, list(prompt.encode()), 64) for prompt in prompts]
    assert max(sure for _, sure in wanted) > 30
    params = SamplingParams(max_new_tokens=64, temperature=0)
    batched = [done.tokens for done in generator.engine(max_batch=3).generate(prompts, params)]
    alone = [tokens_of(generator, prompt, 64) for prompt in prompts]
    for found in (batched, alone):
        for tokens, (path, sure) in zip(found, wanted, strict=True):
            assert tokens[:sure] == path[:sure]
    for cache in ("dense", "paged"):
        for prompt, tokens in zip(prompts, batched, strict=True):
            said = generator.generate(prompt, cache=cache, max_new_tokens=64, temperature=0)
            assert said == generator.tokenizer.decode(tokens)


def test_shards_and_half_precision_of_transformers_are_read(tmp_path: Path):
    peer = saved_peer(tmp_path / "one")
    for dtype in (torch.float16, torch.bfloat16):
        folder = tmp_path / str(dtype)
        peer.to(dtype).save_pretrained(folder, max_shard_size="50KB")
        assert len(list(folder.glob("model-*.safetensors"))) > 2
        ours, theirs = open_model(folder).tensors, peer_of(folder, dtype).transformer.state_dict()
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            assert torch.equal(tensor, theirs[name].t() if name.endswith(BY_COLUMNS) else theirs[name]), name


def test_import_export_import_is_the_same_bits(tmp_path: Path):
    saved_peer(tmp_path / "theirs")
    first = open_model(tmp_path / "theirs")
    model = ExportedModel(first.config, first.required_tokenizer(), dict(first.tensors))
    (tmp_path / "ours").mkdir()
    huggingface_export.write(model, tmp_path / "ours", "float32")
    second = open_model(tmp_path / "ours")
    assert (second.config, second.tokenizer) == (first.config, first.tokenizer)
    assert all(torch.equal(second.tensors[name], tensor) for name, tensor in first.tensors.items())
    again = peer_of(tmp_path / "ours").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in peer_of(tmp_path / "theirs").state_dict().items())


VOCABULARIES = {
    "char": lambda: CharTokenizer("".join(dict.fromkeys(TEXT + "\x00\x1f\x85\u2028\ufeff ab"))),
    "byte": lambda: ByteTokenizer(ends=True),
    "gpt2": Gpt2Tokenizer.from_files,
    "bpe": lambda: BpeTokenizer.train([TEXT * 9], 300, ends=True),
}


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_loads_what_we_write_without_a_warning(tmp_path: Path, kind: str):
    tokenizer = VOCABULARIES[kind]()
    model, export = exported(tokenizer, block_size=96, bias=kind != "byte")
    huggingface_export.write(export, tmp_path, "float32")
    peer, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, local_files_only=True, output_loading_info=True
    )
    assert not any(info[name] for name in ("unexpected_keys", "mismatched_keys"))
    assert {*info["missing_keys"]} <= {"lm_head.weight"}
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert type(theirs).__name__ in ("PreTrainedTokenizerFast", "TokenizersBackend")
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    for text in (TEXT, TEXT[::-1].replace("\u0301", ""), " a", "\n"):
        ids = tokenizer.encode(text).tolist()
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == text
    assert (theirs.eos_token_id, len(theirs)) == (tokenizer.end_token, tokenizer.vocab_size)
    assert (peer.generation_config.eos_token_id, peer.config.eos_token_id) == (tokenizer.end_token,) * 2
    assert peer.config.bos_token_id == tokenizer.start_token
    tokens = torch.randint(tokenizer.vocab_size, (2, 40))
    inputs = theirs("a e", return_tensors="pt")
    with torch.no_grad():
        assert difference(model(inputs["input_ids"]), peer.eval()(**inputs).logits) < LOGITS
        assert difference(model(tokens), peer.eval()(tokens).logits) < LOGITS


def test_an_output_layer_of_its_own_and_squared_relu_reach_transformers(tmp_path: Path):
    model, export = exported(ByteTokenizer(), block_size=96, tie=False, mlp="relu2", attention_bias=False)
    huggingface_export.write(export, tmp_path, "float32")
    peer, tokens = peer_of(tmp_path), torch.randint(256, (2, 40))
    assert not torch.equal(peer.lm_head.weight, peer.transformer.wte.weight)
    with torch.no_grad():
        assert difference(model(tokens), peer(tokens).logits) < LOGITS


class TestVerified:
    """The command's own proof."""

    @pytest.fixture(autouse=True)
    def here(self, tmp_path: Path, monkeypatch) -> None:
        monkeypatch.chdir(tmp_path)
        saved_peer(Path("hf"))

    @staticmethod
    def call(flags: str) -> int:
        return cli.run(convert.main, shlex.split(flags))

    @pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-5), ("float16", 2e-2), ("bfloat16", 2e-2)])
    def test_it_says_by_how_much_logits_differ(self, capsys, dtype: str, limit: float):
        assert self.call(f"hf new --format huggingface --dtype {dtype}") == 0
        said = capsys.readouterr().out.splitlines()[-1]
        found = re.fullmatch(
            r"verified with transformers: logits differ by (\S+) of the largest \(at most (\S+)\)"
            r"(, \d+ greedy tokens? the same)?",
            said,
        )
        assert found, said
        assert float(found[1]) <= float(found[2]) == limit
        assert (found[3] is not None) == (dtype == "float32")
        assert peer_of(Path("new")).transformer.wte.weight.shape == (256, 48)

    @pytest.mark.parametrize(
        ("name", "said"),
        [
            ("transformer.h.1.attn.c_attn.bias", "computes other logits"),
            ("transformer.h.0.mlp.c_fc.biasbias", "differ by the tensor"),
            (None, "differ by the tensor"),
            ("tokenizer", "tokenizer reads or writes"),
        ],
    )
    def test_a_result_that_computes_something_else_is_deleted(self, capsys, monkeypatch, name: str | None, said: str):
        from safetensors.torch import load_file, save_file

        write = huggingface_export.write

        def wrong(model: ExportedModel, folder: Path, dtype: str) -> None:
            write(model, folder, dtype)
            weights = load_file(folder / "model.safetensors")
            if name is None:
                del weights["transformer.h.1.ln_2.bias"]
            elif name == "tokenizer":
                tokenizer = CharTokenizer("".join(map(chr, range(1, 129))))  # each id is one less
                content = huggingface_tokenizer.to_library(tokenizer)
                (folder / "tokenizer.json").write_text(json.dumps(content))
            else:
                weights[name] = weights.get(name, torch.zeros(192)) + 0.5
            save_file(weights, folder / "model.safetensors", {"format": "pt"})

        monkeypatch.setattr(huggingface_export, "write", wrong)
        capsys.readouterr()
        assert self.call("hf new --format huggingface") == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert said in err
        assert "Traceback" not in err
        assert [path.name for path in Path().iterdir()] == ["hf"]
