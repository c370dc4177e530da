"""The attention kernels: parity with float64 and stock PyTorch, guarded and poisoned; tiles; operators; bad input."""

import contextlib
import math
import types
import unittest.mock

import pytest
import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from fastgpt_kernels import attention, attention_backward, launch, reference, torch_ops
from fastgpt_kernels.attention import causal_attention
from tests.helpers.covering import some
from tests.helpers.parity import (
    DEVICE,
    FLOAT32_LIMIT,
    LAYOUTS,
    SPREADS,
    assert_op_agrees,
    flash,
    outputs_and_gradients,
    relative_errors,
    zeros,
)
from tests.helpers.random_cases import random_cases

DTYPES = [torch.float32, torch.float16]
KERNELS = ("attention_forward", "attention_backward_queries", "attention_backward_keys")
LIMITS = {torch.float32: FLOAT32_LIMIT, torch.float16: 2**-10}
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float16"])


def random(*shape, dtype=torch.float32):
    return torch.randn(shape, device=DEVICE).to(dtype)


def packed(B, Tq, Tk, H, Hkv, D, dtype=torch.float32, spread=1):
    """q, k and v as views of one packed projection (B, Tk, (H + 2 Hkv) D); the last Tq queries."""
    qkv = random(B, Tk, (H + 2 * Hkv) * D, dtype=dtype).view(B, Tk, H + 2 * Hkv, D)
    qkv[:, :, : H + Hkv] *= spread**0.5
    return [qkv[:, Tk - Tq :, :H], *qkv[:, :, H:].split(Hkv, dim=2)]


def fused(*inputs, **arguments):
    """Stock PyTorch's fused kernel, also where products would be preferred.

    Like ours, its backward pass takes delta from the rounded output, which is most of the error of wide scores.
    """
    with unittest.mock.patch.object(torch_ops, "prefers_products", return_value=False):
        return torch_ops.causal_attention(*inputs, **arguments)


def seeded(number, p=0.25):
    return {"dropout_p": p, "seed": torch.tensor(number, device=DEVICE)}


@contextlib.contextmanager
def tiled(*tiles):
    """Meanwhile attention's three kernels work on these tiles (rows, columns): one for all of them, or one each."""
    rows = dict(zip(KERNELS, tiles if len(tiles) > 1 else tiles * 3, strict=True))

    def row(kernel, width):
        return launch.Config(*rows[kernel.removesuffix("_dropout")], 4)

    tuning = types.SimpleNamespace(kind="float32", row=row)
    patch = unittest.mock.patch.object
    with (
        patch(attention, "matmul_tuning", return_value=tuning),
        patch(attention_backward, "matmul_tuning", return_value=tuning),
    ):
        yield


TABLE = {kernel + suffix: launch.TABLE[kernel + suffix] for kernel in KERNELS for suffix in ("", "_dropout")}
SIDES = {side for table in TABLE.values() for rows in table.values() for row in rows.values() for side in row[:2]}
EDGES = sorted({T for side in SIDES for T in (side - 1, side, side + 1) if T <= 300})
HEADS = [(1, 1), (2, 2), (2, 1), (3, 1), (4, 2)]


