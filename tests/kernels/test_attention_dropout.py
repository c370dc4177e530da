"""Attention's dropout: the mask in each kernel, bit for bit, as `dropout_mask` gives it, and what is done with it."""

import contextlib
import types
import unittest.mock

import pytest
import torch

from fastgpt_kernels import attention, attention_backward, launch
from fastgpt_kernels.attention import causal_attention
from fastgpt_kernels.dropout import dropout_mask
from fastgpt_kernels.reference import visible
from tests.helpers.covering import some
from tests.helpers.parity import DEVICE, SPREADS, assert_parity, flash_with_mask, outputs_and_gradients

tiles = pytest.mark.parametrize("tile", some(3, [(None,), ((16, 32),), ((64, 32),), ((32, 128),)]))


@contextlib.contextmanager
def tiled(tile):
    """Meanwhile attention's kernels work on this tile (rows, columns); None for those of the launch table."""
    if tile is None:
        yield
        return
    tuning = types.SimpleNamespace(kind="float32", row=lambda kernel, width: launch.Config(*tile, 4))
    patch = unittest.mock.patch.object
    with (
        patch(attention, "matmul_tuning", return_value=tuning),
        patch(attention_backward, "matmul_tuning", return_value=tuning),
    ):
        yield


def seed_of(number):
    return torch.tensor(number, device=DEVICE)


def unit_vectors(B, T, H, D):
    """(B, T, H, D) whose row i is the i-th unit vector."""
    return torch.eye(T, D, device=DEVICE)[None, :, None].repeat(B, 1, H, 1)


def forward_mask(seed, B, H, Hkv, Tq, Tk, p):
    """What the forward kernel keeps of the visible weights, (B, H, Tq, Tk): values are unit vectors."""
    q, k = torch.zeros(B, Tq, H, 128, device=DEVICE), torch.zeros(B, Tk, Hkv, 128, device=DEVICE)
    parts = []
    for first in range(0, Tk, 128):
        v = torch.zeros(B, Tk, Hkv, 128, device=DEVICE)
        n = min(128, Tk - first)
        v[:, first : first + n] = unit_vectors(B, n, Hkv, 128)
        parts.append(causal_attention(q, k, v, dropout_p=p, seed=seed)[..., :n])
    return torch.cat(parts, dim=-1).transpose(1, 2) != 0


def backward_masks(seed, B, H, Tq, Tk, p):
    """What the backward kernels keep of the visible weights, (B, H, Tq, Tk): on the way to dq, dk and dv.

    With unit vectors as queries, keys and output gradients, values of one, and a delta of zero, each weight that is
    kept alone decides one number of each gradient.
    """
    D = max(Tq, Tk)
    q, k = unit_vectors(B, Tq, H, D), unit_vectors(B, Tk, H, D)
    out, lse = torch.zeros_like(q), torch.zeros(B, H, Tq, device=DEVICE)
    gradients = torch.ops.fastgpt.attention_backward(q, out, lse, q, k, torch.ones_like(k), seed, None, p, 0.5)
    dq, dk, dv = (t.transpose(1, 2) != 0 for t in gradients)
    return dq[..., :Tk], dk[..., :Tq].mT, dv[..., :Tq].mT


SEEDS = [0, 3, -1, -(2**62) - 7, 2**32 + 5, 2**63 - 1]
SEEDS_AND_RATES = [*((seed, 0.3) for seed in SEEDS), (3, 1e-6), (3, 0.999), (3, 0.999999)]


@tiles
@pytest.mark.parametrize(
    ("B", "H", "Tq", "Tk", "p", "seed"),
    [(2, 2, 17, 17, 0.25, -1), (1, 1, 70, 70, 0.5, 3), (1, 2, 3, 130, 0.1, 2**32 + 5)],
)
@pytest.mark.covering_array(1)
def test_every_kernel_keeps_what_the_mask_says(B, H, Tq, Tk, p, seed, tile):
    seed = seed_of(seed)
    expected = dropout_mask(seed, B, H, Tq, Tk, p) & visible(Tq, Tk, None, seed.device)
    with tiled(tile):
        assert torch.equal(forward_mask(seed, B, H, H, Tq, Tk, p), expected)
        for name, mask in zip(("dq", "dk", "dv"), backward_masks(seed, B, H, Tq, Tk, p), strict=True):
            assert torch.equal(mask, expected), name


