"""The LayerNorm kernels: parity with float64 and stock PyTorch, guarded and poisoned; operators; bad input."""

import itertools

import pytest
import torch
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from fastgpt_kernels import launch, norm, reference, torch_ops
from tests.helpers.covering import some
from tests.helpers.norm_cases import dtypes, few_programs, tensors
from tests.helpers.parity import (
    DEVICE,
    FLOAT32_LIMIT,
    LAYOUTS,
    assert_op_agrees,
    outputs_and_gradients,
    relative_errors,
    same_bits,
    zeros,
)
from tests.helpers.random_cases import random_cases

DTYPES = [torch.float32, torch.float16]
OPS = ["layer_norm", "add_layer_norm"]
ops = pytest.mark.parametrize("op", OPS)


# The gradient of x is a small difference of large numbers below five columns (zero with one, all but zero with two and
# a small eps), so those widths have a test of their own.
COLUMNS = st.one_of(st.integers(2, 90).map(lambda n: 2 * n + 1), st.sampled_from([8, 64, 127, 128, 129, 257, 768]))


@random_cases(3, 60, data=st.data(), lead=st.lists(st.integers(0, 6), max_size=3), C=COLUMNS, seed=st.integers(0, 999))
@dtypes
@ops
@pytest.mark.covering_array(1)
def test_agrees_at_any_shape_and_layout(op, dtype, data, lead, C, seed):
    torch.manual_seed(seed)
    layout = st.sampled_from([*LAYOUTS])
    inputs = tensors(
        op,
        (*lead, C),
        dtype,
        bias=data.draw(st.booleans(), "bias"),
        layouts=(data.draw(layout.filter(lambda name: name != "constant"), "x"), data.draw(layout, "residual")),
        offset=data.draw(st.sampled_from([0.0, 3.0]), "offset"),
    )
    used = data.draw(st.sampled_from([(0, 1), (0,), (1,)]), "used") if op == "add_layer_norm" else None
    eps = data.draw(st.sampled_from([1e-5, 1e-2, 1.0]), "eps")
    assert_op_agrees(getattr(norm, op), op, inputs, layout=data.draw(layout, "grad_out"), used=used, eps=eps)


WIDTHS = [127, 128, 129, 256, 257, 512, 513, 1024, 1025, 2048, 2049]
WIDE = [8193, 4096, 4097, 8191, 8192, 65536]


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
@ops
@pytest.mark.parametrize("C", some(5, WIDTHS))
@pytest.mark.covering_array(1)
def test_agrees_on_both_sides_of_every_row_of_the_table(C, op, dtype):
    torch.manual_seed(0)
    assert_op_agrees(getattr(norm, op), op, tensors(op, (3, C), dtype, layouts=("gapped", "dense")), layout="gapped")


@pytest.mark.parametrize(("op", "dtype"), [*zip(OPS, DTYPES, strict=True)])
@pytest.mark.parametrize("C", some(1, WIDE))
@pytest.mark.covering_array(1)
def test_agrees_on_wide_rows(C, op, dtype, wide_sums):
    torch.manual_seed(0)
    assert_op_agrees(getattr(norm, op), op, tensors(op, (2, C), dtype, layouts=("gapped", "dense")), layout="gapped")


@pytest.mark.parametrize("used", [(0,), (1,)])
@pytest.mark.parametrize(("bias", "dtype"), [*zip([True, False], DTYPES, strict=True)])
@ops
@pytest.mark.covering_array(1)
def test_tiled_kernels_agree_with_every_argument(op, bias, dtype, used, wide_sums):
    torch.manual_seed(0)
    inputs = tensors(op, (2, 1, 8200), dtype, bias=bias, layouts=("swapped", "gapped"))
    used = used if op == "add_layer_norm" else None
    assert_op_agrees(getattr(norm, op), op, inputs, layout="expanded", used=used, eps=1e-2)


@dtypes
@ops
@pytest.mark.parametrize("C", [1, 2, 3])
@pytest.mark.parametrize("shape", [(), (1,), (5,)])
@pytest.mark.covering_array(1)
def test_agrees_on_a_few_columns(shape, C, op, dtype):
    torch.manual_seed(0)
    assert_op_agrees(getattr(norm, op), op, tensors(op, (*shape, C), dtype), eps=1.0)


