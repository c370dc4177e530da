"""Linear cross-entropy as an operation: chunks and memory, which gradients, autocast, operators, compile, bad input."""

import contextlib
import itertools
import math
import unittest.mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from fastgpt_kernels import cross_entropy, launch, reference, torch_ops
from fastgpt_kernels.cross_entropy import linear_cross_entropy, rows_per_chunk
from tests.helpers.covering import some
from tests.helpers.cross_entropy_cases import chunks_of, dtypes, grad_of, inputs_of, labels, reductions
from tests.helpers.parity import DEVICE, Guards, limit, outputs_and_gradients, relative_errors, same_bits, zeros


@given(
    rows=st.integers(1, 10**6),
    width=st.integers(1, 300_000),
    itemsize=st.sampled_from([2, 4]),
    mib=st.integers(1, 4096),
)
def test_chunks_fit_the_budget_and_are_few_and_even(rows, width, itemsize, mib):
    budget = mib * 2**18
    with unittest.mock.patch.object(cross_entropy, "LOGITS_BYTES", budget):
        n = rows_per_chunk(rows, width, itemsize)
    fitting = max(1, budget // (width * itemsize))
    assert 1 <= n <= fitting
    assert math.ceil(rows / n) == math.ceil(rows / fitting)  # no more of them than needed
    assert n == fitting or n % 128 == 0
    assert n - math.ceil(rows / math.ceil(rows / fitting)) < 128


@contextlib.contextmanager
def allocations():
    """The sizes in elements of all floating tensors that the chunks' operations make, but not of views of inputs."""
    sizes = []

    class Recorder(TorchDispatchMode):
        inputs = ()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **kwargs or {})
            floating = isinstance(out, torch.Tensor) and out.is_floating_point()
            if floating and out.untyped_storage().data_ptr() not in self.inputs:
                sizes.append(out.numel())
            return out

    class Recorded(cross_entropy._Chunks):
        def __init__(self, x, weight, *args):
            self.recorder = Recorder()
            self.recorder.inputs = [t.untyped_storage().data_ptr() for t in (x, weight)]
            with self.recorder:
                super().__init__(x, weight, *args)

        def run(self, *args):
            with self.recorder:
                super().run(*args)

    with unittest.mock.patch.object(cross_entropy, "_Chunks", Recorded):
        yield sizes


@dtypes
@reductions
@pytest.mark.covering_array(1)
def test_no_buffer_is_larger_than_the_budget(reduction, dtype):
    R, C, V = 40, 3, 500
    inputs = [t.requires_grad_() for t in inputs_of((R,), C, V, dtype)]
    with chunks_of(4, V, dtype), allocations() as sizes:
        linear_cross_entropy(*inputs, labels((R,), V), reduction=reduction).sum().backward()
    rows = 6 if reduction == "none" and dtype != torch.float32 else 4  # as many without a gradient in 16 bits
    assert max(sizes) == rows * 512  # columns rounded up to 16


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, None])
@reductions
@dtypes
@pytest.mark.covering_array(1)
def test_without_gradients_none_is_computed(dtype, reduction, context, launches):
    torch.manual_seed(0)
    inputs, targets = inputs_of((5,), 70, 900, dtype), labels((5,), 900, ignored=0.2)
    expected = linear_cross_entropy(*(t.clone().requires_grad_() for t in inputs), targets, reduction=reduction)
    launches.clear()
    guards = Guards()
    placed = [guards.input(t) for t in inputs]
    with (context or contextlib.nullcontext)(), chunks_of(2, 900, dtype, gradients=False), allocations() as sizes:
        leaves = [t.requires_grad_() for t in placed] if context == torch.no_grad else placed
        loss = linear_cross_entropy(*leaves, targets, reduction=reduction)
    assert [launch.constants["GRADIENT"] for launch in launches] == [False] * 3
    assert not loss.requires_grad
    assert max(relative_errors(loss, expected.detach().double())) < (1e-6 if dtype == torch.float32 else 1e-3)
    converted = 900 * 70 if dtype != torch.float32 and DEVICE == "cpu" else 0  # for want of a product into float32
    assert max(sizes) == max(2 * 912, converted)  # else nothing as large as weight
    guards.check()


@reductions
@dtypes
@pytest.mark.covering_array(1)
def test_each_gradient_is_the_same_without_the_other(dtype, reduction):
    torch.manual_seed(0)
    inputs, grad = inputs_of((5,), 7, 20, dtype), grad_of(reduction, (5,))
    arguments = {"targets": labels((5,), 20, ignored=0.2), "reduction": reduction}
    loss, dx, dweight = outputs_and_gradients(linear_cross_entropy, inputs, [grad], **arguments)
    for trained, expected in (((0,), [loss, dx, None]), ((1,), [loss, None, dweight])):
        got = outputs_and_gradients(linear_cross_entropy, inputs, [grad], trained=trained, **arguments)
        assert same_bits(got, expected)