@pytest.mark.parametrize(("seed", "p"), some(2, SEEDS_AND_RATES))
def test_every_seed_and_rate_gives_that_mask(seed, p):
    seed = seed_of(seed)
    expected = dropout_mask(seed, 1, 2, 33, 34, p) & visible(33, 34, None, seed.device)
    assert torch.equal(forward_mask(seed, 1, 2, 1, 33, 34, p), expected)
    assert all(torch.equal(mask, expected) for mask in backward_masks(seed, 1, 2, 33, 34, p))


def test_a_weight_far_down_a_long_context_has_its_own_number():
    seed = seed_of(11)
    expected = dropout_mask(seed, 1, 1, 1, 4097, 0.5)[..., 4064:]
    q, k, v = torch.zeros(1, 1, 1, 64, device=DEVICE), *torch.zeros(2, 1, 4097, 1, 64, device=DEVICE)
    v[:, 4064:] = unit_vectors(1, 33, 1, 64)
    assert torch.equal(causal_attention(q, k, v, dropout_p=0.5, seed=seed)[..., :33] != 0, expected)


@pytest.mark.parametrize("p", some(1, [0.1, 0.25, 0.5]))
def test_keeps_the_share_it_should(p):
    places = visible(100, 100, None, torch.device(DEVICE)).expand(2, 2, 100, 100)
    kept = forward_mask(seed_of(7), 2, 2, 2, 100, 100, p)[places]
    sigma = (p * (1 - p) / kept.numel()) ** 0.5
    assert abs(kept.double().mean().item() - (1 - p)) < 4 * sigma


def attention_with_mask(q, k, v, *, keep, p, scale, doc_ids=None):
    """The definition, with the mask given: keep (B, H, Tq, Tk), of weights that are then divided by 1 - p."""
    k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], dim=2) for t in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * scale
    seen = visible(q.shape[1], k.shape[1], doc_ids, q.device)
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1) * keep / (1 - p)
    return torch.einsum("bhij,bjhd->bihd", weights, v)


TILED = [(33, 67, (16, 32)), (33, 67, None), (70, 70, None), (20, 67, (64, 32))]


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize(("Tq", "Tk", "tile"), some(2, TILED))
@pytest.mark.covering_array(1)
def test_forward_and_backward_use_the_mask_that_the_forward_shows(Tq, Tk, dtype, tile, spread):
    torch.manual_seed(0)
    p, scale, seed = 0.25, 0.25 * spread, seed_of(2**40 + 5)
    inputs = [torch.randn(1, T, heads, 16, device=DEVICE).to(dtype) for T, heads in ((Tq, 2), (Tk, 1), (Tk, 1))]
    grad = torch.randn(1, Tq, 2, 16, device=DEVICE).to(dtype)
    doc_ids = torch.randint(2, (1, Tk), device=DEVICE)
    with tiled(tile):
        keep = forward_mask(seed, 1, 2, 1, Tq, Tk, p)
        arguments = {"dropout_p": p, "seed": seed, "scale": scale, "doc_ids": doc_ids}
        ours = outputs_and_gradients(causal_attention, inputs, [grad], **arguments)
    arguments = {"keep": keep, "p": p, "scale": scale, "doc_ids": doc_ids}
    plain = flash_with_mask(*inputs, grad, **arguments)
    truth = outputs_and_gradients(attention_with_mask, [t.double() for t in inputs], [grad.double()], **arguments)
    assert_parity(ours, plain, truth, ["out", "dq", "dk", "dv"], spread=spread)


def test_a_seed_without_dropout_changes_nothing():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 20, 1, 16, device=DEVICE)
    plain = causal_attention(q, k, v)
    assert torch.equal(causal_attention(q, k, v, seed=seed_of(3)), plain)
    assert not torch.equal(causal_attention(q, k, v, dropout_p=0.5, seed=seed_of(3)), plain)


@pytest.mark.parametrize("tile", some(1, [((16, 32),), ((32, 128),)]))
def test_tiles_change_the_rounding_alone(tile):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 130, 1, 16, device=DEVICE)
    whole = causal_attention(q, k, v, dropout_p=0.5, seed=seed_of(3))
    with tiled(tile):
        parts = causal_attention(q, k, v, dropout_p=0.5, seed=seed_of(3))
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)
