"""The packages that an import loads, seen from fresh processes."""

import subprocess
import sys

import pytest

import fastgpt
from fastgpt import errors

HEAVY = ("torch", "numpy", "triton", "matplotlib", "rich", "safetensors", "tiktoken", "tokenizers")


def loaded_after(code: str, names: tuple[str, ...]) -> set[str]:
    """Which of the packages a fresh process has loaded after running the code."""
    show = f"import sys; print(*(name for name in {names!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{show}"], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return set(done.stdout.split())


def test_importing_fastgpt_imports_nothing_heavy():
    assert loaded_after("import fastgpt; dir(fastgpt)", HEAVY) == set()


def test_the_engine_runs_without_triton_and_optional_packages():
    # A package that is None in sys.modules cannot be imported.
    hide = "import sys; sys.modules |= dict.fromkeys(['triton', 'tiktoken']); "
    code = "import fastgpt.model, fastgpt.train, fastgpt.generate, fastgpt.data.corpus"
    assert loaded_after(hide + code, ("matplotlib",)) == set()


STEP = """
import torch
from fastgpt.config.training import TrainConfig
from fastgpt.model.gpt import GPT
from fastgpt.ops.table import resolve
from fastgpt.training.step import TrainStep

config = TrainConfig(vocab_size=11, block_size=8, n_layer=1, n_head=2, n_embd=8, dropout=0.1)
tokens = torch.randint(11, (2, 9))
model = GPT(config)
TrainStep(model, config, torch.device("cpu"), torch.float32)(0, [(tokens[:, :-1], tokens[:, 1:])])
GPT.from_weights(config, resolve("torch"), model.weights(), torch.device("cpu"), torch.float32)(tokens[:, :-1])
"""


def test_without_compile_neither_training_nor_generation_imports_the_compiler():
    """Its import is a large part of a small run's start, and of the time until the first token."""
    assert loaded_after(STEP, ("torch", "torch._dynamo", "sympy")) == {"torch"}


def test_every_public_name_is_found_where_it_is_said_to_be():
    for name in fastgpt.__all__:
        assert getattr(fastgpt, name) is not None
    assert fastgpt.UsageError is errors.UsageError
    assert fastgpt.__version__


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'fastgpt' has no attribute 'lod'"):
        _ = fastgpt.lod
