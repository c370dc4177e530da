"""The reference backend against plain Python loops, so that the other backends' yardstick is itself checked."""

import math

import pytest
import torch

from fastgpt_kernels import reference
from fastgpt_kernels.dropout import dropout_mask


def attention_by_loops(q, k, v, scale, keep, p, doc_ids):
    """Each query by itself, in Python floats: score the keys it may see, softmax, weigh their values."""
    (B, Tq, H, D), (_, Tk, Hkv, _) = q.shape, k.shape
    q, k, v, out = q.tolist(), k.tolist(), v.tolist(), torch.zeros(B, Tq, H, D, dtype=torch.float64)
    for b in range(B):
        for i in range(Tq):
            here = Tk - Tq + i
            keys = [j for j in range(here + 1) if doc_ids is None or doc_ids[b][j] == doc_ids[b][here]]
            for h in range(H):
                group = h * Hkv // H
                powers = [math.exp(scale * sum(q[b][i][h][d] * k[b][j][group][d] for d in range(D))) for j in keys]
                for j, power in zip(keys, powers, strict=True):
                    kept = 1.0 if keep is None else float(keep[b, h, i, j]) / (1 - p)
                    for d in range(D):
                        out[b, i, h, d] += kept * power / sum(powers) * v[b][j][group][d]
    return out


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("documents", [None, [[0, 0, 1, 1, 1], [7, 7, 7, 7, 2]]])
@pytest.mark.parametrize(("Tq", "H", "Hkv", "scale"), [(5, 2, 2, None), (3, 4, 2, 0.3), (1, 3, 1, 2.0)])
def test_attention_is_softmax_over_the_visible_keys(Tq, H, Hkv, scale, documents, p):
    torch.manual_seed(0)
    q = torch.randn(2, Tq, H, 3, dtype=torch.float64)
    k, v = torch.randn(2, 2, 5, Hkv, 3, dtype=torch.float64)
    seed = torch.tensor(5)
    keep = dropout_mask(seed, 2, H, Tq, 5, p) if p else None
    expected = attention_by_loops(q, k, v, scale or 3**-0.5, keep, p, documents)
    doc_ids = None if documents is None else torch.tensor(documents)
    y = reference.causal_attention(q, k, v, dropout_p=p, seed=seed, scale=scale, doc_ids=doc_ids)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
def test_layer_norm_is_mean_variance_scale(bias):
    torch.manual_seed(0)
    x, w, b = torch.randn(3, 5, dtype=torch.float64) * 3 + 1, torch.randn(5).double(), torch.randn(5).double()
    y = reference.layer_norm(x, w, b if bias else None, eps=0.1)
    for row, got in zip(x.tolist(), y.tolist(), strict=True):
        mean = sum(row) / 5
        variance = sum((value - mean) ** 2 for value in row) / 5
        for c, value in enumerate(row):
            expected = (value - mean) / math.sqrt(variance + 0.1) * w[c].item() + (b[c].item() if bias else 0)
            assert got[c] == pytest.approx(expected, rel=1e-12)


def test_add_layer_norm_returns_the_sum_and_its_norm():
    torch.manual_seed(0)
    x, r, w = torch.randn(3, 4, 5), torch.randn(3, 4, 5), torch.randn(5)
    total, y = reference.add_layer_norm(x, r, w)
    assert torch.equal(total, x + r)
    assert torch.equal(y, reference.layer_norm(x + r, w))


@pytest.mark.parametrize("gain", [True, False])
def test_rms_norm_divides_by_the_root_of_the_mean_square(gain):
    torch.manual_seed(0)
    x, w = torch.randn(3, 5, dtype=torch.float64) * 3 + 1, torch.randn(5).double()
    y = reference.rms_norm(x, w if gain else None, eps=0.1)
    for row, got in zip(x.tolist(), y.tolist(), strict=True):
        root = math.sqrt(sum(value**2 for value in row) / 5 + 0.1)
        for c, value in enumerate(row):
            assert got[c] == pytest.approx(value / root * (w[c].item() if gain else 1), rel=1e-12)


def test_add_rms_norm_returns_the_sum_and_its_norm():
    torch.manual_seed(0)
    x, r, w = torch.randn(3, 4, 5), torch.randn(3, 4, 5), torch.randn(5)
    for weight in (w, None):
        total, y = reference.add_rms_norm(x, r, weight, eps=0.1)
        assert torch.equal(total, x + r)
        assert torch.equal(y, reference.rms_norm(x + r, weight, eps=0.1))


def test_swiglu_gates_the_second_half_by_the_first():
    torch.manual_seed(0)
    x = torch.randn(3, 8, dtype=torch.float64) * 3
    for row, got in zip(x.tolist(), reference.swiglu(x).tolist(), strict=True):
        expected = [a / (1 + math.exp(-a)) * b for a, b in zip(row[:4], row[4:], strict=True)]
        assert got == pytest.approx(expected, rel=1e-12)


def test_relu2_squares_what_is_positive():
    assert reference.relu2(torch.tensor([[-3.0, -0.0], [0.5, 4.0]])).tolist() == [[0.0, 0.0], [0.25, 16.0]]


@pytest.mark.parametrize("valid", [None, 4])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy_is_minus_the_log_of_the_targets_share(reduction, valid):
    torch.manual_seed(0)
    x, weight = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    targets = [1, -7, 3, 0, 2, -7]
    losses = []
    for row, target in zip(x.flatten(0, 1).tolist(), targets, strict=True):
        powers = [math.exp(sum(a * b for a, b in zip(row, w, strict=True))) for w in weight[:valid].tolist()]
        losses.append(0.0 if target == -7 else -math.log(powers[target] / sum(powers)))
    expected = {"mean": sum(losses) / 4, "sum": sum(losses), "none": [losses[:3], losses[3:]]}[reduction]
    loss = reference.linear_cross_entropy(
        x, weight, torch.tensor(targets).view(2, 3), ignore_index=-7, valid_vocab=valid, reduction=reduction
    )
    torch.testing.assert_close(loss, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_gradients_are_the_slopes_of_the_forward():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, T, H, 3, dtype=torch.float64).requires_grad_() for T, H in ((2, 2), (4, 1), (4, 1)))
    seed, doc_ids = torch.tensor(5), torch.tensor([[0, 1, 1, 1]])

    def attend(q, k, v):
        return reference.causal_attention(q, k, v, dropout_p=0.25, seed=seed, doc_ids=doc_ids)

    def loss(x, weight):
        return reference.linear_cross_entropy(x, weight, torch.tensor([[1, -100]]), valid_vocab=4)

    assert torch.autograd.gradcheck(attend, (q, k, v))
    assert torch.autograd.gradcheck(loss, (q[:, :, 0], torch.randn(6, 3).double().requires_grad_()))