@random_cases(2, 60, data=st.data(), seed=st.integers(0, 999))
@dtypes
def test_agrees_at_any_shape_and_layout(dtype, data, seed):
    torch.manual_seed(seed)

    def draw(name, *choices):
        return data.draw(
            st.one_of(*choices) if isinstance(choices[0], st.SearchStrategy) else st.sampled_from(choices), name
        )

    Tk = draw("Tk", st.sampled_from(EDGES), st.integers(2, 70), st.integers(71, 300))
    Tq = draw("Tq", st.just(Tk), st.integers(1, Tk))
    B = draw("B", 1, 1, 2, 0) if Tk < 100 else 1
    H, Hkv = draw("heads", *HEADS[: 5 if Tk < 100 else 2])
    D = draw("D", 8, 16, 20, 32, 64, 80, 128, 256)
    p = draw("dropout_p", 0.0, 0.0, 0.1, 0.5)
    spread = draw("spread", *SPREADS) if not p else 1  # with dropout: test_attention_dropout.py
    inputs = packed(B, Tq, Tk, H, Hkv, D, dtype, spread)
    wide = ["expanded", "constant"] if dtype == torch.float32 else []
    for i, letter in enumerate("qkv"):  # of equal keys or values scores would have no gradient
        layout = draw(letter, "packed", "gapped", "swapped", "transposed", *(wide if i == 0 else []))
        if layout != "packed":
            width = 1 if letter == "v" else spread**0.5
            inputs[i] = LAYOUTS[layout](inputs[i].shape, lambda shape, width=width: random(*shape, dtype=dtype) * width)
    arguments = {"scale": draw("scale", None, D**-0.5 / 3, D**-0.5 * 1.5)}
    documents = draw("documents", 0, 0, 1, 2, 5)
    if documents:
        arguments["doc_ids"] = torch.randint(
            documents, (B, Tk), device=DEVICE, dtype=draw("ids", torch.int64, torch.int32)
        )
    # With one key, or one that has all the weight, a query has no gradient to measure by but rounding errors, and with
    # a few numbers stock's error is a matter of luck.
    one_hot = torch.eye(Tk, device=DEVICE, dtype=torch.float64)[:, None].expand(B, Tk, Hkv, Tk)
    weights = reference.causal_attention(*(t.double() for t in inputs[:2]), one_hot, **arguments)
    assume(B == 0 or (weights.amax(-1) < 0.99).sum() * D >= (32 if dtype == torch.float32 else 2048))
    if p:
        arguments |= seeded(seed - 500, p)
    tile = draw("tile", None, (16, 32), (64, 32), (32, 128)) if Tk < 100 else None
    other = fused if DEVICE == "cpu" or p else flash
    with tiled(tile) if tile else contextlib.nullcontext():
        layout = draw("grad_out", *LAYOUTS)
        assert_op_agrees(
            causal_attention, "causal_attention", inputs, other=other, layout=layout, spread=spread, **arguments
        )


@pytest.mark.parametrize("documents", [1, 2])
def test_the_formulas_that_wide_scores_are_held_against_are_right(documents):
    torch.manual_seed(0)
    doc_ids = torch.randint(documents, (2, 67), device=DEVICE)
    inputs = packed(2, 40, 67, 4, 2, 16)
    assert_op_agrees(flash, "causal_attention", inputs, scale=0.3, doc_ids=doc_ids)


def tiles_of_the_table():
    """Each trio of tiles in the table: whether for 16 bits, whether for dropout, the tiles, and the widest head."""
    found = {}
    for target, kind in TABLE[KERNELS[0]]:
        tuning = launch.Tuning(target, kind)
        for suffix in ("", "_dropout"):
            for width in sorted({width for kernel in KERNELS for width in TABLE[kernel + suffix][target, kind]}):
                tiles = tuple(tuning.row(kernel + suffix, width)[:2] for kernel in KERNELS)
                found[kind == "16-bit", suffix != "", tiles] = width
    return [(*key, width) for key, width in sorted(found.items())]


@pytest.mark.parametrize(("narrow", "dropping", "tiles", "width"), some(5, tiles_of_the_table()))
def test_agrees_in_every_tile_of_the_table(narrow, dropping, tiles, width):
    torch.manual_seed(0)
    T = max(max(tile) for tile in tiles)
    inputs = packed(1, T + 1, T + 3, 1, 1, width, torch.float16 if narrow else torch.float32)
    with tiled(*tiles):
        assert_op_agrees(causal_attention, "causal_attention", inputs, **(seeded(3) if dropping else {}))


def test_every_row_of_the_table_can_be_launched():
    for kernel, table in TABLE.items():
        assert table.keys() == TABLE[KERNELS[0]].keys()
        for rows in table.values():
            assert max(rows) == attention.WIDEST_HEAD
            for row in rows.values():
                assert row.rows in (16, 32, 64, 128, 256), kernel
                assert row.columns in (32, 64, 128, 256), kernel  # dropout's numbers come by 32


