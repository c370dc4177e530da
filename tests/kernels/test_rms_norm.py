"""The RMSNorm kernels: parity with float64 and stock PyTorch, guarded and poisoned; operators; bad input."""

import itertools

import pytest
import torch
from hypothesis import strategies as st

from fastgpt_kernels import launch, norm, torch_ops
from tests.helpers.covering import some
from tests.helpers.norm_cases import dtypes, few_programs, tensors
from tests.helpers.parity import (
    DEVICE,
    LAYOUTS,
    assert_op_agrees,
    outputs_and_gradients,
    relative_errors,
    same_bits,
    zeros,
)
from tests.helpers.random_cases import random_cases

OPS = ["rms_norm", "add_rms_norm"]
ops = pytest.mark.parametrize("op", OPS)
gains = pytest.mark.parametrize("gain", [True, False])


# The gradient of x is a small difference of large numbers in narrow rows, which have a test of their own.
COLUMNS = st.one_of(st.integers(2, 90).map(lambda n: 2 * n + 1), st.sampled_from([8, 32, 64, 127, 128, 257, 768]))


@random_cases(3, 60, data=st.data(), lead=st.lists(st.integers(0, 6), max_size=3), C=COLUMNS, seed=st.integers(0, 999))
@dtypes
@ops
@pytest.mark.covering_array(1)
def test_agrees_at_any_shape_and_layout(op, dtype, data, lead, C, seed):
    torch.manual_seed(seed)
    layout = st.sampled_from([*LAYOUTS])
    layouts = (data.draw(layout.filter(lambda name: name != "constant"), "x"), data.draw(layout, "residual"))
    inputs = tensors(op, (*lead, C), dtype, gain=data.draw(st.booleans(), "gain"), layouts=layouts)
    used = data.draw(st.sampled_from([(0, 1), (0,), (1,)]), "used") if op == "add_rms_norm" else None
    eps = data.draw(st.sampled_from([1e-5, 1e-2, 1.0]), "eps")
    if used == (0,):
        inputs[-1] = None  # whose gradient there is none of
    assert_op_agrees(getattr(norm, op), op, inputs, layout=data.draw(layout, "grad_out"), used=used, eps=eps)


@dtypes
@gains
@ops
@pytest.mark.parametrize("C", some(4, [63, 64, 65, 128, 129, 257, 513, 1025, 2049, 4097, 8192]))
@pytest.mark.covering_array(1)
def test_agrees_on_both_sides_of_rows_of_the_table(C, op, gain, dtype):
    torch.manual_seed(0)
    inputs = tensors(op, (3, C), dtype, gain=gain, layouts=("gapped", "dense"))
    assert_op_agrees(getattr(norm, op), op, inputs, layout="gapped")


@pytest.fixture
def wide_sums(monkeypatch):
    """The last kernel in wide tiles: the interpreter takes a second for each 250 of its usual ones."""
    if DEVICE == "cpu":
        every = {key: {65536: launch.Config(32, 2048, 4)} for key in launch.TABLE["sum_partials"]}
        monkeypatch.setitem(launch.TABLE, "sum_partials", every)
    launch._row.cache_clear()
    yield
    launch._row.cache_clear()


@dtypes
@gains
@ops
@pytest.mark.parametrize("C", some(1, [8193, 65536]))
@pytest.mark.covering_array(1)
def test_rows_in_tiles_agree(C, op, gain, dtype, wide_sums):
    torch.manual_seed(0)
    inputs = tensors(op, (2, 1, C), dtype, gain=gain, layouts=("swapped", "gapped"))
    assert_op_agrees(getattr(norm, op), op, inputs, layout="expanded", eps=1e-2)


@dtypes
@gains
@ops
@pytest.mark.parametrize("shape", [(1,), (2,), (5, 1), (5, 3)])
@pytest.mark.covering_array(1)
def test_agrees_on_a_few_columns(shape, op, gain, dtype):
    torch.manual_seed(0)
    assert_op_agrees(getattr(norm, op), op, tensors(op, shape, dtype, gain=gain), eps=1.0)


@dtypes
@gains
@pytest.mark.parametrize("D", [32, 64, 128])
@pytest.mark.covering_array(1)
def test_the_heads_of_a_packed_projection_agree(D, gain, dtype):
    """Queries and keys, (B, T, H, D), whose rows do not lie at one distance."""
    torch.manual_seed(0)
    packed = torch.randn(2, 3, 3, 4, D, device=DEVICE).to(dtype)
    for x in packed.unbind(2)[:2]:
        weight = torch.randn(D, device=DEVICE).to(dtype) if gain else None
        assert_op_agrees(norm.rms_norm, "rms_norm", [x, weight])


