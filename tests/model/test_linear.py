"""`linear` equals F.linear, on the path that one row takes on several cores too."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from fastgpt.model.linear import FEWEST_WEIGHTS, Linear, linear, one_row_slices, store_by_columns

SIZES = [(256, 300), (384, 257), (1000, 999), (513, 131), (2, 1 << 15), (64, 1024), (50304, 32)]  # (O, I)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(("O", "I"), SIZES)
@pytest.mark.parametrize("lead", [(), (1,), (1, 1), (3,), (2, 5), (1, 4)])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.covering_array(2)
def test_it_equals_torchs_linear(O: int, I: int, lead: tuple[int, ...], biased: bool, grad: bool):  # noqa: E741
    x, weight, bias = draw(*lead, I), draw(O, I), draw(O) if biased else None
    with torch.set_grad_enabled(grad):
        got = linear(x, weight, bias)
    wanted = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert got.shape == (*lead, O)
    # A sum of I products of unit normals rounds by about sqrt(I) * 2**-24 at each of its steps.
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=I * 2**-23)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(
    ("threads", "O", "slices"), [(2, 256, 4), (2, 514, 2), (2, 513, 1), (3, 256, 8), (8, 384, 16), (8, 1000, 8)]
)
def test_one_row_is_cut_into_two_or_more_slices_a_core_where_they_divide(threads: int, O: int, slices: int):  # noqa: E741
    torch.set_num_threads(threads)
    with torch.no_grad():
        assert one_row_slices(draw(1, 1, 512), draw(O, 512)) == slices
        assert O % slices == 0


@pytest.mark.usefixtures("two_threads")
def test_only_one_large_float32_row_without_grad_is_cut():
    weight = draw(256, 512)
    with torch.no_grad():
        assert one_row_slices(draw(512), weight) > 1
        assert one_row_slices(draw(2, 512), weight) == 1
        assert one_row_slices(draw(0, 512), weight) == 1
        assert one_row_slices(draw(1, 512).bfloat16(), weight.bfloat16()) == 1
        assert one_row_slices(draw(1, 16), draw(FEWEST_WEIGHTS // 16 - 2, 16)) == 1
        torch.set_num_threads(1)
        assert one_row_slices(draw(512), weight) == 1
    torch.set_num_threads(2)
    assert one_row_slices(draw(1, 512), weight) == 1  # gradients may be asked for


@pytest.mark.usefixtures("two_threads")
def test_the_cut_product_is_what_linear_computes(monkeypatch):
    called = []
    monkeypatch.setattr(torch, "bmm", lambda a, b, bmm=torch.bmm: called.append(a.shape) or bmm(a, b))
    with torch.inference_mode():
        linear(draw(1, 512), draw(256, 512))
        linear(draw(2, 512), draw(256, 512))
    assert called == [(4, 1, 512)]


@pytest.mark.usefixtures("two_threads")
def test_weights_and_rows_may_be_views():
    by_columns, by_rows, bias = draw(512, 256).t(), draw(256, 512), draw(256)
    with torch.no_grad():
        for weight in (by_columns, by_rows):
            for x in (draw(1, 1, 512), draw(512, 3)[:, 1]):
                assert (one_row_slices(x, weight) > 1) == x.is_contiguous()
                expected = F.linear(x.double(), weight.double(), bias.double())
                torch.testing.assert_close(linear(x, weight, bias).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("two_threads")
def test_storing_by_columns_keeps_the_values_and_cuts_the_inputs():
    layer = Linear(512, 256)
    before = layer.weight.detach().clone()
    store_by_columns(nn.Sequential(layer))
    assert torch.equal(layer.weight, before)
    assert layer.weight.stride() == (1, 256)
    x = draw(1, 512)
    with torch.no_grad():
        assert one_row_slices(x, layer.weight) > 1
        torch.testing.assert_close(layer(x), F.linear(x, before, layer.bias), rtol=1e-4, atol=1e-4)


def test_the_layer_is_nn_linear_with_gradients():
    ours, theirs = Linear(12, 7), nn.Linear(12, 7)
    theirs.load_state_dict(ours.state_dict())
    x = draw(3, 12)
    ours(x).square().sum().backward()
    theirs(x).square().sum().backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