MIXED = [
    # (op, x, residual, weight and bias)
    ("layer_norm", torch.float16, None, torch.float32),
    ("add_layer_norm", torch.float16, torch.float16, torch.float32),
    ("add_layer_norm", torch.float16, torch.float32, torch.float16),
    ("add_layer_norm", torch.float16, torch.float32, torch.float32),
    ("add_layer_norm", torch.float32, torch.float16, torch.float32),
]


def in_float32(op, dtype):
    """Stock PyTorch, normalizing in float32 where it takes no weights of another dtype; the norm rounded to `dtype`."""

    def plain(*inputs, **arguments):
        *streams, weight, bias = inputs
        total = sum(streams[1:], streams[0])
        affine = [t if t is None else t.float() for t in (weight, bias)]
        y = torch_ops.layer_norm(total.float(), *affine, **arguments).to(dtype or total.dtype)
        return y if op == "layer_norm" else (total, y)

    return plain


@pytest.mark.parametrize("C", [33, 8200])
@pytest.mark.parametrize(("op", "dtype", "residual", "affine"), MIXED)
@pytest.mark.covering_array(1)
def test_agrees_in_mixed_dtypes(op, dtype, residual, affine, C, wide_sums):
    torch.manual_seed(0)
    inputs = tensors(op, (5, C), dtype, residual=residual, affine=affine)
    assert_op_agrees(getattr(norm, op), op, inputs, plain=in_float32(op, None), eps=1e-3)


@pytest.mark.parametrize(("op", "dtype"), [("layer_norm", torch.float32), *((op, torch.float16) for op in OPS)])
def test_gives_the_norm_in_autocasts_dtype(op, dtype):
    torch.manual_seed(0)

    def ours(*inputs):
        with torch.autocast(DEVICE, dtype=torch.float16):
            return getattr(norm, op)(*inputs)

    inputs = tensors(op, (5, 33), dtype, residual=torch.float32, affine=torch.float32)
    assert_op_agrees(ours, op, inputs, plain=in_float32(op, torch.float16))


@dtypes
@ops
@pytest.mark.parametrize(("R", "C"), [(70, 33), (11, 700), (5, 1500), (5, 8193)])
@pytest.mark.parametrize("programs", [1, 3])
@pytest.mark.covering_array(1)
def test_agrees_with_more_rows_than_programs(programs, R, C, op, dtype, monkeypatch, wide_sums):
    torch.manual_seed(0)
    few_programs(monkeypatch, programs)
    assert_op_agrees(getattr(norm, op), op, tensors(op, (R, C), dtype), layout="gapped")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.slow
def test_weight_gradients_in_16_bits_are_summed_in_float32(op, monkeypatch):
    torch.manual_seed(0)
    few_programs(monkeypatch, 1)
    inputs = tensors(op, (2500, 5), torch.float16)
    ones = torch.ones(2500, 5, device=DEVICE, dtype=torch.float16)
    grads = [ones] if op == "layer_norm" else [None, ones]
    *_, dbias = outputs_and_gradients(getattr(norm, op), inputs, grads)
    assert dbias.tolist() == [2500.0] * 5  # where a float16 sum of ones stays at 2048


@dtypes
@pytest.mark.parametrize("C", [300, 5000, 8193])
@pytest.mark.covering_array(1)
def test_a_large_mean_costs_no_more_accuracy_than_in_stock_pytorch(C, dtype, wide_sums):
    torch.manual_seed(0)
    inputs = tensors("layer_norm", (4, C), dtype, offset=1000.0)
    grad = torch.randn(4, C, device=DEVICE).to(dtype)
    truth = outputs_and_gradients(reference.layer_norm, [t.double() for t in inputs], [grad.double()])
    ours, plain = (outputs_and_gradients(column.layer_norm, inputs, [grad]) for column in (norm, torch_ops))
    for a, b, c in zip(ours, plain, truth, strict=True):
        for error, stock_error in zip(relative_errors(a, c), relative_errors(b, c), strict=True):
            assert error <= max(2 * stock_error, FLOAT32_LIMIT)