@reductions
def test_a_loss_may_be_used_and_run_backward_more_than_once(reduction):
    torch.manual_seed(0)
    inputs, targets = inputs_of((5,), 7, 20), labels((5,), 20, ignored=0.2)
    leaves = [t.requires_grad_() for t in inputs]
    loss = linear_cross_entropy(*leaves, targets, reduction=reduction)
    first = torch.autograd.grad(loss.sum(), leaves, retain_graph=True)
    assert same_bits(torch.autograd.grad(loss.sum(), leaves, retain_graph=True), first)
    twice = torch.autograd.grad(loss.sum() * 3 + loss.sum(), leaves)
    assert same_bits(twice, [t * 4 for t in first])


@pytest.mark.parametrize("inside", [False, True], ids=["backward outside", "backward inside"])
@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "x in float16"])
@reductions
@pytest.mark.covering_array(1)
def test_autocast_multiplies_in_its_dtype_and_gives_each_gradient_in_its_own(reduction, mixed, inside, launches):
    torch.manual_seed(0)
    x, weight = inputs_of((2, 5), 33, 50)
    x = x.half() if mixed else x
    grad, targets = grad_of(reduction, (2, 5)), labels((2, 5), 50, ignored=0.2)

    def results(function, *inputs, grad=grad, autocast=True):
        leaves = [t.clone().requires_grad_() for t in inputs]
        with torch.autocast(DEVICE, dtype=torch.float16, enabled=autocast):
            loss = function(*leaves, targets, reduction=reduction)
            if inside:
                loss.backward(grad)
        if not inside:
            loss.backward(grad)
        return [loss.detach(), *(t.grad for t in leaves)]

    with chunks_of(3, 50, torch.float16):
        ours = results(linear_cross_entropy, x, weight)
    pairs = [launch.args[:2] for launch in launches if launch.name == "cross_entropy"]
    assert {logits.dtype for logits, _ in pairs} == {torch.float32}
    assert {gradient.dtype for _, gradient in pairs if gradient is not None} == {torch.float16}
    assert [t.dtype for t in ours] == [torch.float32, x.dtype, torch.float32]
    plain = results(torch_ops.linear_cross_entropy, x, weight)
    truth = results(reference.linear_cross_entropy, x.double(), weight.double(), grad=grad.double(), autocast=False)
    for a, b, c in zip(ours, plain, truth, strict=True):
        for error, stock_error in zip(relative_errors(a, c), relative_errors(b, c), strict=True):
            assert error <= limit(a.dtype, c, stock_error, narrow=True)


VARIANTS = [
    # (dtype, that of products, shape of x, reduction, share of ignored rows)
    (torch.float32, torch.float32, (3, 2, 5), "mean", 0.3),
    (torch.float32, torch.float32, (5,), "sum", 0.0),
    (torch.float16, torch.float16, (4, 5), "none", 0.3),
    (torch.float32, torch.float16, (4, 5), "mean", 1.0),
    (torch.float32, torch.float32, (0, 5), "mean", 0.0),
    (torch.float32, torch.float32, (0, 5), "none", 0.0),
]


@pytest.mark.parametrize("trained", [(), (0,), (1,), (0, 1)])
@pytest.mark.parametrize(("dtype", "products", "shape", "reduction", "ignored"), some(4, VARIANTS))
@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.covering_array(1)
def test_forward_operator_passes_opcheck(dtype, products, shape, reduction, ignored, trained, softcap):
    torch.manual_seed(0)
    inputs = [t.requires_grad_(i in trained) for i, t in enumerate(inputs_of(shape[:-1], shape[-1], 20, dtype))]
    targets = labels(shape[:-1], 19, ignored=ignored)
    wanted = 0 in trained, 1 in trained
    arguments = (*inputs, targets, -100, 19, softcap, reduction, products, *wanted)
    torch.library.opcheck(torch.ops.fastgpt.linear_cross_entropy_forward.default, arguments)


