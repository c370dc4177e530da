"""The rule by which `--kernels auto` trusts a backend, held against the rule of the kernels' tests."""

import re

import pytest
import torch

from fastgpt.ops.agreement import disagreement
from tests.helpers.parity import assert_parity, half_an_ulp, limit, relative_errors

TRUTH = torch.linspace(-3, 5, 4000, dtype=torch.float64)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def off_by(error: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (TRUTH * (1 + error)).to(dtype)


def verdict(got, stock, truth=TRUTH, arithmetic=torch.float32, tf32=False) -> str:
    return disagreement({"out": got}, {"out": stock}, {"out": truth}, arithmetic, tf32)


def passes_the_tests_rule(got, stock, narrow: bool) -> bool:
    """Whether `assert_parity` lets it through; a second result, which is right, tells it of 16 bits on the way."""
    other, right = torch.zeros((), dtype=torch.float16 if narrow else torch.float32), torch.zeros(())
    try:
        assert_parity([got, other], [stock, other], [TRUTH, right])
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize("stock_error", [0.0, 1e-6, 3e-5, 4e-3])
@pytest.mark.parametrize(
    ("arithmetic", "dtype"), [(a, d) for a in DTYPES for d in DTYPES if d in (a, torch.float32)], ids=str
)
def test_it_allows_what_the_tests_allow(arithmetic, dtype, stock_error):
    stock, narrow = off_by(stock_error, dtype), arithmetic != torch.float32
    allowed = min(limit(dtype, TRUTH, error, narrow) for error in relative_errors(stock, TRUTH))
    verdicts = []
    for factor in (0.0, 0.5, 0.9, 1.1, 3.0):
        got = off_by(factor * allowed, dtype)
        verdicts.append(verdict(got, stock, arithmetic=arithmetic) == "")
        assert verdicts[-1] is passes_the_tests_rule(got, stock, narrow)
    assert verdicts[0]
    assert not verdicts[-1]


def test_float32_is_held_to_1e_5_however_bad_stock_is():
    assert verdict(off_by(0.9e-5), TRUTH.float()) == ""
    assert verdict(off_by(1.1e-5), off_by(1e-2)) == "out is off by 1.1e-05, with 1.0e-05 allowed"
    assert verdict(off_by(1.1e-5), off_by(1e-2), tf32=True) == ""
    assert verdict(off_by(3e-2), off_by(1e-2), tf32=True) == "out is off by 3.0e-02, with 2.0e-02 allowed"


def test_one_large_error_among_many_numbers_is_seen():
    got = TRUTH.float()
    got[7] += 1e-3
    assert "out is off by" in verdict(got, TRUTH.float())


def test_a_single_number_from_16_bits_may_be_off_by_half_an_ulp_of_them_however_lucky_stock_was():
    truth = torch.tensor(10.8, dtype=torch.float64)
    allowed = half_an_ulp(torch.bfloat16, 10.8)
    for error, fits in ((0.9, True), (1.1, False)):
        got = (truth + error * allowed).float()
        assert (verdict(got, truth.float(), truth, torch.bfloat16) == "") is fits
        assert verdict(got, truth.float(), truth) != ""
        assert verdict(got.repeat(2), truth.float().repeat(2), truth.repeat(2), torch.bfloat16) != ""


@pytest.mark.parametrize(
    ("got", "why"),
    [
        (TRUTH.float()[1:], r"out is torch.float32 \(3999,\), not torch.float32 \(4000,\)"),
        (TRUTH.half(), r"out is torch.float16 \(4000,\), not torch.float32 \(4000,\)"),
        (TRUTH.float() / 0, "out is not finite"),
        (TRUTH.float().where(TRUTH < 4.9, float("nan")), "out is not finite"),
    ],
)
def test_another_shape_dtype_or_no_number_is_named(got, why):
    assert re.fullmatch(why, verdict(got, TRUTH.float()))


def test_zeros_are_zeros():
    zero = torch.zeros(3)
    assert verdict(zero, zero, zero.double()) == ""
    assert verdict(zero + 1e-30, zero, zero.double()) == "out should be zero"


def test_the_first_of_several_results_that_is_wrong_is_named():
    right = {"a": TRUTH.float(), "b": TRUTH.float(), "c": TRUTH.float()}
    truth = dict.fromkeys(right, TRUTH)
    got = right | {"b": off_by(1e-3), "c": off_by(1e-2)}
    assert disagreement(got, right, truth, torch.float32).startswith("b is off by 1.0e-03")
    assert disagreement(right, right, truth, torch.float32) == ""