@dtypes
@pytest.mark.parametrize("C", [33, 8193])
@pytest.mark.covering_array(1)
def test_mean_and_reciprocal_deviation_are_float32(C, dtype):
    torch.manual_seed(0)
    x, residual, weight, bias = tensors("add_layer_norm", (3, 5, C), dtype, offset=3.0)
    total, _, mean, rstd = torch.ops.fastgpt.norm_forward(x, residual, weight, bias, 1e-3, dtype, True)
    rows = total.double().flatten(0, 1)
    expected = rows.mean(-1), (rows.var(-1, correction=0) + 1e-3).rsqrt()
    for a, b in zip((mean, rstd), expected, strict=True):
        assert a.dtype == torch.float32
        assert a.shape == (15,)
        assert max(relative_errors(a, b)) < 1e-6


@dtypes
@ops
@pytest.mark.parametrize("C", [33, 8193])
@pytest.mark.covering_array(1)
def test_a_row_of_zeros_gives_the_bias_and_finite_gradients(C, op, dtype, wide_sums):
    torch.manual_seed(0)
    *streams, weight, bias = tensors(op, (4, C), dtype)
    for t in streams:
        t[1] = 0
    y = getattr(norm, op)(*streams, weight, bias)
    assert torch.equal((y if op == "layer_norm" else y[1])[1], bias)
    assert_op_agrees(getattr(norm, op), op, [*streams, weight, bias])


@dtypes
@ops
@pytest.mark.parametrize("shape", [(0, 33), (0, 5, 33), (3, 0, 33), (0, 8193)])
@pytest.mark.covering_array(1)
def test_no_rows_give_empty_results_and_zero_weight_gradients(shape, op, dtype):
    assert_op_agrees(getattr(norm, op), op, tensors(op, shape, dtype), layout="expanded")


@dtypes
@ops
@pytest.mark.parametrize(("R", "C"), [(20, 33), (4, 8193)])
@pytest.mark.covering_array(1)
def test_repeated_backward_runs_give_the_same_bits(R, C, op, dtype, monkeypatch, wide_sums):
    torch.manual_seed(0)
    few_programs(monkeypatch, 3)
    inputs = tensors(op, (R, C), dtype)
    grads = [torch.randn(R, C, device=DEVICE).to(dtype) for _ in range(len(inputs) - 2)]
    first = outputs_and_gradients(getattr(norm, op), inputs, grads)
    for _ in range(2):
        assert same_bits(outputs_and_gradients(getattr(norm, op), inputs, grads), first)


@ops
@pytest.mark.parametrize("residual", [torch.float32, torch.float16])
@pytest.mark.covering_array(1)
def test_a_gradient_does_not_depend_on_which_others_are_wanted(residual, op):
    torch.manual_seed(0)
    inputs = tensors(op, (5, 33), torch.float32, residual=residual)
    outputs = len(inputs) - 2
    grads = [torch.randn(5, 33, device=DEVICE) for _ in range(outputs)]
    every = outputs_and_gradients(getattr(norm, op), inputs, grads)
    for n in range(1, len(inputs)):
        for trained in itertools.combinations(range(len(inputs)), n):
            # the sum depends on no weight, and then takes no gradient
            wanted = [g if i == outputs - 1 or min(trained) < 2 else None for i, g in enumerate(grads)]
            got = outputs_and_gradients(getattr(norm, op), inputs, wanted, trained=trained)
            kept = [t if i < outputs or i - outputs in trained else None for i, t in enumerate(every)]
            assert same_bits(got, kept)


def test_the_gradient_of_the_sum_reaches_both_streams():
    torch.manual_seed(0)
    inputs = tensors("add_layer_norm", (5, 33), torch.float32)
    grad = torch.randn(5, 33, device=DEVICE)
    *_, dx, dresidual, dweight, dbias = outputs_and_gradients(norm.add_layer_norm, inputs, [grad, None])
    assert torch.equal(dx, grad)
    assert torch.equal(dresidual, grad)
    assert dweight is None
    assert dbias is None


def test_gradients_of_shared_results_do_not_alias():
    torch.manual_seed(0)
    x, residual, weight, bias = (t.requires_grad_() for t in tensors("add_layer_norm", (5, 33), torch.float32))
    total, y = norm.add_layer_norm(x, residual, weight, bias)
    (total + y).sum().backward()
    before = residual.grad.clone()
    x.grad.zero_()  # as an optimizer or a clipping of gradients does, in place
    assert torch.equal(residual.grad, before)


