"""The kernels of SwiGLU and squared ReLU: parity with float64 and stock PyTorch, guarded; operators; bad input."""

import math

import pytest
import torch
from hypothesis import strategies as st

from fastgpt_kernels import activation, torch_ops
from tests.helpers.covering import some
from tests.helpers.parity import DEVICE, LAYOUTS, assert_op_agrees, outputs_and_gradients, zeros
from tests.helpers.random_cases import random_cases

DTYPES = [torch.float32, torch.float16]
OPS = ["swiglu", "relu2"]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float16"])
ops = pytest.mark.parametrize("op", OPS)


def randn(shape, dtype, layout="dense"):
    return LAYOUTS[layout](shape, lambda shape: (torch.randn(shape, device=DEVICE) * 2).to(dtype))


def in_float32(op):
    """Stock PyTorch, rounded once, as the kernels are."""

    def plain(x):
        return getattr(torch_ops, op)(x.float()).to(x.dtype)

    return plain


@random_cases(3, 60, data=st.data(), lead=st.lists(st.integers(0, 6), max_size=3), width=st.integers(1, 140))
@dtypes
@ops
@pytest.mark.covering_array(1)
def test_agrees_at_any_shape_and_layout(op, dtype, data, lead, width):
    torch.manual_seed(0)
    layout = st.sampled_from([*LAYOUTS])
    x = randn((*lead, 2 * width), dtype, data.draw(layout, "x"))
    assert_op_agrees(getattr(activation, op), op, [x], layout=data.draw(layout, "grad_out"), plain=in_float32(op))


@dtypes
@ops
@pytest.mark.parametrize("width", some(2, [127, 128, 129, 512, 513, 1024, 1025, 2050]))
@pytest.mark.covering_array(1)
def test_agrees_on_both_sides_of_rows_of_the_table(width, op, dtype):
    torch.manual_seed(0)
    x = randn((9, 2 * width), dtype, "gapped")
    assert_op_agrees(getattr(activation, op), op, [x], layout="gapped", plain=in_float32(op))


@dtypes
@ops
@pytest.mark.parametrize("shape", [(0, 34), (3, 0, 34)])
def test_no_rows_give_empty_results(shape, op, dtype):
    assert_op_agrees(getattr(activation, op), op, [randn(shape, dtype)])


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # to infinity, as on a GPU
@dtypes
def test_extremes_are_finite_where_stock_pytorchs_are(dtype):
    far = 60.0 if dtype == torch.float16 else 1e9
    x = torch.tensor([[-far, far, -0.0, 0.0, 1.0, -1.0, 2.0, far]], device=DEVICE, dtype=dtype)
    for op in OPS:
        assert_op_agrees(getattr(activation, op), op, [x], plain=in_float32(op))


@ops
def test_what_is_not_a_number_stays_so(op):
    """So that training that diverges shows it."""
    x = torch.full((2, 4), math.nan, device=DEVICE)
    y, dx = outputs_and_gradients(getattr(activation, op), [x], [torch.ones(2, 2 if op == "swiglu" else 4).to(x)])
    assert y.isnan().all()
    assert dx.isnan().all()


@ops
def test_gives_the_result_in_autocasts_dtype(op):
    torch.manual_seed(0)

    def ours(x):
        with torch.autocast(DEVICE, dtype=torch.float16):
            return getattr(activation, op)(x)

    assert_op_agrees(ours, op, [randn((5, 34), torch.float32)], plain=lambda x: getattr(torch_ops, op)(x).half())


@ops
def test_only_x_is_kept_for_the_backward_pass(op):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        x = randn((5, 34), torch.float32).requires_grad_()
        getattr(activation, op)(x)
    assert [t.data_ptr() for t in kept] == [x.data_ptr()]


@ops
@pytest.mark.parametrize(("dtype", "shape"), some(1, [(torch.float16, (3, 5, 34)), (torch.float32, (0, 34))]))
def test_operators_pass_opcheck(dtype, shape, op):
    torch.manual_seed(0)
    x = randn(shape, dtype)
    dy = randn((*shape[:-1], shape[-1] // 2) if op == "swiglu" else shape, dtype)
    forward, backward = (getattr(torch.ops.fastgpt, f"{op}_{way}").default for way in ("forward", "backward"))
    torch.library.opcheck(forward, (x.clone().requires_grad_(), torch.float32))
    torch.library.opcheck(backward, (dy, x))


@ops
def test_compiled_in_one_graph_it_gives_the_same(op):
    torch.manual_seed(0)
    torch._dynamo.reset()
    x = randn((3, 5, 34), torch.float32)
    grads = [randn((3, 5, 17 if op == "swiglu" else 34), torch.float32)]
    eager = outputs_and_gradients(getattr(activation, op), [x], grads)
    compiled = torch.compile(getattr(activation, op), fullgraph=True, backend="aot_eager")
    for a, b in zip(outputs_and_gradients(compiled, [x], grads), eager, strict=True):
        assert torch.equal(a, b)


MISTAKES = [
    ({"x": zeros()}, r"x has shape \(\); expected at least 1 dimension", OPS),
    ({"x": zeros(3, 4, dtype=torch.int64)}, r"x \(3, 4\) is torch.int64; expected float32, float16 or bfloat16", OPS),
    ({"x": zeros(3, 5)}, r"x has shape \(3, 5\); expected an even number of columns above 0", ["swiglu"]),
    ({"x": zeros(3, 0)}, r"x has shape \(3, 0\); expected an even number of columns above 0", ["swiglu"]),
]


@pytest.mark.parametrize(
    ("op", "arguments", "message"),
    [(op, arguments, message) for arguments, message, of in MISTAKES for op in of],
)
def test_what_does_not_fit_is_named_before_any_launch(op, arguments, message, no_launch):
    with pytest.raises(ValueError, match=f"^{op}: {message}"):
        getattr(activation, op)(**arguments)
