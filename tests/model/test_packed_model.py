"""Documents side by side in a window are computed as each by itself: logits, loss and gradients."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from fastgpt.config.model import ModelConfig
from fastgpt.data.packing import document_ids
from fastgpt.model.gpt import GPT
from fastgpt.model.positions import positions_in_documents
from fastgpt.ops.table import resolve
from tests.helpers.covering import some
from tests.helpers.packed import logits_alone

V, END = 11, 0
POSITIONS = ("learned", "sinusoidal", "none", "rotary")
WINDOWS = torch.tensor(
    [
        [5, 7, END, 3, END, END, 8, 9, 2],  # begins within a document; two ends in a row
        [END, 4, 6, 4, 1, 5, END, 3, END],  # begins and ends with an end
        [6, 1, 2, 8, 3, 9, 4, 7, 5],  # a part of one document
    ]
)
TOKENS, TARGETS = WINDOWS[:, :-1], WINDOWS[:, 1:]


def make(position: str, backend: str, **changes) -> GPT:
    """A small model with weights so large that attention is far from even."""
    shape = {"vocab_size": V, "block_size": 8, "n_layer": 2, "n_head": 2, "n_embd": 16, **changes}
    torch.manual_seed(0)
    model = GPT(ModelConfig(position=position, **shape), resolve(backend))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5 if parameter.dim() == 2 else 1)
    return model


def results(model: GPT, loss: torch.Tensor, logits: torch.Tensor) -> list[torch.Tensor]:
    """Loss, logits, and the gradient of each parameter."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    assert "wte.weight" in names
    return [loss.detach(), logits.detach(), *torch.autograd.grad(loss, parameters)]


def of_packed(model: GPT) -> list[torch.Tensor]:
    ids = document_ids(TOKENS, END)
    return results(model, model(TOKENS, TARGETS, doc_ids=ids), model(TOKENS, doc_ids=ids))


def of_each_alone(model: GPT) -> list[torch.Tensor]:
    logits = logits_alone(model, TOKENS, END)
    return results(model, F.cross_entropy(logits.flatten(0, 1), TARGETS.flatten()), logits)


def assert_equal(found: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float) -> None:
    for a, b in zip(found, expected, strict=True):
        assert ((a - b).norm() / b.norm()).item() < tolerance


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("n_kv_head", [2, 1])
def test_a_packed_window_is_each_document_by_itself(position: str, backend: str, n_kv_head: int):
    model = make(position, backend, n_kv_head=n_kv_head).double()
    assert_equal(of_packed(model), of_each_alone(model), 1e-12)
    assert not torch.allclose(model(TOKENS), model(TOKENS, doc_ids=document_ids(TOKENS, END)), atol=1e-3)


@pytest.mark.parametrize("position", some(2, POSITIONS))
def test_so_it_is_in_our_own_kernels(position: str):
    pytest.importorskip("triton", reason="needs Triton")
    model = make(position, "triton", n_layer=1)
    assert_equal(of_packed(model), of_each_alone(model), 1e-5)


@pytest.mark.parametrize("backend", some(1, ["torch", "reference"]))
def test_it_compiles_in_one_graph(backend: str):
    model = make("rotary", backend)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss = compiled(TOKENS, TARGETS, doc_ids=document_ids(TOKENS, END))
    expected = of_packed(model)
    assert_equal([loss, *torch.autograd.grad(loss, tuple(model.parameters()))], [expected[0], *expected[2:]], 1e-5)


def test_ids_of_one_document_change_nothing():
    model = make("learned", "torch")
    torch.testing.assert_close(model(TOKENS, doc_ids=torch.full_like(TOKENS, 7)), model(TOKENS))


@given(ids=st.lists(st.lists(st.integers(-2, 2), min_size=9, max_size=9), max_size=4))
def test_positions_count_from_the_last_change_of_the_ids(ids: list[list[int]]):
    expected = [[i for _, run in itertools.groupby(row) for i, _ in enumerate(run)] for row in ids]
    found = positions_in_documents(torch.tensor(ids, dtype=torch.int32).view(-1, 9))
    assert found.dtype == torch.int64
    assert found.tolist() == expected