@pytest.mark.parametrize(("Tq", "Tk"), some(1, [(40, 131), (67, 67), (1, 130)]))
@pytest.mark.parametrize("tile", some(1, [((16, 32),), ((64, 32),), ((32, 64),), ((128, 64),), ((16, 128),)]))
@pytest.mark.covering_array(1)
def test_agrees_in_tiles_of_any_form(tile, Tq, Tk):
    torch.manual_seed(0)
    B = 2 if Tq == 1 else 1
    arguments = {"doc_ids": torch.randint(2, (B, Tk), device=DEVICE), **seeded(-5)}
    with tiled(tile):
        assert_op_agrees(causal_attention, "causal_attention", packed(B, Tq, Tk, 2, 1, 16), **arguments)


@pytest.mark.parametrize("before", [29, 30, 31, 32, 33])
@pytest.mark.parametrize("tile", [(16, 32), (32, 32), (64, 32)])
@pytest.mark.covering_array(1)
def test_agrees_wherever_the_diagonal_meets_a_tile(tile, before):
    """Behind so many keys on top of the queries the diagonal ends just before, at or just behind a tile's edge."""
    torch.manual_seed(0)
    with tiled(tile):
        assert_op_agrees(causal_attention, "causal_attention", packed(1, 34, 34 + before, 1, 1, 16))


@dtypes
@pytest.mark.parametrize("scale", [-0.3, 0.0])
@pytest.mark.covering_array(1)
def test_agrees_at_a_scale_that_is_not_positive(scale, dtype):
    torch.manual_seed(0)
    inputs = packed(2, 5, 7, 4, 2, 20, dtype)
    plain = reference.causal_attention  # SDPA gives NaN here on a CPU
    grad = random(2, 5, 4, 20, dtype=dtype)
    if scale:
        assert_op_agrees(causal_attention, "causal_attention", inputs, plain=plain, scale=scale)
    out, dq, dk, dv = outputs_and_gradients(causal_attention, inputs, [grad], scale=scale)
    truth = outputs_and_gradients(plain, [t.double() for t in inputs], [grad.double()], scale=scale)
    assert max(*relative_errors(out, truth[0]), *relative_errors(dv, truth[3])) < LIMITS[dtype]
    assert (dq.any() and dk.any()).item() == (scale != 0)


@dtypes
@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize(("Tq", "Tk", "D"), some(2, [(1, 1, 16), (70, 70, 20), (3, 70, 8)]))
@pytest.mark.covering_array(1)
def test_with_one_key_it_gives_its_value_and_scores_have_no_gradient(Tq, Tk, D, p, dtype):
    torch.manual_seed(0)
    inputs, grad = packed(2, Tq, Tk, 2, 1, D, dtype), random(2, Tq, 2, D, dtype=dtype)
    arguments = {"doc_ids": torch.arange(Tk, device=DEVICE).expand(2, Tk), **(seeded(3, p) if p else {})}
    out, dq, dk, dv = outputs_and_gradients(causal_attention, inputs, [grad], **arguments)
    truth = outputs_and_gradients(
        reference.causal_attention, [t.double() for t in inputs], [grad.double()], **arguments
    )
    assert not truth[1].any()
    assert not truth[2].any()
    assert max(*relative_errors(out, truth[0]), *relative_errors(dv, truth[3])) < LIMITS[dtype] / (1 if p else 2)
    q, k, v = (t.double().norm(dim=-1).max() for t in inputs)
    most = LIMITS[dtype] * grad.double().norm(dim=-1).max() * v * D**-0.5 / (1 - p)  # of a sum and the same sum
    assert dq.abs().max() <= most * k
    assert dk.abs().max() <= most * q * 2  # the heads of its group


