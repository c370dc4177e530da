"""What only a GPU can show of linear cross-entropy: bfloat16, repeated bits, sizes past 2**31 elements, memory."""

import pytest
import torch
import torch.nn.functional as F

from fastgpt_kernels import cross_entropy
from fastgpt_kernels.cross_entropy import linear_cross_entropy
from tests.parity import FLOAT32_LIMIT, assert_op_agrees, outputs_and_gradients, relative_errors
from tests.test_cross_entropy import chunks_of, grad_of, inputs_of, labels, plain, reductions, same_bits

pytestmark = pytest.mark.gpu

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


@pytest.fixture(autouse=True)
def products_in_full_precision():
    """float32 products are those of float32, not of TF32, here and in stock PyTorch."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def needs(gib):
    if torch.cuda.mem_get_info()[0] < gib * 2**30:
        pytest.skip(f"needs {gib} GiB of free GPU memory")


@dtypes
@reductions
@pytest.mark.parametrize(
    ("R", "C", "V", "valid_vocab"),
    [(300, 768, 50304, 50257), (257, 33, 50257, None), (1000, 384, 65, None), (64, 129, 4097, 4095), (5, 7, 1025, 3)],
)
def test_agrees_with_float64_as_nearly_as_stock_pytorch_does(R, C, V, valid_vocab, reduction, dtype):
    torch.manual_seed(0)
    arguments = {"valid_vocab": valid_vocab, "reduction": reduction, "plain": plain}
    arguments["targets"] = labels((R,), valid_vocab or V, ignored=0.1)
    for rows in (R, 100):
        with chunks_of(rows, V, dtype):
            assert_op_agrees(linear_cross_entropy, "linear_cross_entropy", inputs_of((R,), C, V, dtype), **arguments)


@dtypes
@reductions
@pytest.mark.parametrize(("R", "C", "V"), [(4096, 768, 50304), (3001, 129, 5003)])
def test_20_backward_runs_give_the_same_bits(R, C, V, reduction, dtype):
    torch.manual_seed(0)
    inputs, grad = inputs_of((R,), C, V, dtype), grad_of(reduction, (R,))
    arguments = {"targets": labels((R,), V, ignored=0.1), "reduction": reduction}
    with chunks_of(1500, V, dtype):
        first = outputs_and_gradients(linear_cross_entropy, inputs, [grad], **arguments)
        for _ in range(19):
            assert same_bits(outputs_and_gradients(linear_cross_entropy, inputs, [grad], **arguments), first)


def by_hand(x, weight, targets, rows):
    """In float64, of logits that are zero but for the last `rows` of weight: each loss, dx, and the end of dweight."""
    x, end, V = x.double(), weight[-rows:].double(), len(weight)
    z = torch.zeros(len(x), V, device="cuda", dtype=torch.float64)
    z[:, -rows:] = x @ end.t()
    losses = F.cross_entropy(z, targets, reduction="none")
    dz = z.softmax(-1) - F.one_hot(targets, V)
    return losses, dz[:, -rows:] @ end, dz.t() @ x


SIZES = {
    # (R, C, V), of which one product passes 2**31
    "logits in a chunk": (42_700, 8, 50_304),
    "x": (1_048_600, 2048, 16),
    "weight": (5, 2048, 1_048_600),
}


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("size", SIZES)
def test_more_than_2_to_the_31_elements_do_not_overflow(size, reduction, monkeypatch):
    """All rows of x are zero but the last few, and all of weight but its last few."""
    R, C, V = SIZES[size]
    assert max(R * V, R * C, V * C) > 2**31
    needs(60)
    monkeypatch.setattr(cross_entropy, "LOGITS_BYTES", 2**34)
    torch.manual_seed(0)
    rows, x, weight = 5, torch.zeros(R, C, device="cuda"), torch.zeros(V, C, device="cuda")
    for t in (x, weight):
        t[-rows:] = torch.randn(rows, C, device="cuda") * (1.0 if t is x else C**-0.5)
    targets = torch.full((R,), V - 1, device="cuda")
    targets[-rows:] = torch.arange(V - rows, V, device="cuda")
    grad = torch.ones((R,) if reduction == "none" else (), device="cuda")
    loss, dx, dweight = outputs_and_gradients(
        linear_cross_entropy, [x, weight], [grad], targets=targets, reduction=reduction
    )
    losses, last_dx, whole_dweight = by_hand(x[-rows:], weight, targets[-rows:], rows)
    results = [(dx[-rows:], last_dx), (dweight[-rows:], whole_dweight[-rows:])]
    if reduction == "none":
        results.append((loss[-rows:], losses))
    if rows < R:  # where x is zero, every column is as likely
        first_dx = weight[-rows:].double().sum(0) / V - weight[-1].double()
        results.append((dx[0], first_dx))
        results.append((dx[R // 2], first_dx))
        if reduction == "none":
            results.append((loss[:-rows], torch.full((R - rows,), V, device="cuda").double().log()))
    for a, b in results:
        assert max(relative_errors(a, b)) < FLOAT32_LIMIT
    assert max(relative_errors(dweight[:64], whole_dweight[:64])) < FLOAT32_LIMIT


def extra_memory(function, *inputs):
    """Bytes that a forward and backward pass takes at its peak, gradients included."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function(*inputs)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def test_peak_memory_is_below_a_quarter_of_that_of_all_logits():
    needs(60)
    torch.manual_seed(0)
    R, C, V = 64 * 1024, 768, 50_304
    x, weight = (t.requires_grad_() for t in inputs_of((64, 1024), C, V, torch.bfloat16))
    targets = labels((64, 1024), V)

    def ours():
        torch.autograd.grad(linear_cross_entropy(x, weight, targets), (x, weight))

    def stock():
        loss = F.cross_entropy(F.linear(x, weight).flatten(0, 1), targets.flatten())
        torch.autograd.grad(loss, (x, weight))

    def without_gradients():
        with torch.no_grad():
            linear_cross_entropy(x, weight, targets)

    for function in (ours, without_gradients):
        function()  # compiles, and makes the workspace of matrix products
    memory = extra_memory(ours)
    assert memory < extra_memory(stock) / 4
    a_few = 2**26
    # a chunk of logits; dx before and after its factor; dweight in float32 and rounded
    assert memory < cross_entropy.LOGITS_BYTES + 2 * 2 * R * C + (4 + 2) * V * C + a_few
    assert extra_memory(without_gradients) < cross_entropy.LOGITS_BYTES + a_few


@reductions
def test_nothing_waits_for_the_gpu(reduction):
    torch.manual_seed(0)
    inputs, grad = inputs_of((300,), 64, 1000, torch.bfloat16), grad_of(reduction, (300,))
    arguments = {"targets": labels((300,), 1000, ignored=0.1), "reduction": reduction}
    outputs_and_gradients(linear_cross_entropy, inputs, [grad], **arguments)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        outputs_and_gradients(linear_cross_entropy, inputs, [grad], **arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
