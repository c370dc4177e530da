"""The torch backend against the reference in float64: outputs and every gradient, on awkward inputs."""

import pytest
import torch

from fastgpt_kernels import product_attention, reference, torch_ops
from tests.helpers.parity import SPREADS

DTYPES = [torch.float32, torch.bfloat16]
U = 2**-8  # the most that one rounding to bfloat16 changes a number, relatively

# For ||a - b|| / ||b|| and for max|a - b| / max|b|. A value passes through at most four tensors of 16 bits in a
# row (weights, their gradient, the scores' gradient, the result; a sum, its norm, a gradient), hence 4 U in the norm,
# and twice as much for a lone number. Scores and logits are float32.
BOUNDS = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (4 * U, 8 * U)}

# How grad_out lies in memory: each takes its shape, and a function that makes a dense tensor of a shape.
LAYOUTS = {
    "dense": lambda shape, make: make(shape),
    "transposed": lambda shape, make: make(shape[::-1]).permute([*reversed(range(len(shape)))]),
    "expanded": lambda shape, make: make(shape[-1:]).expand(shape),
}
layouts = pytest.mark.parametrize("layout", LAYOUTS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])


def outputs_and_gradients(backend, op, leaves, views, dtype, rounded, layout, arguments):
    """Every output of an op and every input's gradient, computed in `dtype` from numbers exact in `rounded`."""
    torch.manual_seed(1)
    inputs = views(*(leaf.to(rounded).to(dtype).requires_grad_() for leaf in leaves))
    out = getattr(backend, op)(*inputs, **arguments)
    out = out if isinstance(out, tuple) else (out,)
    grads = [LAYOUTS[layout](o.shape, lambda shape, o=o: torch.randn(shape).to(rounded).to(o.dtype)) for o in out]
    return *out, *torch.autograd.grad(out, inputs, grads)


def assert_parity(op, leaves, views=lambda *leaves: leaves, *, dtype, layout="dense", **arguments):
    expected = outputs_and_gradients(reference, op, leaves, views, torch.float64, dtype, layout, arguments)
    got = outputs_and_gradients(torch_ops, op, leaves, views, dtype, dtype, layout, arguments)
    for a, b in zip(got, expected, strict=True):
        assert_near(a, b, dtype)


def assert_near(a, b, dtype):
    assert a.shape == b.shape
    assert a.isfinite().all()
    if b.numel() and not b.any():  # with one key nothing depends on the scores: rounding of numbers near 1 is left
        assert a.abs().max() <= BOUNDS[dtype][1]
    elif b.numel():
        assert (a - b).norm() <= BOUNDS[dtype][0] * b.norm()
        assert (a - b).abs().max() <= BOUNDS[dtype][1] * b.abs().max()


@pytest.mark.parametrize("names", ["", "dropout", "documents"])
@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_training_attention_rounds_no_score(dtype, spread, names):
    """As near to float64 as the fused path is, whose scores never leave float32; the reference is nearer."""
    torch.manual_seed(0)
    shape = (2, 64, 2, 32)
    q, k, v, grad = (torch.randn(shape) * width for width in (spread**0.5, spread**0.5, 1, 1))
    inputs, arguments = [t.to(dtype) for t in (q, k, v)], attention_arguments(names, 64)
    exact = [t.double() for t in inputs]
    truth = with_gradients(reference.causal_attention, exact, grad.to(dtype).double(), **arguments)
    bound = U / 2 if dtype == torch.bfloat16 else U / 16
    for backend, most in ((torch_ops, 4 * bound), (reference, bound)):
        got = with_gradients(backend.causal_attention, inputs, grad.to(dtype), **arguments)
        for a, b in zip(got, truth, strict=True):
            assert a.dtype == dtype
            assert (a.double() - b).norm() <= most * b.norm()


def with_gradients(function, inputs, grad, **arguments):
    leaves = [t.clone().requires_grad_() for t in inputs]
    out = function(*leaves, **arguments)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def packed(H, Hkv, Tq):
    """q, k and v as views of one (B, Tk, H + 2 Hkv, D), as the model's c_attn gives them; the last Tq queries."""
    return lambda qkv: (qkv[:, qkv.shape[1] - Tq :, :H], *qkv[:, :, H:].split(Hkv, dim=2))