@pytest.mark.parametrize("D", some(2, [1, 2, 127, 255, 129]))
def test_agrees_at_head_sizes_that_are_no_powers_of_two(D):
    torch.manual_seed(0)
    assert_op_agrees(causal_attention, "causal_attention", packed(1, 40, 70, 2, 1, D), layout="gapped")


@dtypes
@pytest.mark.parametrize(("B", "Tq", "Tk", "H", "Hkv"), [(0, 5, 5, 4, 2), (0, 1, 5, 2, 2), (2, 0, 5, 2, 1)])
def test_without_queries_everything_is_empty_or_zero(B, Tq, Tk, H, Hkv, dtype):
    inputs = packed(B, Tq, Tk, H, Hkv, 16, dtype)
    doc_ids = torch.zeros(B, Tk, device=DEVICE, dtype=torch.int64)
    arguments = {"doc_ids": doc_ids, **seeded(3)}
    grad = torch.empty(B, Tq, H, 16, device=DEVICE, dtype=dtype)
    results = outputs_and_gradients(causal_attention, inputs, [grad], **arguments)
    assert [t.shape for t in results] == [grad.shape, *(t.shape for t in inputs)]
    assert not any(t.any() for t in results)


@dtypes
@pytest.mark.parametrize("options", [{}, {"doc_ids": True, **seeded(3)}])
@pytest.mark.covering_array(1)
def test_log_sum_exp_is_float32_and_of_base_2(options, dtype):
    torch.manual_seed(0)
    q, k, v = packed(1, 67, 70, 2, 1, 20, dtype)
    doc_ids = torch.randint(3, (1, 70), device=DEVICE) if options else None
    seed, p = options.get("seed"), options.get("dropout_p", 0.0)
    _, lse = torch.ops.fastgpt.attention_forward(q, k, v, seed, doc_ids, p, 0.3)
    scores = torch.einsum("bihd,bjhd->bhij", q.double(), k.double().repeat_interleave(2, dim=2)) * 0.3
    hidden = ~reference.visible(67, 70, doc_ids, q.device)
    expected = scores.masked_fill(hidden, -math.inf).logsumexp(-1) * math.log2(math.e)
    assert lse.dtype == torch.float32
    assert max(relative_errors(lse, expected)) < FLOAT32_LIMIT


def test_reads_a_packed_projection_where_it_is_and_writes_dense_gradients(launches):
    inputs, grad = packed(1, 10, 20, 4, 2, 16), random(1, 10, 4, 16)
    _, *gradients = outputs_and_gradients(causal_attention, inputs, [grad], **seeded(3))
    assert [made.kernel for made in launches] == [
        attention._forward,
        attention_backward._backward_queries,
        attention_backward._backward_keys,
    ]
    for made in launches:
        places = {(t.data_ptr(), t.stride()) for t in made.args if isinstance(t, torch.Tensor)}
        assert {(t.data_ptr(), t.stride()) for t in inputs} <= places
    assert (grad.data_ptr(), grad.stride()) in places
    assert all(t.is_contiguous() for t in gradients)


def test_memory_is_linear_in_time(launches):
    def total(T):
        launches.clear()
        inputs, grad = packed(1, T, T, 1, 1, 8), random(1, T, 1, 8)
        outputs_and_gradients(causal_attention, inputs, [grad])
        tensors = [t for made in launches for t in made.args if isinstance(t, torch.Tensor)]
        sizes = {t.data_ptr(): t.numel() for t in tensors}
        assert len(sizes) == 10  # q, k, v, out, lse, delta, and four gradients
        assert max(sizes.values()) == T * 8
        return sum(sizes.values())

    assert total(66) == 2 * total(33)


@dtypes
@pytest.mark.parametrize("options", [{}, seeded(3)])
@pytest.mark.covering_array(1)
def test_repeated_runs_give_the_same_bits(options, dtype):
    torch.manual_seed(0)
    inputs, grad = packed(1, 40, 40, 2, 1, 16, dtype), random(1, 40, 2, 16, dtype=dtype)
    first = outputs_and_gradients(causal_attention, inputs, [grad], **options)
    for _ in range(2):
        again = outputs_and_gradients(causal_attention, inputs, [grad], **options)
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