OPERATOR_ARGUMENTS = [
    # (dtype, residual's, weight's, has a bias, shape)
    (torch.float32, None, torch.float32, True, (3, 5, 33)),
    (torch.float32, None, torch.float32, False, (7,)),
    (torch.float16, torch.float32, torch.float32, True, (4, 33)),
    (torch.float16, torch.float16, torch.float16, False, (2, 300)),
    (torch.float32, torch.float32, torch.float32, True, (0, 33)),
]
operator_arguments = pytest.mark.parametrize(
    ("dtype", "residual", "affine", "bias", "shape"), some(2, OPERATOR_ARGUMENTS)
)


@operator_arguments
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.covering_array(1)
def test_forward_operator_passes_opcheck(trained, dtype, residual, affine, bias, shape):
    torch.manual_seed(0)
    op = "layer_norm" if residual is None else "add_layer_norm"
    inputs = [
        t if t is None else t.requires_grad_(trained)
        for t in tensors(op, shape, dtype, residual=residual, affine=affine, bias=bias, layouts=("gapped", "dense"))
    ]
    x, branch, weight, bias = inputs if residual else [inputs[0], None, *inputs[1:]]
    out = torch.promote_types(dtype, residual or dtype)
    arguments = (x.detach().requires_grad_(trained), branch, weight, bias, 1e-3, out, True)
    torch.library.opcheck(torch.ops.fastgpt.norm_forward.default, arguments)