@pytest.mark.parametrize(("dtype", "products", "shape", "reduction", "ignored"), some(1, VARIANTS))
def test_backward_and_scale_operators_pass_opcheck(dtype, products, shape, reduction, ignored):
    torch.manual_seed(0)
    lead = shape[:-1]
    inputs, targets = inputs_of(lead, shape[-1], 20, dtype), labels(lead, 19, ignored=ignored)
    forward = torch.ops.fastgpt.linear_cross_entropy_forward
    lse = forward(*inputs, targets, -100, 19, 5.0, "none", products, False, False)[1]
    for wanted in itertools.product((True, False), repeat=2):
        arguments = (torch.randn(lead, device=DEVICE), *inputs, targets, lse, -100, 19, 5.0, products, *wanted)
        torch.library.opcheck(torch.ops.fastgpt.linear_cross_entropy_backward.default, arguments)
    factor = torch.tensor(0.3, device=DEVICE)
    arguments = (inputs[0].flatten(0, -2) if lead else inputs[0][None], factor, list(shape), torch.float32)
    torch.library.opcheck(torch.ops.fastgpt.linear_cross_entropy_scale.default, arguments)


@pytest.mark.parametrize("backend", some(1, ["aot_eager", "inductor"]))
@pytest.mark.parametrize("reduction", some(1, ["mean", "sum", "none"]))
@pytest.mark.covering_array(1)
def test_compiled_in_one_graph_it_gives_the_same(reduction, backend, monkeypatch, tmp_path):
    torch._dynamo.reset()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # caches do not see an operator change its shapes
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend=backend)
    torch.manual_seed(0)
    inputs, grad = inputs_of((3, 4), 7, 20), grad_of(reduction, (3, 4))
    for ignored, trained in ((0.3, (0, 1)), (1.0, (0, 1)), (0.3, (1,))):
        arguments = {"targets": labels((3, 4), 19, ignored=ignored), "valid_vocab": 19, "reduction": reduction}
        eager = outputs_and_gradients(linear_cross_entropy, inputs, [grad], trained=trained, **arguments)
        assert same_bits(outputs_and_gradients(compiled, inputs, [grad], trained=trained, **arguments), eager)
        with torch.no_grad():
            assert torch.equal(compiled(*inputs, **arguments), eager[0])


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_one_compilation_serves_every_size(reduction):
    torch.manual_seed(0)
    torch._dynamo.reset()
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, dynamic=True, backend=backend)
    compilations = set()
    for *lead, C, V in [(3, 5, 33, 20), (2, 7, 40, 33), (6, 4, 29, 50)]:
        inputs, grad = inputs_of(lead, C, V), grad_of(reduction, lead)
        arguments = {"targets": labels(lead, V, ignored=0.2), "reduction": reduction}
        eager = outputs_and_gradients(linear_cross_entropy, inputs, [grad], **arguments)
        assert same_bits(outputs_and_gradients(compiled, inputs, [grad], **arguments), eager)
        compilations.add(backend.frame_count)
    assert len(compilations) == 1  # none after the first shape


def test_compiled_under_autocast_it_gives_the_same():
    torch.manual_seed(0)
    torch._dynamo.reset()
    inputs, targets = [t.requires_grad_() for t in inputs_of((5,), 33, 20)], labels((5,), 20)
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    with torch.autocast(DEVICE, dtype=torch.float16):
        losses = [function(*inputs, targets) for function in (compiled, linear_cross_entropy)]
    first, second = ([loss.detach(), *torch.autograd.grad(loss, inputs)] for loss in losses)
    assert same_bits(first, second)
    assert not torch.equal(first[0], linear_cross_entropy(*inputs, targets))  # whose products are in float32


