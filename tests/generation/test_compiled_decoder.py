"""The compiled decoder computes what the model does, also where an earlier run compiled it."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastgpt.config.generation import SamplingParams
from fastgpt.generation import compiled_decoder
from fastgpt.generation.compiled_decoder import CannotCompile, CompiledDecoder, DenseDecoder
from fastgpt.generation.generator import TextGenerator
from fastgpt.model.int8 import quantize_model
from fastgpt.model.kv_cache import DenseCache
from fastgpt.model.linear import store_by_columns
from fastgpt.system import torch_private
from tests.helpers.untrained import fresh

MODERN = {"position": "rotary", "norm": "rmsnorm", "qk_norm": True, "bias": False, "n_head": 4, "logit_softcap": 15.0}
GREEDY = SamplingParams(temperature=0, max_new_tokens=20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compiling takes long: all tests of this module share what is compiled."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTGPT_CACHE", str(folder))
    return folder


def made(folder: Path) -> TextGenerator:
    generator = fresh(block_size=32, n_head=4, n_kv_head=2, position="rotary")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTGPT_CACHE", str(folder))
        generator.compile()
    return generator


@pytest.fixture(scope="module")
def compiled(folder: Path) -> TextGenerator:
    return made(folder / "compiled once")


@pytest.fixture
def its_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache folder of `compiled`, which holds nothing else."""
    monkeypatch.setenv("FASTGPT_CACHE", str(folder / "compiled once"))


@pytest.fixture(scope="module", params=["as Python", pytest.param("compiled", marks=pytest.mark.slow)])
def generator(request: pytest.FixtureRequest, folder: Path) -> TextGenerator:
    """A generator with a decoder: its functions compiled, which takes half a minute, or run by Python."""
    if request.param == "compiled":
        return request.getfixturevalue("compiled")
    parts = {}

    def keep(module, given, free, path: Path) -> None:
        parts[path] = module, [tensor is None for tensor in given[0]]

    def load(path: Path):
        module, absent = parts[path]

        def run(tensors: list) -> list:
            rest = iter(tensors)
            inputs = [None if missing else next(rest) for missing in absent]
            found = module(inputs, [*rest])
            return list(found) if isinstance(found, tuple) else [found]

        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled_decoder, "_compile", keep)
        patch.setattr(torch_private, "load_package", load)
        return made(folder / "as Python")


def logits_of_both(model, step: CompiledDecoder, tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """After a prompt of two, each further token's logits, by the model and by the step: (T - 2, V) each."""
    ours, theirs = (DenseCache(model.config, dtype=model.dtype) for _ in range(2))
    got, wanted, compiled = [], [], DenseDecoder(step, ours)
    with torch.inference_mode():
        for cache in (ours, theirs):
            model(torch.tensor([tokens[:2]]), cache=cache)
        for token in tokens[2:]:
            got.append(compiled(torch.tensor([token]))[0])
            wanted.append(model(torch.tensor([[token]]), cache=theirs)[0, 0])
    assert ours.length == theirs.length == len(tokens)
    if model.dtype == torch.float32:
        for mine, other in zip((*ours.keys, *ours.values), (*theirs.keys, *theirs.values), strict=True):
            used = (slice(None), slice(len(tokens)))
            torch.testing.assert_close(mine[used], other[used], rtol=2e-4, atol=2e-6)
    return torch.stack(got), torch.stack(wanted)


def test_it_computes_what_the_model_does(generator: TextGenerator):
    assert generator.decoder is not None
    got, wanted = logits_of_both(generator.model, generator.decoder, [1, 2, 3, 4, 5, 6, 7, 8])
    assert wanted.std() > 0.01
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("its_cache")
def test_it_is_kept_and_loaded_again(compiled: TextGenerator):
    assert compiled.decoder is not None
    assert compiled.decoder.seconds > 0
    again = CompiledDecoder(compiled.model)
    assert again.seconds == 0
    got, wanted = logits_of_both(compiled.model, again, [3, 1, 2])
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_generation_takes_it_and_gives_the_same_text(generator: TextGenerator):
    """The dense cache, past the end of the window too, and pages while there is one sequence."""
    plain = TextGenerator(generator.model, generator.tokenizer)
    calls = []
    step = generator.decoder
    generator.decoder = lambda *args: calls.append(1) or step(*args)  # type: ignore[assignment]
    try:
        for count in (20, 40):
            settings = {"temperature": 0, "max_new_tokens": count}
            assert generator.generate("abc", **settings) == plain.generate("abc", **settings)
        assert len(calls) == 19 + 29
        calls.clear()
        together = generator.engine().generate(["abc", "jihg"], GREEDY)
        alone = [generator.engine().generate([prompt], GREEDY)[0] for prompt in ("abc", "jihg")]
    finally:
        generator.decoder = step
    assert [one.text for one in together] == [one.text for one in alone]
    assert [one.text for one in alone] == [plain.generate(p, temperature=0, max_new_tokens=20) for p in ("abc", "jihg")]
    assert len(calls) == 2 * 19


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "dtype", "quantized"),
    [
        ({"position": "learned"}, torch.float32, False),
        ({"position": "sinusoidal", "bias": False}, torch.float32, False),
        ({"position": "none", "n_layer": 1, "n_head": 1}, torch.float32, False),
        ({"position": "learned", "chars": "\nabcdefghijkl"}, torch.float32, True),
        ({"position": "rotary"}, torch.bfloat16, False),
        ({"position": "learned"}, torch.bfloat16, True),
        (MODERN | {"mlp": "swiglu", "n_kv_head": 2}, torch.float32, False),
        (MODERN | {"mlp": "relu2", "norm_gain": False, "tie": False}, torch.float32, False),
        (MODERN | {"mlp": "swiglu", "tie": False}, torch.bfloat16, True),
    ],
)
def test_every_kind_of_model(changes: dict, dtype: torch.dtype, quantized: bool):
    model = fresh(block_size=16, **changes).model.to(dtype)
    if quantized:
        quantize_model(model)
    else:
        store_by_columns(model)
    tokens = [1, 2, 3, 4, 5, 6]
    got, wanted = logits_of_both(model, CompiledDecoder(model), tokens)
    assert got.dtype == wanted.dtype == torch.float32
    if dtype == torch.float32:
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
        return
    # Two ways to round differ by what rounding costs: neither is much further from the same weights in float32.
    exact_model = fresh(block_size=16, **changes).model.to(dtype).float()
    if quantized:
        quantize_model(exact_model)
    with torch.inference_mode():
        exact = exact_model(torch.tensor([tokens]))[0, 2:]
    ours, theirs = ((logits.float() - exact).square().mean().sqrt() for logits in (got, wanted))
    assert ours < 1.5 * theirs
    assert ours < 0.1 * exact.std()


