"""Shapes: each names a line that is in the code, and its numbers are what its letters stand for."""

import re

import pytest
import torch

from fastgpt.config.model import ModelConfig
from fastgpt.inspection.attention import observe
from fastgpt.model.gpt import GPT
from tests.helpers.places import ROOT

SOURCES = [ROOT / "fastgpt/model/gpt.py", ROOT / "kernels/fastgpt_kernels/reference.py"]


@pytest.mark.parametrize("position", ["learned", "rotary"])
@pytest.mark.parametrize("n_kv_head", [None, 2])
def test_numbers_are_what_letters_stand_for(position: str, n_kv_head: int | None):
    torch.manual_seed(0)
    config = ModelConfig(11, 16, 3, 4, n_kv_head, 24, n_inner=50, position=position)
    seen = observe(GPT(config).eval(), torch.tensor([1, 2, 3, 4, 5]), None, lambda *_: None)
    letters = {"B": 1, "T": 5, "C": 24, "H": 4, "Hkv": n_kv_head or 4, "D": 6, "V": 11, "inner": 50}
    steps = seen.shapes.steps(config)
    code = "".join(path.read_text(encoding="utf-8") for path in SOURCES)
    for step in steps:
        assert step.code in code
        count, _, shape = step.letters.rpartition(" x ")
        sizes = ", ".join(str(eval(size, {}, letters)) for size in re.split(r",\s*", shape[1:-1]))
        assert step.numbers == (f"{count} x " if count else "") + f"({sizes})", step.name
    assert [step.name for step in steps][0 :: len(steps) - 1] == ["token ids", "logits"]
    assert any("rotate" in step.code for step in steps) is (position == "rotary")
    assert ("2 x (1, 5, 2, 6)" in [step.numbers for step in steps]) is (n_kv_head == 2)