def attention_arguments(names, Tk):
    every = {
        "scale": {"scale": 0.3},
        "negative": {"scale": -0.3},
        "dropout": {"dropout_p": 0.25, "seed": torch.tensor(3)},
        "documents": {"doc_ids": torch.stack([torch.arange(Tk) // 3, torch.arange(Tk) // 40])},
    }
    return {key: value for name in names.split() for key, value in every[name].items()}


# Both sides of the switch in torch_ops.prefers_products, one token, odd lengths, and queries on top of a cache.
LENGTHS = [(1, 1, 3, 3), (7, 7, 3, 1), (64, 64, 3, 3), (65, 65, 6, 2)]  # Tq, Tk, H, Hkv
LENGTHS += [(1, 6, 3, 3), (3, 7, 6, 2), (1, 70, 6, 2), (3, 70, 3, 3)]
lengths = pytest.mark.parametrize(("Tq", "Tk", "H", "Hkv"), LENGTHS)
names = pytest.mark.parametrize("names", ["", "scale", "negative", "dropout", "documents", "scale dropout documents"])


@dtypes
@layouts
@names
@lengths
@pytest.mark.covering_array(2)
def test_attention_and_its_gradients_agree(Tq, Tk, H, Hkv, names, layout, dtype):
    torch.manual_seed(0)
    qkv, arguments = torch.randn(2, Tk, H + 2 * Hkv, 5), attention_arguments(names, Tk)
    assert_parity("causal_attention", [qkv], packed(H, Hkv, Tq), dtype=dtype, layout=layout, **arguments)


@dtypes
@names
@lengths
@pytest.mark.covering_array(2)
def test_attention_without_gradients_agrees(Tq, Tk, H, Hkv, names, dtype):
    torch.manual_seed(0)
    inputs, arguments = packed(H, Hkv, Tq)(torch.randn(2, Tk, H + 2 * Hkv, 5)), attention_arguments(names, Tk)
    rounded = [t.to(dtype) for t in inputs]
    expected = reference.causal_attention(*(t.double() for t in rounded), **arguments)
    assert_near(torch_ops.causal_attention(*rounded, **arguments), expected, dtype)


@pytest.mark.parametrize("names", ["", "documents"])
def test_attention_agrees_where_only_keys_and_values_are_trained(names):
    torch.manual_seed(0)
    q, arguments = torch.randn(2, 3, 6, 5), attention_arguments(names, 7)
    kv = [torch.randn(2, 7, 2, 5, requires_grad=True) for _ in range(2)]
    expected = reference.causal_attention(q.double(), *(t.double() for t in kv), **arguments)
    got = torch_ops.causal_attention(q, *kv, **arguments)
    assert_near(got, expected, torch.float32)
    grad = torch.randn_like(got)
    pairs = zip(torch.autograd.grad(got, kv, grad), torch.autograd.grad(expected, kv, grad.double()), strict=True)
    for a, b in pairs:
        assert_near(a, b.double(), torch.float32)


@pytest.mark.slow
def test_training_attention_in_16_bits_compiles_in_one_graph():
    torch.manual_seed(0)
    inputs, grad = [t.bfloat16() for t in torch.randn(3, 2, 20, 2, 8)], torch.randn(2, 20, 2, 8).bfloat16()
    compiled = torch.compile(torch_ops.causal_attention, fullgraph=True, backend="aot_eager")
    for a, b in zip(
        with_gradients(compiled, inputs, grad), with_gradients(torch_ops.causal_attention, inputs, grad), strict=True
    ):
        assert_near(a.double(), b.double(), torch.bfloat16)


def test_scores_of_float32_inputs_are_not_rounded_under_autocast():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 64, 2, 32)
    inputs, arguments = (6 * q, 6 * k, v), {"dropout_p": 0.25, "seed": torch.tensor(3)}
    exact = reference.causal_attention(*(t.bfloat16().double() for t in inputs), **arguments)
    with torch.autocast("cpu", torch.bfloat16):
        got = torch_ops.causal_attention(*inputs, **arguments)
    assert got.dtype == torch.bfloat16
    assert (got - exact).norm() < 2 * U * exact.norm()


@pytest.mark.parametrize("names", ["", "documents"])
def test_scores_made_in_parts_are_the_same(names, monkeypatch):
    torch.manual_seed(0)
    inputs = [t.bfloat16().requires_grad_() for t in torch.randn(3, 5, 20, 3, 8)]
    arguments = {"doc_ids": torch.arange(100).view(5, 20) // 7} if names else {}
    whole = torch_ops.causal_attention(*inputs, **arguments)
    monkeypatch.setattr(product_attention, "SCORES", 2 * 3 * 20 * 20)
    assert torch.equal(torch_ops.causal_attention(*inputs, **arguments), whole)


def test_a_large_batch_is_made_in_few_parts(monkeypatch):
    torch.manual_seed(0)
    inputs = [t.bfloat16().requires_grad_() for t in torch.randn(3, 150, 3, 2, 4)]
    whole = torch_ops.causal_attention(*inputs)
    made = []
    weights = product_attention._weights
    monkeypatch.setattr(product_attention, "SCORES", 1)
    monkeypatch.setattr(product_attention, "_weights", lambda *args: made.append(len(args[0])) or weights(*args))
    assert torch.equal(torch_ops.causal_attention(*inputs), whole)
    assert made == 50 * [3]  # not 150 of 1


@pytest.mark.parametrize("names", ["", "dropout", "documents"])
@pytest.mark.parametrize(("Tq", "Tk"), [(5, 5), (1, 5), (70, 70)])
def test_attention_of_an_empty_batch_is_empty(Tq, Tk, names):
    arguments = attention_arguments(names, Tk)
    arguments |= {"doc_ids": arguments["doc_ids"][:0]} if "doc_ids" in arguments else {}
    assert_parity("causal_attention", [torch.randn(0, Tk, 9, 5)], packed(3, 3, Tq), dtype=torch.float32, **arguments)


def test_products_serve_short_training_in_16_bits_on_a_cpu():
    q = torch.zeros(1, 1, 1, 4, dtype=torch.bfloat16, requires_grad=True)
    assert torch_ops.prefers_products(q, 1024)
    assert not torch_ops.prefers_products(q, 1025)
    assert not torch_ops.prefers_products(q.detach().float().requires_grad_(), 1)
    assert not torch_ops.prefers_products(q.detach(), 1)
    with torch.no_grad():
        assert not torch_ops.prefers_products(q, 1)


@dtypes
@layouts
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("op", ["layer_norm", "add_layer_norm"])
@pytest.mark.parametrize("shape", [(3, 5, 33), (7, 4), (0, 5, 33)])
def test_layer_norms_and_their_gradients_agree(shape, op, bias, layout, dtype):
    torch.manual_seed(0)
    streams = [torch.randn(shape[::-1]) for _ in range(1 if op == "layer_norm" else 2)]
    affine = [torch.randn(shape[-1]) for _ in range(2 if bias else 1)]

    def views(*leaves):
        return *(leaf.permute([*reversed(range(leaf.dim()))]) for leaf in leaves[: len(streams)]), *leaves[
            len(streams) :
        ]

    assert_parity(op, streams + affine, views, dtype=dtype, layout=layout, eps=1e-3)


def reversed_dimensions(t):
    return t.permute([*reversed(range(t.dim()))])


@dtypes
@layouts
@pytest.mark.parametrize("gain", [True, False])
@pytest.mark.parametrize("op", ["rms_norm", "add_rms_norm"])
@pytest.mark.parametrize("shape", [(3, 5, 33), (7, 4), (0, 5, 33), (2, 1)])
@pytest.mark.covering_array(2)
def test_rms_norms_and_their_gradients_agree(shape, op, gain, layout, dtype):
    torch.manual_seed(0)
    streams = [torch.randn(shape[::-1]) for _ in range(1 if op == "rms_norm" else 2)]
    weight = [torch.randn(shape[-1])] if gain else []

    def views(*leaves):
        return *map(reversed_dimensions, leaves[: len(streams)]), *leaves[len(streams) :]

    assert_parity(op, streams + weight, views, dtype=dtype, layout=layout, eps=1.0 if shape[-1] == 1 else 1e-3)


@dtypes
@layouts
@pytest.mark.parametrize("op", ["swiglu", "relu2"])
@pytest.mark.parametrize("shape", [(3, 5, 34), (7, 4), (0, 5, 34)])
def test_activations_and_their_gradients_agree(shape, op, layout, dtype):
    torch.manual_seed(0)
    assert_parity(op, [torch.randn(shape[::-1]) * 2], lambda x: (reversed_dimensions(x),), dtype=dtype, layout=layout)


MODERN = {  # operation: the shapes of its inputs
    "rms_norm": ((3, 5, 32), (32,)),
    "add_rms_norm": ((3, 5, 32), (3, 5, 32)),
    "swiglu": ((3, 5, 32),),
    "relu2": ((3, 5, 32),),
}
modern = pytest.mark.parametrize("op", MODERN)


@modern
@dtypes
def test_compiled_without_gradients_and_with_them_the_results_are_the_same(op, dtype):
    """Each by its own path: a composition that the compiler fuses, one without gradients, and a lean backward pass."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    function, leaves = getattr(torch_ops, op), [torch.randn(shape).to(dtype) for shape in MODERN[op]]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    found = []
    for one in (function, compiled):
        inputs = [leaf.clone().requires_grad_() for leaf in leaves]
        out = one(*inputs)
        out = out if isinstance(out, tuple) else (out,)
        found.append([*out, *torch.autograd.grad(out, inputs, [torch.ones_like(t) for t in out])])
    without = function(*leaves)
    without = without if isinstance(without, tuple) else (without,)
    for a, b in [*zip(*found, strict=True), *zip(without, found[0], strict=False)]:
        assert a.dtype == b.dtype == dtype
        assert_near(a, b, dtype)


@modern
def test_training_keeps_an_input_and_at_most_a_number_a_row_beside_it(op):
    """PyTorch's compositions keep more for the backward pass."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        getattr(torch_ops, op)(*(torch.randn(shape).requires_grad_() for shape in MODERN[op]))
    numbers = {"rms_norm": [480, 32, 15], "add_rms_norm": [480, 15], "swiglu": [480], "relu2": [480]}
    assert [t.numel() for t in kept] == numbers[op]


@pytest.mark.parametrize("trained", [True, False])
def test_rms_norm_by_a_weight_in_another_dtype_warns_of_nothing(trained, recwarn):
    x, weight = torch.randn(3, 32, dtype=torch.bfloat16), torch.randn(32)
    y = torch_ops.rms_norm(x, weight.requires_grad_(trained))
    assert y.dtype == torch.bfloat16
    assert_near(y.detach(), reference.rms_norm(x, weight.detach()), torch.bfloat16)
    assert not list(recwarn)


@dtypes
@layouts
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("valid", [None, 11, 13])
@pytest.mark.parametrize("shape", [(3, 5), (7,), (0, 5)])
@pytest.mark.covering_array(2)
def test_cross_entropy_and_its_gradients_agree(shape, valid, reduction, layout, dtype):
    torch.manual_seed(0)
    targets = torch.randint(11, shape)
    targets[:1] = -7
    assert_parity(
        "linear_cross_entropy",
        [torch.randn(*shape[:-1], 9, shape[-1]), torch.randn(9, 13)],
        lambda x, weight: (x.mT if x.dim() > 2 else x.t(), weight.t()),
        dtype=dtype,
        layout=layout,
        targets=targets,
        ignore_index=-7,
        valid_vocab=valid,
        reduction=reduction,
    )


backends = pytest.mark.parametrize("backend", [reference, torch_ops], ids=["reference", "torch"])


@backends
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_loss_of_ignored_rows_alone_is_zero_with_zero_gradients(backend, reduction):
    x, weight = torch.randn(2, 3, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    loss = backend.linear_cross_entropy(x, weight, torch.full((2, 3), -100), valid_vocab=5, reduction=reduction)
    assert loss == 0
    for gradient in torch.autograd.grad(loss, (x, weight)):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@backends
def test_an_ignored_row_gets_no_gradient_and_does_not_count(backend):
    x, weight = torch.randn(3, 4, requires_grad=True), torch.randn(6, 4)
    loss = backend.linear_cross_entropy(x, weight, torch.tensor([2, -100, 5]))
    torch.testing.assert_close(loss, backend.linear_cross_entropy(x[[0, 2]], weight, torch.tensor([2, 5])))
    (gradient,) = torch.autograd.grad(loss, x)
    assert (gradient != 0).any(-1).tolist() == [True, False, True]


@backends
def test_padding_columns_have_no_influence_and_no_gradient(backend):
    torch.manual_seed(0)
    x, weight, targets = torch.randn(2, 3, 4), torch.randn(8, 4), torch.randint(5, (2, 3))
    weight[5:] = 1e4
    weight.requires_grad_()
    loss = backend.linear_cross_entropy(x, weight, targets, valid_vocab=5)
    torch.testing.assert_close(loss, backend.linear_cross_entropy(x, weight[:5], targets))
    (gradient,) = torch.autograd.grad(loss, weight)
    assert (gradient != 0).any(-1).tolist() == [True] * 5 + [False] * 3


@backends
def test_an_unknown_reduction_is_an_error_that_lists_the_known(backend):
    with pytest.raises(ValueError, match="'average' is not one of mean, sum, none"):
        backend.linear_cross_entropy(torch.randn(2, 4), torch.randn(3, 4), torch.tensor([0, 1]), reduction="average")


@backends
def test_dropout_without_a_seed_is_an_error(backend):
    with pytest.raises(ValueError, match="needs a seed"):
        backend.causal_attention(*torch.randn(3, 1, 4, 2, 5), dropout_p=0.1)


def test_what_is_written_to_pages_that_are_a_view_is_not_lost():
    """The reference writes anywhere; stock says where it cannot."""
    k, v = torch.randn(2, 2, 3, 4).unbind()  # two tokens of three heads
    slots = torch.tensor([5, 2])
    pools = [torch.zeros(2, 3, 4, 4).transpose(2, 1) for _ in range(4)]  # (pages, 4 places, 3 heads, 4)
    reference.kv_write(k, v, *pools[:2], slots)
    assert torch.equal(pools[0][[1, 0], [1, 2]], k)
    assert torch.equal(pools[1][[1, 0], [1, 2]], v)
    with pytest.raises(RuntimeError, match="view"):
        torch_ops.kv_write(k, v, *pools[2:], slots)
