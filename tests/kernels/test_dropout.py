"""The dropout mask against a Philox in Python integers, which is itself checked against published vectors."""

import pytest
import torch

from fastgpt_kernels import dropout
from fastgpt_kernels.dropout import apply_dropout, dropout_mask

WORD = 0xFFFFFFFF


def philox(counter, key, rounds):
    """Philox 4x32 as published: Salmon et al., SC 2011, figure 2."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(rounds):
        left, right = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (right >> 32) ^ c1 ^ k0, right & WORD, (left >> 32) ^ c3 ^ k1, left & WORD
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return c0, c1, c2, c3


def is_kept(seed, head, row, column, p):
    call = column // 32 * 4 + column % 8 // 2
    words = philox((call, row, head, 0), (seed & WORD, (seed >> 32) & WORD), rounds=7)
    number = (words[column % 32 // 8] >> 16 * (column % 2)) & 0xFFFF
    return number >= round(p * 65536)


def mask(seed, B=1, H=1, Tq=64, Tk=64, p=0.5):
    return dropout_mask(torch.tensor(seed), B, H, Tq, Tk, p)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, [0] * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ([WORD] * 4, [WORD] * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (  # the digits of pi
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_python_twin_gives_random123s_known_answers(counter, key, words):
    assert philox(counter, key, rounds=10) == words


@pytest.mark.parametrize("seed", [0, 1337, 2**62 - 12345, -3])
@pytest.mark.parametrize(("B", "H", "Tq", "Tk", "p"), [(2, 3, 5, 5, 0.25), (1, 2, 3, 71, 0.5), (1, 1, 1, 32, 0.1)])
def test_mask_equals_the_formulas_in_python(seed, B, H, Tq, Tk, p):
    expected = [
        [[[is_kept(seed, b * H + h, i, j, p) for j in range(Tk)] for i in range(Tk - Tq, Tk)] for h in range(H)]
        for b in range(B)
    ]
    assert mask(seed, B, H, Tq, Tk, p).tolist() == expected


@pytest.mark.parametrize("p", [0.1, 0.25, 0.5])
def test_keeps_the_share_it_should(p):
    keep = mask(7, 2, 4, 128, 131, p)
    sigma = (p * (1 - p) / keep.numel()) ** 0.5
    assert abs(keep.double().mean().item() - (1 - p)) < 4 * sigma


def test_the_same_seed_gives_the_same_mask():
    assert torch.equal(mask(7), mask(7))


@pytest.mark.parametrize("other", [8, 7 + 2**32, 7 + 2**61])
def test_another_seed_gives_an_independent_mask(other):
    assert_independent(mask(7), mask(other))


def test_heads_rows_and_columns_are_independent():
    first, second = mask(7, H=2)[0]
    assert_independent(first, second)
    assert_independent(first[1:], first[:-1])
    assert_independent(first[:, 1:], first[:, :-1])
    assert_independent(first[:, 8:], first[:, :-8])


def assert_independent(a, b):
    """Two fair masks agree at half of their places, within 4 standard deviations."""
    assert abs((a == b).double().mean().item() - 0.5) < 4 * 0.5 / a.numel() ** 0.5


@pytest.mark.parametrize("Tq", [1, 3])
def test_fewer_queries_are_the_last_rows_of_the_full_mask(Tq):
    assert torch.equal(mask(7, 2, 3, Tq, 21, 0.25), mask(7, 2, 3, 21, 21, 0.25)[:, :, -Tq:])


def test_a_place_does_not_depend_on_the_size_of_the_mask():
    large = mask(7, 3, 2, 21, 21, 0.25)
    assert torch.equal(mask(7, 2, 2, 5, 5, 0.25), large[:2, :, :5, :5])
    assert torch.equal(mask(7, 1, 6, 21, 21, 0.25).view(3, 2, 21, 21), large)


@pytest.mark.parametrize("chunk", [1, 100, 1 << 20])
def test_mask_does_not_depend_on_the_chunks(chunk, monkeypatch):
    before = mask(7, 2, 5, 13, 17, 0.25)
    monkeypatch.setattr(dropout, "CHUNK", chunk)
    assert torch.equal(mask(7, 2, 5, 13, 17, 0.25), before)


def test_compiled_mask_is_the_same():
    compiled = torch.compile(dropout_mask, backend="eager", fullgraph=True)
    assert torch.equal(compiled(torch.tensor(7), 2, 3, 5, 17, 0.25), mask(7, 2, 3, 5, 17, 0.25))


def test_the_operator_passes_opcheck():
    torch.library.opcheck(torch.ops.fastgpt.dropout_mask.default, (torch.tensor(7), 6, 5, 17, 16384))


def test_rate_zero_keeps_all_and_needs_no_seed():
    weights = torch.rand(1, 2, 3, 3)
    assert mask(7, p=0.0).all()
    assert torch.equal(apply_dropout(weights, None, 0.0), weights)


def test_empty_batch_gives_an_empty_mask():
    assert mask(7, 0, 3, 4, 5).shape == (0, 3, 4, 5)


def test_kept_weights_are_scaled_up_and_the_rest_are_zero():
    weights = torch.rand(2, 3, 5, 5, dtype=torch.float64)
    keep = mask(7, 2, 3, 5, 5, 0.25)
    dropped = apply_dropout(weights, torch.tensor(7), 0.25)
    torch.testing.assert_close(dropped, torch.where(keep, weights / 0.75, 0.0), rtol=1e-15, atol=0)


def test_a_rate_without_a_seed_is_an_error():
    with pytest.raises(ValueError, match=r"dropout_p=0\.25 needs a seed"):
        apply_dropout(torch.rand(1, 1, 2, 2), None, 0.25)
