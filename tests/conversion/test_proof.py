"""The proof of a conversion: what passes, what fails, and what a failure leaves."""

import dataclasses
import importlib.util
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastgpt.checkpoint import store
from fastgpt.checkpoint.source import Source, open_model
from fastgpt.config.conversion import ConvertConfig
from fastgpt.conversion import formats, proof
from fastgpt.errors import RunFailed
from tests.helpers.conversions import UNVERIFIED, call, refusal
from tests.helpers.exports import exported
from tests.helpers.gpt2_folders import settings_of, theirs, write
from tests.helpers.runs import forge_manifest

pytestmark = pytest.mark.usefixtures("here")


class TestProof:
    @pytest.fixture(autouse=True)
    def no_peers(self, monkeypatch) -> None:
        """As if no peer were installed; importing one takes seconds."""
        found = importlib.util.find_spec
        missing = ("transformers", "xllamacpp")
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, *rest: None if name in missing else found(name, *rest)
        )

    def test_without_the_peer_it_says_so(self, capsys):
        assert call("hf new --format huggingface") == 0
        assert "not verified: transformers is not installed; pip install transformers" in capsys.readouterr().err

    def test_a_proof_that_was_asked_for_needs_the_peer_first(self, capsys):
        said = refusal(capsys, "hf new --format huggingface --verify")
        assert said == "error: --verify: transformers is not installed; pip install transformers\n"

    def test_our_own_format_is_compared_bit_by_bit(self, capsys, monkeypatch):
        assert call("hf new --format fastgpt") == 0
        assert "verified: 28 tensors have the bits that were written" in capsys.readouterr().out
        written = formats.FORMATS["fastgpt"].write

        def wrong(source, folder, final, dtype):
            written(source, folder, final, dtype)
            step = next(folder.glob("step-*"))
            weights = {name: tensor.clone() for name, tensor in load_file(step / store.MODEL).items()}
            weights["wpe.weight"][0, 0] += 1
            save_file(weights, step / store.MODEL)
            forge_manifest(step)

        monkeypatch.setitem(formats.FORMATS, "fastgpt", formats.Format(formats.FORMATS["fastgpt"].limit, wrong))
        shutil.rmtree("new")
        assert "the result holds other numbers in wpe.weight" in refusal(capsys, "hf new --format fastgpt", code=1)

    def test_our_own_format_has_the_same_shape_and_vocabulary(self, capsys, monkeypatch):
        def other(folder: Path, **named) -> Source:
            found = open_model(folder, **named)
            return dataclasses.replace(found, shape=dataclasses.replace(found.shape, norm_eps=1e-3))

        monkeypatch.setattr(proof, "open_model", other)
        assert "the result has another shape or vocabulary" in refusal(capsys, "hf new --format fastgpt", code=1)

    @pytest.mark.parametrize("error", [OSError("Can't load it"), ValueError("no such\nmodel"), ImportError("no jax")])
    def test_whatever_the_peer_raises_is_a_failed_proof(self, capsys, monkeypatch, error: Exception):
        def fail(*_: object) -> str:
            raise error

        monkeypatch.setattr(proof, "_missing", lambda config: None)
        monkeypatch.setitem(proof.PROOFS, "huggingface", fail)
        line = refusal(capsys, "hf new --format huggingface", code=1)
        said = " ".join(str(error).split())
        assert line == f"error: the program for --format huggingface fails on the result: {said}\n"

    def test_a_failed_proof_leaves_the_old_result(self, capsys, monkeypatch):
        assert call(f"hf new --format huggingface {UNVERIFIED}") == 0

        def fail(config, source, result: Path) -> str:
            assert result.is_dir()
            raise RunFailed("it computes other logits")

        monkeypatch.setattr(proof, "prove", fail)
        assert "it computes other logits" in refusal(capsys, "hf new --format huggingface --overwrite", code=1)
        assert "it computes other logits" in refusal(capsys, "--format huggingface hf an/other/new", code=1)

    @pytest.mark.parametrize(
        ("scale", "dtype", "passes"),
        [
            (1e-7, "float32", True),
            (1e-4, "float32", False),
            (1e-3, "bfloat16", True),
            (0.1, "float16", False),
            (float("nan"), "float16", False),
        ],
    )
    def test_the_limits_of_a_proof(self, scale: float, dtype: str, passes: bool):
        """A peer whose logits are off by a part of the largest."""
        known = proof.reference(open_model("hf"))
        config = ConvertConfig(src="hf", dst="new", format="huggingface", dtype=dtype)
        size = known.model(known.tokens).abs().max().detach()

        def peer(tokens: torch.Tensor) -> torch.Tensor:
            logits = known.model(tokens).clone()
            logits[0, -1, 3] += scale * size
            return logits

        if passes:
            said = proof._compare_logits("peer", config, known, peer)
            assert said.startswith(f"verified with peer: logits differ by {scale:.0e}"[:-4])
        else:
            with pytest.raises(RunFailed, match="peer computes other logits: they differ by"):
                proof._compare_logits("peer", config, known, peer)

    def test_a_model_of_zeros_is_equal_to_itself_and_to_no_other(self):
        model, _ = exported()
        zeros = {name: torch.zeros_like(tensor) for name, tensor in theirs(model).items()}
        known = proof.reference(open_model(write(Path("zeros"), zeros, settings_of(model))))
        config = ConvertConfig(src="zeros", dst="new", format="huggingface")
        said = proof._compare_logits("peer", config, known, known.model)
        assert (
            said
            == "verified with peer: logits differ by 0.0e+00 of the largest (at most 1e-05), 0 greedy tokens the same "
            "before a near-tie"
        )
        with pytest.raises(RunFailed, match="peer computes other logits"):
            proof._compare_logits("peer", config, known, lambda tokens: known.model(tokens) + 1e-9)

    def test_greedy_tokens_count_up_to_a_near_tie(self):
        known = proof.reference(open_model("hf"))
        new = known.path.shape[1] - known.prompt
        assert new == 11
        with torch.no_grad():
            best = known.model(known.path)[0, known.prompt - 1 : -1].topk(2)
        assert best.indices[:, 0].tolist() == known.path[0, known.prompt :].tolist()
        near = ((best.values[:, 0] - best.values[:, 1]) < 1e-2).nonzero().flatten().tolist()
        assert known.sure == (near[0] if near else new)
        assert known.greedy == known.path[0, known.prompt : known.prompt + known.sure].tolist()
