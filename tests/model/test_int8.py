"""A model in int8: its matrices are a quarter of the size, and it predicts held-out text as well."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import fastgpt
from fastgpt import cli, generate, train
from fastgpt.data.loader import Loader
from fastgpt.errors import UsageError
from fastgpt.generation.generator import TextGenerator
from fastgpt.model.gpt import GPT
from fastgpt.model.int8 import QuantizedEmbedding, QuantizedLinear, quantize_model
from fastgpt.model.kv_cache import DenseCache
from tests.helpers import runs
from tests.helpers.places import SHAKESPEARE
from tests.helpers.untrained import fresh


@torch.inference_mode()
def perplexity(model: GPT, loader: Loader) -> float:
    total, count = 0.0, 0
    for x, y, _ in loader.whole(64):
        total += F.cross_entropy(model(x).flatten(0, 1).float(), y.flatten(), reduction="sum").item()
        count += int((y != -100).sum())
    return math.exp(total / count)


def perplexities(out_dir: Path, loader: Loader) -> tuple[float, float]:
    """In float32 and in int8."""
    plain, quantized = (fastgpt.load(out_dir, device="cpu", quantize=how) for how in ("none", "int8"))
    return perplexity(plain.model, loader), perplexity(quantized.model, loader)


@pytest.mark.usefixtures("workplace")
def test_perplexity_on_held_out_text_is_within_a_hundredth():
    out = runs.run("--max_iters 60 --eval_interval 60 --n_embd 32 --block_size 16 --batch_size 16")
    _, _, loader = runs.parts(out, "latest")
    exact, rounded = perplexities(out, loader)
    assert exact < 12  # it has learned something that rounding could lose
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.01)


@pytest.mark.slow
@pytest.mark.skipif(not SHAKESPEARE.exists(), reason="needs tiny Shakespeare beside the project")
@pytest.mark.usefixtures("workplace")
def test_perplexity_on_shakespeare():
    flags = f"--preset cpu --dataset {SHAKESPEARE} --device cpu --max_iters 600 --eval_interval 600 --sample_interval 0"
    assert cli.run(train.main, flags.split()) == 0
    text = SHAKESPEARE.read_text(encoding="utf-8")
    tokenizer = fastgpt.load("out", device="cpu").tokenizer
    held_out = tokenizer.encode(text[int(0.9 * len(text)) :])
    config = fastgpt.load("out", device="cpu").model.config
    loader = Loader(held_out, config.block_size, tokenizer.vocab_size, seed=0, device=torch.device("cpu"), name="val")
    exact, rounded = perplexities(Path("out"), loader)
    assert exact < 12
    assert rounded == pytest.approx(exact, rel=0.01)


def test_every_matrix_but_the_positions_is_a_byte_an_element():
    generator = fresh(block_size=16)
    before = {name: p.detach().clone() for name, p in generator.model.named_parameters()}
    quantize_model(generator.model)
    left = {name for name, p in generator.model.named_parameters()}
    assert left == {name for name, p in before.items() if p.dim() == 1 and "ln_" in name} | {"wpe.weight"}
    layers = [m for m in generator.model.modules() if isinstance(m, QuantizedLinear | QuantizedEmbedding)]
    assert len(layers) == 4 * generator.model.config.n_layer + 1
    for name, buffer in generator.model.named_buffers():
        if name.endswith("weight"):
            assert buffer.dtype == torch.int8
            scale = generator.model.get_buffer(name.removesuffix("weight") + "scale")
            torch.testing.assert_close(
                buffer * scale[:, None], before[name], rtol=0, atol=scale.max().item() / 2 + 1e-6
            )
    assert (generator.model.dtype, generator.model.device.type) == (torch.float32, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_and_without_a_cache_it_gives_the_same(dtype: torch.dtype):
    model = fresh(block_size=16).model.to(dtype)
    exact = model.float()(torch.tensor([[1, 2, 3, 4, 5]]))
    model.to(dtype)
    quantize_model(model)
    with torch.inference_mode():
        whole = model(torch.tensor([[1, 2, 3, 4, 5]]))
        cache = DenseCache(model.config, dtype=model.dtype)
        parts = [model(torch.tensor([part]), cache=cache) for part in ([1, 2, 3], [4], [5])]
    assert whole.dtype == torch.float32
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=tolerance, atol=tolerance)
    # Large weights make large logits: these are off by the rounding, and not by a forgotten scale or bias.
    torch.testing.assert_close(whole.float(), exact, rtol=0.1, atol=0.1 * exact.std().item())


def test_the_engine_takes_it():
    plain = fresh(block_size=32)
    quantize_model(plain.model)
    generator = TextGenerator(plain.model, plain.tokenizer)
    params = fastgpt.SamplingParams(temperature=0, max_new_tokens=8)
    texts = [one.text for one in generator.engine().generate(["abc", "ji"], params)]
    assert texts == [generator.generate(p, temperature=0, max_new_tokens=8) for p in ("abc", "ji")]


@pytest.mark.usefixtures("workplace")
def test_from_the_command_line(capsys):
    runs.run("--max_iters 2 --eval_interval 2")
    capsys.readouterr()
    flags = ["--prompt", "The", "--max_new_tokens", "5", "--temperature", "0", "--quantize"]
    assert cli.run(generate.main, [*flags, "int8"]) == 0
    assert capsys.readouterr().out.startswith("The")
    assert cli.run(generate.main, [*flags, "int4"]) == 2
    assert "--quantize 'int4' is not one of none, int8" in capsys.readouterr().err
    with pytest.raises(UsageError, match="`quantize` 'int4' is not one of none, int8"):
        fastgpt.load("out", device="cpu", quantize="int4")
    assert json.loads(Path("out/config.json").read_text())  # the run is as it was