MIXED = [
    # (op, x, residual, weight)
    ("rms_norm", torch.float16, None, torch.float32),
    ("add_rms_norm", torch.float16, torch.float32, torch.float16),
    ("add_rms_norm", torch.float32, torch.float16, torch.float32),
]


@pytest.mark.parametrize(("op", "dtype", "residual", "affine"), MIXED)
def test_agrees_in_mixed_dtypes(op, dtype, residual, affine):
    torch.manual_seed(0)
    assert_op_agrees(getattr(norm, op), op, tensors(op, (5, 33), dtype, residual=residual, affine=affine), eps=1e-3)


@gains
@pytest.mark.parametrize(("op", "dtype"), [("rms_norm", torch.float32), ("add_rms_norm", torch.float16)])
def test_gives_the_norm_in_autocasts_dtype(op, dtype, gain):
    torch.manual_seed(0)

    def ours(*inputs):
        with torch.autocast(DEVICE, dtype=torch.float16):
            return getattr(norm, op)(*inputs)

    def plain(*inputs):
        out = getattr(torch_ops, op)(*inputs)
        return out.half() if op == "rms_norm" else (out[0], out[1].half())

    inputs = tensors(op, (5, 33), dtype, gain=gain, residual=torch.float32, affine=torch.float32)
    assert_op_agrees(ours, op, inputs, plain=plain)


@dtypes
@gains
@ops
@pytest.mark.parametrize(("R", "C"), [(70, 33), (11, 700), (5, 8193)])
@pytest.mark.parametrize("programs", [1, 3])
@pytest.mark.covering_array(1)
def test_more_rows_than_programs_agree_and_repeat_their_bits(programs, R, C, op, gain, dtype, monkeypatch, wide_sums):
    torch.manual_seed(0)
    few_programs(monkeypatch, programs)
    inputs = tensors(op, (R, C), dtype, gain=gain)
    assert_op_agrees(getattr(norm, op), op, inputs, layout="gapped")
    grads = [torch.randn(R, C, device=DEVICE).to(dtype) for _ in inputs[1:]]
    first, again = (outputs_and_gradients(getattr(norm, op), inputs, grads) for _ in range(2))
    assert same_bits(again, first)


@dtypes
@pytest.mark.parametrize("C", [33, 8193])
@pytest.mark.covering_array(1)
def test_the_reciprocal_deviation_is_float32_and_there_is_no_mean(C, dtype):
    torch.manual_seed(0)
    x, residual, weight = tensors("add_rms_norm", (3, 5, C), dtype)
    total, _, mean, rstd = torch.ops.fastgpt.norm_forward(x, residual, weight, None, 1e-3, dtype, False)
    expected = (total.double().flatten(0, 1).square().mean(-1) + 1e-3).rsqrt()
    assert mean.numel() == 0
    assert (rstd.dtype, rstd.shape) == (torch.float32, (15,))
    assert max(relative_errors(rstd, expected)) < 1e-6


@dtypes
@gains
@ops
@pytest.mark.parametrize("shape", [(0, 33), (3, 0, 33), (0, 8193)])
@pytest.mark.covering_array(1)
def test_no_rows_give_empty_results_and_zero_weight_gradients(shape, op, gain, dtype):
    assert_op_agrees(getattr(norm, op), op, tensors(op, shape, dtype, gain=gain), layout="expanded")


def test_a_row_of_zeros_gives_zeros_and_finite_gradients():
    torch.manual_seed(0)
    inputs = tensors("rms_norm", (4, 33), torch.float32)
    inputs[0][1] = 0
    assert not norm.rms_norm(*inputs)[1].any()
    assert_op_agrees(norm.rms_norm, "rms_norm", inputs)


@pytest.mark.parametrize("residual", [torch.float32, torch.float16])
def test_a_gradient_does_not_depend_on_which_others_are_wanted(residual):
    torch.manual_seed(0)
    inputs = tensors("add_rms_norm", (5, 33), torch.float32, residual=residual)
    grads = [torch.randn(5, 33, device=DEVICE) for _ in range(2)]
    every = outputs_and_gradients(norm.add_rms_norm, inputs, grads)
    for n in (1, 2):
        for trained in itertools.combinations(range(3), n):
            wanted = [grads[0] if min(trained) < 2 else None, grads[1]]  # the sum depends on no weight
            got = outputs_and_gradients(norm.add_rms_norm, inputs, wanted, trained=trained)
            assert same_bits(got, [t if i < 2 or i - 2 in trained else None for i, t in enumerate(every)])