@pytest.mark.parametrize("trained", [(0,), (1,), (2,), (1, 2)])
def test_a_gradient_does_not_depend_on_which_others_are_wanted(trained):
    torch.manual_seed(0)
    inputs, grad = packed(1, 5, 7, 2, 1, 16), random(1, 5, 2, 16)
    every = outputs_and_gradients(causal_attention, inputs, [grad])
    got = outputs_and_gradients(causal_attention, inputs, [grad], trained=trained)
    for i, t in enumerate(got[1:]):
        assert torch.equal(t, every[i + 1]) if i in trained else t is None


@pytest.mark.parametrize("tile", some(1, [((16, 32),), ((64, 64),)]))
def test_a_key_does_not_reach_the_queries_before_it(tile):
    torch.manual_seed(0)
    q, k, v = packed(1, 70, 70, 1, 1, 16)
    with tiled(tile):
        before = causal_attention(q, k, v)
        for j in (0, 15, 31, 32, 64, 69):
            spoiled = k.clone()
            spoiled[:, j] = math.nan
            after = causal_attention(q, spoiled, v)
            assert torch.equal(after[:, :j], before[:, :j])
            assert after[:, j:].isnan().all()


@pytest.mark.parametrize("tile", [(16, 32), (64, 64)])
def test_another_document_does_not_reach_a_query(tile):
    torch.manual_seed(0)
    q, k, v = packed(1, 70, 70, 2, 1, 16)
    doc_ids = torch.randint(2, (1, 70), device=DEVICE)
    other = doc_ids[0] == 1
    with tiled(tile):
        before = causal_attention(q, k, v, doc_ids=doc_ids)
        k[:, other], v[:, other] = math.nan, 1e30
        after = causal_attention(q, k, v, doc_ids=doc_ids)
    assert torch.equal(after[:, ~other], before[:, ~other])
    assert after[:, other].isnan().all()


@dtypes
@pytest.mark.parametrize("sign", [1, -1])
def test_scores_of_ten_thousand_choose_one_key(sign, dtype):
    """Query i has the score 1e4 with key i // 2 and -1e4 with the others; a key past its position would win."""
    torch.manual_seed(0)
    T, D = 40, 64
    chosen = torch.arange(T, device=DEVICE) // 2
    keys = -torch.eye(T, D, device=DEVICE)
    q = (2 * keys[chosen] - keys.sum(0)) * sign * 100
    q[:, T:] = 0
    k, v = keys * sign * 100, random(1, T, 1, D, dtype=dtype)
    q, k = (t.view(1, T, 1, D).to(dtype) for t in (q, k))
    grad = random(1, T, 1, D, dtype=dtype)
    out, dq, dk, dv = outputs_and_gradients(causal_attention, [q, k, v], [grad], scale=1.0)
    assert torch.equal(out, v[:, chosen])
    expected = torch.zeros(1, T, 1, D, device=DEVICE).index_add(1, chosen, grad.float())
    assert max(relative_errors(dv, expected.double())) < LIMITS[dtype]
    assert dq.isfinite().all()
    assert dk.isfinite().all()


@dtypes
@pytest.mark.parametrize("score", [1e4, -1e4])
@pytest.mark.parametrize("Tq", [70, 3])
@pytest.mark.covering_array(1)
def test_equal_scores_give_the_mean_of_the_values(Tq, score, dtype):
    """Past the last key and query lie zeros, whose score of 0 exceeds a log-sum-exp of -1e4 by far."""
    torch.manual_seed(0)
    q, k = torch.full((1, Tq, 1, 16), 25.0, device=DEVICE), torch.full((1, 70, 1, 16), score / 400, device=DEVICE)
    inputs, grad = [q.to(dtype), k.to(dtype), random(1, 70, 1, 16, dtype=dtype)], random(1, Tq, 1, 16, dtype=dtype)
    out, *gradients = outputs_and_gradients(causal_attention, inputs, [grad], scale=1.0)
    truth = reference.causal_attention(*(t.double() for t in inputs), scale=1.0)
    assert max(relative_errors(out, truth)) < LIMITS[dtype]
    assert all(t.isfinite().all() for t in gradients)