def test_what_it_depends_on_is_in_the_name(generator: TextGenerator, monkeypatch: pytest.MonkeyPatch):
    assert generator.decoder is not None
    inputs = [torch.zeros(1, 1, 8), torch.zeros(3)]
    name = generator.decoder.key("layer", inputs)
    assert name == generator.decoder.key("layer", inputs)
    assert name != generator.decoder.key("head", inputs)
    assert name != generator.decoder.key("layer", [torch.zeros(1, 1, 8, dtype=torch.bfloat16), torch.zeros(3)])
    monkeypatch.setattr(compiled_decoder, "_processor", lambda: "another")
    assert name != generator.decoder.key("layer", inputs)


@pytest.mark.slow
@pytest.mark.usefixtures("its_cache")
def test_a_damaged_file_is_compiled_anew(compiled: TextGenerator, monkeypatch: pytest.MonkeyPatch):
    files = sorted(compiled_decoder.cache_folder().glob("*.pt2"))
    whole = {path: path.read_bytes() for path in files}
    renewed = []

    def restore(module, inputs, free, path: Path) -> None:
        renewed.append(path)
        path.write_bytes(whole[path])

    monkeypatch.setattr(compiled_decoder, "_compile", restore)
    files[0].write_bytes(whole[files[0]][:1000])
    step = CompiledDecoder(compiled.model)
    assert renewed == [files[0]]
    got, wanted = logits_of_both(compiled.model, step, [3, 1, 2])
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_it_says_before_it_compiles(monkeypatch: pytest.MonkeyPatch):
    said = []
    monkeypatch.setattr(compiled_decoder, "_compile", lambda *args: said.append("compiled"))
    monkeypatch.setattr(torch_private, "load_package", lambda path: path)
    CompiledDecoder(fresh(block_size=16, n_embd=24).model, said.append)
    assert said == ["compiling the decoder for a model of this shape: up to a minute, once", *["compiled"] * 3]


def test_kernels_that_are_no_pytorch_are_refused():
    model = fresh(block_size=16).model
    model.ops = dataclasses.replace(model.ops, backends={**model.ops.backends, "layer_norm": "triton"})
    with pytest.raises(CannotCompile, match="PyTorch alone, without kernels of triton"):
        CompiledDecoder(model)


def test_without_a_compiler_or_a_folder_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    from torch._inductor import exc

    def fails(*args, **kwargs):
        raise exc.InductorError(exc.InvalidCxxCompiler(), None)  # as PyTorch wraps it

    monkeypatch.setattr("torch._inductor.aoti_compile_and_package", fails)
    with pytest.raises(CannotCompile, match=r"a C\+\+ compiler, found none; install g\+\+, or pass `compile=False`"):
        CompiledDecoder(fresh(block_size=16, n_embd=40).model)

    def breaks(*args, **kwargs):
        raise exc.CppCompileError(["g++"], "In file included\nstep.cpp:1: fatal error: omp.h: No such file\n")

    monkeypatch.setattr("torch._inductor.aoti_compile_and_package", breaks)
    with pytest.raises(CannotCompile, match=r"^`compile` failed: step.cpp:1: fatal error: omp.h: No such file; mend"):
        CompiledDecoder(fresh(block_size=16, n_embd=40).model)
    monkeypatch.setenv("FASTGPT_CACHE", str(tmp_path / "file"))
    (tmp_path / "file").touch()
    with pytest.raises(CannotCompile, match=r"file/compiled cannot be written: Not a directory; set FASTGPT_CACHE"):
        CompiledDecoder(fresh(block_size=16, n_embd=40).model)


def test_loading_does_not_import_the_compiler():
    code = "import sys, fastgpt.generate; sys.exit('torch._inductor.compile_fx' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
