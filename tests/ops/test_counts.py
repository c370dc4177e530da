"""Counts of operations and bytes, by hand."""

import pytest

from fastgpt.ops.counts import Count, count


def test_counts_by_hand():
    attention = {"B": 2, "T": 3, "H": 4, "D": 8}
    # 6 pairs of a query and a key that it sees, two products of 2 * 8 operations each, for 2 * 4 heads
    assert count("causal_attention", "forward", attention, 2) == Count(6 * 2 * 16 * 8, 4 * (2 * 3 * 4 * 8) * 2)
    assert count("causal_attention", "backward", attention, 2) == Count(
        2.5 * 6 * 2 * 16 * 8, 8 * (2 * 3 * 4 * 8) * 2 + 2 * 3 * 4 * 4
    )
    loss = {"N": 5, "C": 7, "V": 11}
    assert count("linear_cross_entropy", "both", loss, 4) == Count(3 * 2 * 5 * 7 * 11, 2 * (5 * 7 + 11 * 7) * 4 + 5 * 8)
    assert count("layer_norm", "forward", {"N": 5, "C": 7}, 4).bytes == (5 + 5 + 2) * 7 * 4
    assert count("add_layer_norm", "forward", {"N": 5, "C": 7}, 4).bytes == (4 * 5 + 2) * 7 * 4
    assert count("rms_norm", "forward", {"N": 5, "C": 7}, 4) == Count(4 * 35, (5 + 5 + 1) * 7 * 4)
    # x, dy, dx of every row; the weight and its gradient; each row's deviation
    assert count("rms_norm", "backward", {"N": 5, "C": 7}, 4) == Count(9 * 35, (3 * 5 + 2) * 7 * 4 + 5 * 4)
    assert count("add_rms_norm", "forward", {"N": 5, "C": 7}, 4) == Count(5 * 35, (4 * 5 + 1) * 7 * 4)
    assert count("add_rms_norm", "backward", {"N": 5, "C": 7}, 4) == Count(10 * 35, (4 * 5 + 2) * 7 * 4 + 5 * 4)
    assert count("swiglu", "both", {"N": 5, "C": 7}, 4) == Count(15 * 35, (3 + 5) * 35 * 4)
    assert count("relu2", "both", {"N": 5, "C": 7}, 4) == Count(5 * 35, (2 + 3) * 35 * 4)
    assert count("linear_int8", "forward", {"N": 1, "C": 6, "out": 10}, 2) == Count(120, 60 + 40 + 32)


def test_counts_of_attention_with_shared_heads_and_cached_keys_by_hand():
    # 2 queries, of which the first sees 5 + 1 keys and the second 5 + 2; q and out have 4 heads, k and v 2
    shape = {"B": 3, "T": 2, "H": 4, "D": 8, "Hkv": 2}
    cached = count("causal_attention", "forward", shape | {"cached": 5}, 4)
    assert cached == Count((6 + 7) * 2 * 16 * 3 * 4, (2 * (3 * 2 * 4 * 8) + 2 * (3 * 7 * 2 * 8)) * 4)
    # q, out, dout, dq of 4 heads, k, v, dk, dv of 2, and the log-sum-exp
    assert count("causal_attention", "backward", shape, 4).bytes == 4 * (3 * 2 * 8 * (4 + 2)) * 4 + 3 * 2 * 4 * 4


@pytest.mark.parametrize(
    ("op", "direction", "shape", "flops", "numbers"),
    [
        ("linear", "forward", {"N": 5, "C": 3, "out": 7}, 2 * 5 * 3 * 7, 5 * 3 + 7 * 3 + 5 * 7),
        ("linear", "forward", {"N": 5, "C": 3, "out": 7, "bias": 1}, 2 * 5 * 3 * 7 + 35, 5 * 3 + 7 * 3 + 7 + 5 * 7),
        ("linear", "backward", {"N": 5, "C": 3, "out": 7}, 2 * 2 * 5 * 3 * 7, 2 * 5 * 3 + 2 * 7 * 3 + 5 * 7),
        ("activation", "forward", {"N": 5, "C": 3}, 9 * 15, 2 * 15),
        ("activation", "backward", {"N": 5, "C": 3}, 16 * 15, 3 * 15),
        ("gradient_norm", "forward", {"P": 11}, 22, 11),
        ("adamw", "forward", {"P": 11}, 15 * 11, 7 * 11),
        # 5 rows are written, the tokens' and those of 2 positions read, and the tokens themselves: 2 float32 each
        ("embedding", "forward", {"N": 5, "C": 3, "V": 4, "positions": 2}, 15, (5 + 4 + 2) * 3 + 2 * 5),
        ("embedding", "backward", {"N": 5, "C": 3, "V": 9}, 15, (5 + 2 * 5) * 3 + 2 * 5),
    ],
)
def test_counts_of_what_a_step_needs_beyond_the_table(op: str, direction: str, shape: dict, flops: int, numbers: int):
    assert count(op, direction, shape, 4) == Count(flops, numbers * 4)


def test_both_directions_are_summed():
    shape = {"N": 2, "C": 3}
    assert count("dropout", "both", shape, 2) == Count(2 * 6 + 6, 2 * (2 * 2 + 1) * 6)