def test_hidden_scores_may_be_far_above_the_visible():
    torch.manual_seed(0)
    q, k, v = (random(1, 70, 1, 16) for _ in range(3))
    doc_ids = (torch.arange(70, device=DEVICE) % 2)[None]
    sign = torch.where(doc_ids[..., None, None] == 0, 1.0, -1.0)
    q[..., 0], k[..., 0] = 100 * sign[..., 0], -100 * sign[..., 0]  # -1e4 within a document, 1e4 across
    out, *gradients = outputs_and_gradients(causal_attention, [q, k, v], [v], scale=1.0, doc_ids=doc_ids)
    assert out.isfinite().all()
    assert all(t.isfinite().all() for t in gradients)


def test_values_near_float16s_largest_do_not_overflow():
    torch.manual_seed(0)
    q, k, v = packed(1, 70, 70, 2, 1, 16, torch.float16)
    v = (60000 + v.abs() * 100).clamp(max=65504).contiguous()
    truth = reference.causal_attention(*(t.double() for t in (q, k, v)))
    assert max(relative_errors(causal_attention(q, k, v), truth)) < 2**-11


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_computes_in_autocasts_dtype(dtype):
    torch.manual_seed(0)
    inputs = [random(1, 7, 2, 16), random(1, 7, 2, 16), random(1, 7, 2, 16, dtype=dtype)]
    grad = random(1, 7, 2, 16, dtype=torch.float16)

    def under_autocast(*inputs):
        with torch.autocast(DEVICE, dtype=torch.float16):
            return causal_attention(*inputs)

    got = outputs_and_gradients(under_autocast, inputs, [grad])
    expected = outputs_and_gradients(causal_attention, [t.half() for t in inputs], [grad])
    assert [t.dtype for t in got] == [torch.float16, torch.float32, torch.float32, dtype]
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(got, expected, strict=True))


OPERATOR_ARGUMENTS = [
    # (dtype, B, Tq, Tk, H, Hkv, D, dropout_p, documents)
    (torch.float16, 1, 3, 7, 2, 1, 20, 0.25, False),
    (torch.float32, 2, 5, 5, 4, 2, 16, 0.0, False),
    (torch.float32, 0, 5, 5, 2, 1, 16, 0.0, True),
    (torch.float32, 2, 5, 7, 2, 1, 8, 0.25, True),
]
operator_arguments = pytest.mark.parametrize(
    ("dtype", "B", "Tq", "Tk", "H", "Hkv", "D", "p", "documents"), some(1, OPERATOR_ARGUMENTS)
)


@operator_arguments
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.covering_array(1)
def test_operators_pass_opcheck(trained, dtype, B, Tq, Tk, H, Hkv, D, p, documents):
    torch.manual_seed(0)
    inputs = [t.detach().requires_grad_(trained) for t in packed(B, Tq, Tk, H, Hkv, D, dtype)]
    if B == 0:  # opcheck cannot clone an empty view with gaps
        inputs = [torch.zeros(t.shape, device=DEVICE, dtype=dtype, requires_grad=trained) for t in inputs]
    seed = torch.tensor(3, device=DEVICE) if p else None
    doc_ids = torch.randint(2, (B, Tk), device=DEVICE) if documents else None
    rest = (seed, doc_ids, p, 0.3)
    torch.library.opcheck(torch.ops.fastgpt.attention_forward.default, (*inputs, *rest))
    if not trained:
        out, lse = torch.ops.fastgpt.attention_forward(*inputs, *rest)
        grad = random(*out.shape, dtype=dtype)
        torch.library.opcheck(torch.ops.fastgpt.attention_backward.default, (grad, out, lse, *inputs, *rest))


