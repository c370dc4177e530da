"""A checkout of nanoGPT that a user names: what is none is one line."""

import sys
from pathlib import Path

import pytest
import torch

from fastgpt.conversion import nanogpt
from fastgpt.errors import UsageError
from fastgpt.interchange import nanogpt_export
from tests.helpers.exports import exported

TWIN = """
import torch
print("as nanoGPT prints its size")
class GPTConfig:
    def __init__(self, **sizes): self.sizes = sizes
class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        print(config.sizes)
    def load_state_dict(self, weights): self.table = weights["transformer.wte.weight"]
    def forward(self, ids, targets=None):
        assert targets is not None
        return self.table[ids], 0.0
"""


@pytest.fixture
def ckpt(tmp_path: Path) -> Path:
    _, model = exported(mlp="gelu_exact")
    nanogpt_export.write(model, tmp_path, "float16", tmp_path)
    return tmp_path / "ckpt.pt"


def test_its_model_is_run_without_a_word(tmp_path: Path, ckpt: Path, capsys):
    (tmp_path / "model.py").write_text(TWIN)
    before = set(sys.modules), list(sys.path)
    logits = nanogpt.load(ckpt, tmp_path)(torch.tensor([[1, 2, 3]]))
    assert (logits.shape, logits.dtype) == ((1, 3, 16), torch.float32)
    assert not {"model", "_fastgpt_nanogpt_model"} & (set(sys.modules) - before[0])
    assert sys.path == before[1]
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (None, "has no model.py"),
        ("x = ", "its model.py is not nanoGPT's: SyntaxError"),
        ("import nothing_of_this_name", "its model.py is not nanoGPT's: ModuleNotFoundError No module named"),
        ("GPT = 1", "its model.py is not nanoGPT's: AttributeError"),
        (TWIN.replace("self.table =", "raise KeyError if 1 else"), "its model.py is not nanoGPT's: KeyError"),
    ],
)
def test_another_folder_is_one_line(tmp_path: Path, ckpt: Path, source: str | None, said: str):
    if source is not None:
        (tmp_path / "model.py").write_text(source)
    with pytest.raises(UsageError) as error:
        nanogpt.load(ckpt, tmp_path)
    message = str(error.value)
    assert message.startswith(f"`nanogpt` {tmp_path}")
    assert said in message
    assert message.endswith("; name a checkout of github.com/karpathy/nanoGPT")
    assert "\n" not in message