def test_without_a_weight_nothing_is_summed_over_the_rows(launches):
    inputs = tensors("rms_norm", (4, 33), torch.float32, gain=False)
    outputs_and_gradients(norm.rms_norm, inputs, [torch.ones(4, 33, device=DEVICE)])
    assert [one.name for one in launches] == ["rms_norm_forward", "rms_norm_backward"]


OPERATOR_ARGUMENTS = [
    # (dtype, residual's, weight's, or None without one, shape)
    (torch.float32, None, torch.float32, (3, 5, 33)),
    (torch.float16, torch.float32, torch.float32, (4, 33)),
    (torch.float32, torch.float32, None, (0, 33)),
    (torch.float16, None, None, (2, 300)),
]
operator_arguments = pytest.mark.parametrize(("dtype", "residual", "affine", "shape"), some(2, OPERATOR_ARGUMENTS))


@operator_arguments
def test_operators_pass_opcheck(dtype, residual, affine, shape):
    torch.manual_seed(0)
    total = torch.promote_types(dtype, residual or dtype)
    x, branch = (torch.randn(shape, device=DEVICE).to(t) for t in (dtype, residual or dtype))
    weight = None if affine is None else torch.randn(shape[-1:], device=DEVICE).to(affine).requires_grad_()
    forward = (x.requires_grad_(), branch if residual else None, weight, None, 1e-3, total, False)
    torch.library.opcheck(torch.ops.fastgpt.norm_forward.default, forward)
    y, dy, dtotal = (torch.randn(shape, device=DEVICE).to(total) for _ in range(3))
    rstd = torch.rand(x.numel() // shape[-1], device=DEVICE)
    weight = None if weight is None else weight.detach()
    backward = (dtotal if residual else None, dy, y, weight, None, rstd, False, dtype, residual)
    torch.library.opcheck(torch.ops.fastgpt.norm_backward.default, backward)


@gains
@ops
@pytest.mark.covering_array(1)
def test_compiled_in_one_graph_it_gives_the_same(op, gain):
    torch.manual_seed(0)
    torch._dynamo.reset()
    compiled = torch.compile(getattr(norm, op), fullgraph=True, backend="aot_eager")
    inputs = tensors(op, (3, 5, 33), torch.float32, gain=gain)
    grads = [torch.randn(3, 5, 33, device=DEVICE) for _ in inputs[1:]]
    eager = outputs_and_gradients(getattr(norm, op), inputs, grads, eps=1e-3)
    assert same_bits(outputs_and_gradients(compiled, inputs, grads, eps=1e-3), eager)


HALF, LONG = torch.float16, torch.int64
MISTAKES = [
    ({"x": zeros()}, r"x has shape \(\); expected at least 1 dimension"),
    ({"x": zeros(2, 65537)}, r"x has shape \(2, 65537\); expected 1 to 65,536 columns"),
    ({"x": zeros(3, 4, dtype=LONG)}, r"x \(3, 4\) is torch.int64; expected float32, float16 or bfloat16"),
    ({"weight": zeros(1, 4)}, r"weight has shape \(1, 4\); expected 1 dimension"),
    ({"weight": zeros(5)}, r"weight has shape \(5,\); expected \(4,\), the columns of x"),
    ({"weight": zeros(4, dtype=HALF)}, r"weight \(4,\) is torch.float16; expected torch.float32, as x, or float32$"),
    ({"weight": zeros(4, device="meta")}, rf"weight \(4,\) is on meta; expected {DEVICE}\S*, as x"),
]


@pytest.mark.parametrize(
    ("op", "changed", "message"),
    [(op, *mistake) for op in OPS for mistake in MISTAKES]
    + [("add_rms_norm", {"residual": zeros(1, 4)}, r"residual has shape \(1, 4\); expected \(3, 4\), as x")],
)
def test_what_does_not_fit_is_named_before_any_launch(op, changed, message, no_launch):
    arguments = {"x": zeros(3, 4), "weight": zeros(4)}
    if op == "add_rms_norm":
        arguments["residual"] = torch.zeros_like(changed.get("x", arguments["x"]))
    with pytest.raises(ValueError, match=f"^{op}: {message}"):
        getattr(norm, op)(**arguments | changed)