@pytest.mark.parametrize("backend", some(1, ["aot_eager", "inductor"]))
@pytest.mark.parametrize("dropping", some(1, [True, False]))
@pytest.mark.covering_array(1)
def test_compiled_in_one_graph_it_gives_the_same(dropping, backend):
    torch.manual_seed(0)
    torch._dynamo.reset()
    options = {"doc_ids": torch.randint(2, (1, 7), device=DEVICE), **seeded(3)} if dropping else {"scale": -0.3}
    compiled = torch.compile(causal_attention, fullgraph=True, backend=backend)
    inputs, grad = packed(1, 5, 7, 2, 1, 16), random(1, 5, 2, 16)
    eager = outputs_and_gradients(causal_attention, inputs, [grad], **options)
    got = outputs_and_gradients(compiled, inputs, [grad], **options)
    assert all(torch.equal(a, b) for a, b in zip(got, eager, strict=True))


@pytest.mark.slow
def test_one_compilation_serves_every_length():
    torch.manual_seed(0)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(causal_attention, fullgraph=True, dynamic=True, backend=counter)
    frames = set()
    for B, T in [(3, 5), (4, 9), (6, 66)]:
        inputs, grad = packed(B, T, T, 2, 1, 16), random(B, T, 2, 16)
        eager = outputs_and_gradients(causal_attention, inputs, [grad], **seeded(T))
        got = outputs_and_gradients(compiled, inputs, [grad], **seeded(T))
        assert all(torch.equal(a, b) for a, b in zip(got, eager, strict=True))
        frames.add(counter.frame_count)  # more than one at first, as the scale that follows from D makes Dynamo restart
    assert len(frames) == 1