@operator_arguments
def test_backward_operator_passes_opcheck(dtype, residual, affine, bias, shape):
    torch.manual_seed(0)
    total = torch.promote_types(dtype, residual or dtype)
    x, dy, dtotal = (torch.randn(shape, device=DEVICE).to(total) for _ in range(3))
    weight = torch.randn(shape[-1:], device=DEVICE).to(affine)
    mean, rstd = torch.rand(2, x.numel() // shape[-1], device=DEVICE)
    arguments = (dy, x, weight, mean, rstd.clone(), bias, dtype, residual)
    torch.library.opcheck(torch.ops.fastgpt.norm_backward.default, (dtotal if residual else None, *arguments))


@pytest.mark.parametrize("backend", some(1, ["aot_eager", "inductor"]))
@pytest.mark.parametrize("bias", some(1, [True, False]))
@ops
@pytest.mark.covering_array(1)
def test_compiled_in_one_graph_it_gives_the_same(op, bias, backend):
    torch.manual_seed(0)
    torch._dynamo.reset()
    compiled = torch.compile(getattr(norm, op), fullgraph=True, backend=backend)
    inputs = tensors(op, (3, 5, 33), torch.float32, bias=bias, residual=torch.float16)
    grads = [torch.randn(3, 5, 33, device=DEVICE) for _ in range(len(inputs) - 2)]
    eager = outputs_and_gradients(getattr(norm, op), inputs, grads, eps=1e-3)
    assert same_bits(outputs_and_gradients(compiled, inputs, grads, eps=1e-3), eager)


@pytest.mark.slow
@ops
def test_one_compilation_serves_every_size(op):
    torch.manual_seed(0)
    torch._dynamo.reset()
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(getattr(norm, op), fullgraph=True, dynamic=True, backend=backend)
    compilations = set()
    for shape in [(3, 5, 33), (2, 7, 40), (6, 4, 129)]:
        inputs = tensors(op, shape, torch.float32)
        grads = [torch.randn(shape, device=DEVICE) for _ in range(len(inputs) - 2)]
        eager = outputs_and_gradients(getattr(norm, op), inputs, grads)
        assert same_bits(outputs_and_gradients(compiled, inputs, grads), eager)
        compilations.add(backend.frame_count)
    assert len(compilations) == 1  # none after the first shape


def test_compiled_under_autocast_it_gives_the_same():
    torch.manual_seed(0)
    torch._dynamo.reset()
    x, weight, _ = tensors("layer_norm", (5, 33), torch.float32)
    compiled = torch.compile(norm.layer_norm, fullgraph=True, backend="aot_eager")
    with torch.autocast(DEVICE, dtype=torch.float16):
        y = compiled(x, weight)
        assert torch.equal(y, norm.layer_norm(x, weight))
    assert y.dtype == torch.float16


HALF, LONG, DOUBLE = torch.float16, torch.int64, torch.float64
MISTAKES = [
    ({"x": zeros()}, r"x has shape \(\); expected at least 1 dimension"),
    ({"x": zeros(3, 0)}, r"x has shape \(3, 0\); expected 1 to 65,536 columns"),
    ({"x": zeros(2, 65537)}, r"x has shape \(2, 65537\); expected 1 to 65,536 columns"),
    ({"x": zeros(3, 4, dtype=LONG)}, r"x \(3, 4\) is torch.int64; expected float32, float16 or bfloat16"),
    ({"x": zeros(3, 4, dtype=DOUBLE)}, r"x \(3, 4\) is torch.float64; expected float32, float16 or bfloat16"),
    ({"weight": zeros(1, 4)}, r"weight has shape \(1, 4\); expected 1 dimension"),
    ({"weight": zeros()}, r"weight has shape \(\); expected 1 dimension"),
    ({"weight": zeros(5)}, r"weight has shape \(5,\); expected \(4,\), the columns of x"),
    ({"weight": zeros(4, dtype=HALF)}, r"weight \(4,\) is torch.float16; expected torch.float32, as x"),
    ({"weight": zeros(4, dtype=DOUBLE)}, r"weight \(4,\) is torch.float64; expected float32, float16 or bfloat16"),
    ({"weight": zeros(4, device="meta")}, rf"weight \(4,\) is on meta; expected {DEVICE}\S*, as x"),
    ({"bias": zeros(4, 1)}, r"bias has shape \(4, 1\); expected 1 dimension"),
    ({"bias": zeros(3)}, r"bias has shape \(3,\); expected \(4,\), the columns of x"),
    ({"bias": zeros(4, dtype=HALF)}, r"bias \(4,\) is torch.float16; expected torch.float32, as x"),
    ({"x": zeros(3, 4, dtype=HALF), "bias": zeros(4, dtype=HALF)}, r"bias \(4,\) is torch.float16; expected"),
    ({"bias": zeros(4, device="meta")}, rf"bias \(4,\) is on meta; expected {DEVICE}\S*, as x"),
]
MISTAKES_IN_SUMS = [
    ({"residual": zeros(4)}, r"residual has shape \(4,\); expected 2 dimensions"),
    ({"residual": zeros(1, 4)}, r"residual has shape \(1, 4\); expected \(3, 4\), as x"),
    ({"residual": zeros(3, 5)}, r"residual has shape \(3, 5\); expected \(3, 4\), as x"),
    ({"residual": zeros(3, 4, dtype=LONG)}, r"residual \(3, 4\) is torch.int64; expected float32, float16 or bfloat16"),
    ({"residual": zeros(3, 4, device="meta")}, rf"residual \(3, 4\) is on meta; expected {DEVICE}\S*, as x"),
]


@pytest.mark.parametrize(
    ("op", "changed", "message"),
    [(op, *mistake) for op in OPS for mistake in MISTAKES]
    + [("add_layer_norm", *mistake) for mistake in MISTAKES_IN_SUMS],
)
def test_what_does_not_fit_is_named_before_any_launch(op, changed, message, no_launch):
    arguments = {"x": zeros(3, 4), "weight": zeros(4), "bias": zeros(4)}
    if op == "add_layer_norm":
        arguments["residual"] = torch.zeros_like(changed.get("x", arguments["x"]))
    with pytest.raises(ValueError, match=f"^{op}: {message}"):
        getattr(norm, op)(**arguments | changed)


@pytest.mark.skipif(DEVICE == "cuda", reason="about tensors on a CPU")
@ops
def test_without_the_interpreter_a_cpu_is_refused(op, monkeypatch, no_launch):
    monkeypatch.setattr(launch, "INTERPRETED", False)
    inputs = tensors(op, (3, 4), torch.float32)
    with pytest.raises(ValueError, match=rf"^{op}: x \(3, 4\) is on cpu; expected a CUDA GPU .*TRITON_INTERPRET=1"):
        getattr(norm, op)(*inputs)


@pytest.mark.skipif(DEVICE == "cuda", reason="about tensors on a CPU")
@ops
def test_bfloat16_is_refused_in_the_interpreter(op, no_launch):
    inputs = tensors(op, (3, 4), torch.bfloat16)
    with pytest.raises(ValueError, match=rf"^{op}: x \(3, 4\) is bfloat16, which .*; expected float32 or float16"):
        getattr(norm, op)(*inputs)