HALF, LONG, DOUBLE = torch.float16, torch.int64, torch.float64
MISTAKES = [
    ({"x": zeros()}, r"x has shape \(\); expected at least 1 dimension"),
    ({"x": zeros(3, 4, dtype=LONG)}, r"x \(3, 4\) is torch.int64; expected float32, float16 or bfloat16"),
    ({"x": zeros(3, 4, dtype=DOUBLE)}, r"x \(3, 4\) is torch.float64; expected float32, float16 or bfloat16"),
    ({"x": zeros(3, 5)}, r"weight has shape \(7, 4\); expected \(V, 5\), as x \(3, 5\)"),
    ({"x": zeros(3, 4, dtype=HALF)}, r"weight \(7, 4\) is torch.float32; expected torch.float16, as x"),
    ({"weight": zeros(4)}, r"weight has shape \(4,\); expected 2 dimensions"),
    ({"weight": zeros(1, 7, 4)}, r"weight has shape \(1, 7, 4\); expected 2 dimensions"),
    ({"weight": zeros(4, 7)}, r"weight has shape \(4, 7\); expected \(V, 4\), as x \(3, 4\)"),
    ({"weight": zeros(7, 4, dtype=HALF)}, r"weight \(7, 4\) is torch.float16; expected torch.float32, as x"),
    ({"weight": zeros(7, 4, dtype=DOUBLE)}, r"weight \(7, 4\) is torch.float64; expected float32, float16 or bf"),
    ({"weight": zeros(7, 4, device="meta")}, rf"weight \(7, 4\) is on meta; expected {DEVICE}\S*, as x"),
    ({"weight": zeros(0, 4)}, r"valid_vocab is 0; expected 1 to 0, the rows of weight"),
    ({"targets": zeros(4, dtype=LONG)}, r"targets has shape \(4,\) on .*; expected \(3,\) on .*, as x"),
    ({"targets": zeros(dtype=LONG)}, r"targets has shape \(\) on .*; expected \(3,\) on .*, as x"),
    ({"targets": zeros(3, 4, dtype=LONG)}, r"targets has shape \(3, 4\) on .*; expected \(3,\) on .*, as x"),
    ({"targets": zeros(3, dtype=LONG, device="meta")}, rf"targets has shape \(3,\) on meta; expected .* on {DEVICE}"),
    ({"targets": zeros(3)}, r"targets \(3,\) is torch.float32; expected an integer dtype"),
    ({"targets": zeros(3, dtype=torch.bool)}, r"targets \(3,\) is torch.bool; expected an integer dtype"),
    ({"valid_vocab": 0}, r"valid_vocab is 0; expected 1 to 7, the rows of weight"),
    ({"valid_vocab": -1}, r"valid_vocab is -1; expected 1 to 7, the rows of weight"),
    ({"valid_vocab": 8}, r"valid_vocab is 8; expected 1 to 7, the rows of weight"),
    *(({"softcap": cap}, rf"softcap is {cap}; expected a number above 0, or None") for cap in (0.0, -1.0, math.inf)),
    ({"softcap": math.nan}, "softcap is nan; expected a number above 0, or None"),
]


@reductions
@pytest.mark.parametrize(("changed", "message"), MISTAKES)
def test_what_does_not_fit_is_named_before_any_launch(changed, message, reduction, no_launch):
    arguments = {"x": zeros(3, 4), "weight": zeros(7, 4), "targets": zeros(3, dtype=LONG), "reduction": reduction}
    with pytest.raises(ValueError, match=f"^linear_cross_entropy: {message}"):
        linear_cross_entropy(**arguments | changed)


@pytest.mark.parametrize("reduction", ["median", "", None])
def test_an_unknown_reduction_is_named(reduction, no_launch):
    with pytest.raises(
        ValueError, match=f"^linear_cross_entropy: reduction {reduction!r} is not one of mean, sum, none"
    ):
        linear_cross_entropy(zeros(3, 4), zeros(7, 4), zeros(3, dtype=LONG), reduction=reduction)


@reductions
@pytest.mark.parametrize(
    ("target", "ignore_index"),
    [(-1, -100), (-100, -1), (-1, 0), (5, -100), (6, -100), (7, -100), (2**40, -100), (-(2**40), -100)],
)
def test_a_target_out_of_range_is_named_before_any_launch(target, ignore_index, reduction, no_launch, monkeypatch):
    monkeypatch.setattr(cross_entropy, "DEBUG", True)  # on a GPU they are checked on demand
    targets = torch.tensor([[0, 4], [ignore_index, target]], device=DEVICE)
    message = rf"targets \(2, 2\) holds {target}; expected 0 to 4, or ignore_index {ignore_index}$"
    with pytest.raises(ValueError, match=f"^linear_cross_entropy: {message}"):
        linear_cross_entropy(
            zeros(2, 2, 4), zeros(7, 4), targets, ignore_index=ignore_index, valid_vocab=5, reduction=reduction
        )


@pytest.mark.skipif(DEVICE == "cuda", reason="about tensors on a CPU")
def test_a_cpu_is_served_by_the_interpreter_alone_and_without_bfloat16(no_launch, monkeypatch):
    targets, bfloat16 = zeros(3, dtype=LONG), torch.bfloat16
    with pytest.raises(ValueError, match=r"^linear_cross_entropy: x \(3, 4\) is bfloat16, which .*; expected float32"):
        linear_cross_entropy(zeros(3, 4, dtype=bfloat16), zeros(7, 4, dtype=bfloat16), targets)
    monkeypatch.setattr(launch, "INTERPRETED", False)
    message = r"^linear_cross_entropy: x \(3, 4\) is on cpu; expected a CUDA GPU .*TRITON_INTERPRET=1"
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(zeros(3, 4), zeros(7, 4), targets)


@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU bfloat16 is right")
def test_autocast_in_bfloat16_is_refused_in_the_interpreter(no_launch):
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="autocast is in bfloat16, which"):
        linear_cross_entropy(zeros(3, 4), zeros(7, 4), zeros(3, dtype=LONG))