HALF, LONG, DOUBLE, BFLOAT = torch.float16, torch.int64, torch.float64, torch.bfloat16
DEFAULTS = {"q": zeros(2, 3, 4, 8), "k": zeros(2, 5, 2, 8), "v": zeros(2, 5, 2, 8)}
MISTAKES = [
    ({"q": zeros(3, 4, 8)}, r"q has shape \(3, 4, 8\); expected 4 dimensions"),
    ({"k": zeros(2, 5, 16)}, r"k has shape \(2, 5, 16\); expected 4 dimensions"),
    ({"v": zeros(1, 2, 5, 2, 8)}, r"v has shape \(1, 2, 5, 2, 8\); expected 4 dimensions"),
    ({"q": zeros(2, 3, 4, 8, dtype=LONG)}, r"q \(2, 3, 4, 8\) is torch.int64; expected float32, float16 or bfloat16"),
    ({"v": zeros(2, 5, 2, 8, dtype=DOUBLE)}, r"v \(2, 5, 2, 8\) is torch.float64; expected float32, float16"),
    ({"k": zeros(2, 5, 2, 8, dtype=HALF)}, r"k \(2, 5, 2, 8\) is torch.float16; expected torch.float32, as q"),
    ({"v": zeros(2, 5, 2, 8, dtype=HALF)}, r"v \(2, 5, 2, 8\) is torch.float16; expected torch.float32, as q"),
    ({"q": zeros(2, 3, 4, 8, dtype=HALF)}, r"k \(2, 5, 2, 8\) is torch.float32; expected torch.float16, as q"),
    ({"k": zeros(2, 5, 2, 8, device="meta")}, rf"k \(2, 5, 2, 8\) is on meta; expected {DEVICE}\S*, as q"),
    ({"v": zeros(2, 5, 2, 8, device="meta")}, rf"v \(2, 5, 2, 8\) is on meta; expected {DEVICE}\S*, as q"),
    ({"k": zeros(1, 5, 2, 8)}, r"k has shape \(1, 5, 2, 8\); expected \(2, Tk, Hkv, 8\), as q \(2, 3, 4, 8\)"),
    ({"k": zeros(2, 5, 2, 9)}, r"k has shape \(2, 5, 2, 9\); expected \(2, Tk, Hkv, 8\), as q \(2, 3, 4, 8\)"),
    ({"v": zeros(2, 6, 2, 8)}, r"v has shape \(2, 6, 2, 8\); expected \(2, 5, 2, 8\), as k"),
    ({"v": zeros(2, 5, 4, 8)}, r"v has shape \(2, 5, 4, 8\); expected \(2, 5, 2, 8\), as k"),
    ({"v": zeros(2, 5, 2, 4)}, r"v has shape \(2, 5, 2, 4\); expected \(2, 5, 2, 8\), as k"),
    (dict.fromkeys("qkv", zeros(1, 3, 2, 257)), r"q has shape \(1, 3, 2, 257\); expected a head size of 1 to 256"),
    (dict.fromkeys("qkv", zeros(1, 3, 2, 0)), r"q has shape \(1, 3, 2, 0\); expected a head size of 1 to 256"),
    ({"q": zeros(2, 6, 4, 8)}, r"q has shape \(2, 6, 4, 8\); expected at most k's 5 positions"),
    ({"q": zeros(2, 3, 3, 8)}, r"q has 3 heads \(2, 3, 3, 8\); expected a multiple of k's 2"),
    ({"q": zeros(2, 3, 1, 8)}, r"q has 1 heads \(2, 3, 1, 8\); expected a multiple of k's 2"),
    (dict.fromkeys("kv", zeros(2, 5, 0, 8)), r"q has 4 heads \(2, 3, 4, 8\); expected a multiple of k's 0"),
    ({"dropout_p": 1.0}, r"dropout_p is 1.0; expected at least 0 and less than 1"),
    ({"dropout_p": -0.1}, r"dropout_p is -0.1; expected at least 0 and less than 1"),
    ({"dropout_p": math.nan}, r"dropout_p is nan; expected at least 0 and less than 1"),
    ({"dropout_p": 0.1}, r"dropout_p=0.1 needs a seed, an int64 scalar tensor"),
    ({"seed": zeros()}, r"seed \(\) is torch.float32 on \S+; expected an int64 scalar on \S+"),
    ({"seed": zeros(2, dtype=LONG)}, r"seed \(2,\) is torch.int64 on \S+; expected an int64 scalar on \S+"),
    ({"seed": zeros(dtype=LONG, device="meta")}, r"seed \(\) is torch.int64 on meta; expected an int64 scalar on \S+"),
    ({"doc_ids": zeros(5, dtype=LONG)}, r"doc_ids has shape \(5,\) on \S+; expected \(2, 5\) on \S+"),
    ({"doc_ids": zeros(2, 3, dtype=LONG)}, r"doc_ids has shape \(2, 3\) on \S+; expected \(2, 5\) on \S+"),
    ({"doc_ids": zeros(2, 5, dtype=LONG, device="meta")}, r"doc_ids has shape \(2, 5\) on meta; expected \(2, 5\) on"),
    ({"doc_ids": zeros(2, 5)}, r"doc_ids \(2, 5\) is torch.float32; expected an integer dtype"),
    ({"doc_ids": zeros(2, 5, dtype=torch.bool)}, r"doc_ids \(2, 5\) is torch.bool; expected an integer dtype"),
]
if DEVICE == "cpu":
    MISTAKES += [
        ({"q": zeros(2, 3, 4, 8, dtype=BFLOAT)}, r"q \(2, 3, 4, 8\) is bfloat16, which .*; expected float32 or")
    ]


@pytest.mark.parametrize(("changed", "message"), MISTAKES)
def test_what_does_not_fit_is_named_before_any_launch(changed, message, launches):
    with pytest.raises(ValueError, match=f"^causal_attention: {message}"):
        causal_attention(**DEFAULTS | changed)
    assert not launches


@pytest.mark.skipif(DEVICE == "cuda", reason="about tensors on a CPU")
def test_without_the_interpreter_a_cpu_is_refused(monkeypatch, launches):
    monkeypatch.setattr(launch, "INTERPRETED", False)
    with pytest.raises(ValueError, match=r"^causal_attention: q \(2, 3, 4, 8\) is on cpu; expected a CUDA GPU"):
        causal_attention(**DEFAULTS)
    assert not launches
