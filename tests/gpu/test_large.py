"""Shapes that need tens of GiB of a GPU's memory: `pytest -m gpu_large`, in one process.

Sizes past 2**31 elements, and peaks of memory at the sizes where they matter.
"""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from fastgpt.config.training import PRESETS
from fastgpt.model import workloads
from fastgpt.ops.autotune import choose
from fastgpt_kernels import activation, cross_entropy, norm, reference, torch_ops
from fastgpt_kernels.attention import causal_attention
from fastgpt_kernels.cross_entropy import linear_cross_entropy
from fastgpt_kernels.paged import kv_write, paged_attention
from tests.helpers.cross_entropy_cases import inputs_of, labels
from tests.helpers.paged_cases import integers
from tests.helpers.parity import FLOAT32_LIMIT, assert_parity, outputs_and_gradients, relative_errors

pytestmark = pytest.mark.gpu_large


@pytest.fixture(autouse=True)
def all_of_the_memory():
    """float32 products are those of float32, and what the test before has cached is there to be had."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    torch.manual_seed(0)
    torch.cuda.empty_cache()
    yield
    torch.set_float32_matmul_precision(before)


def needs(gib: int) -> None:
    if torch.cuda.mem_get_info()[0] < gib * 2**30:
        pytest.skip(f"needs {gib} GiB of free GPU memory")


@pytest.mark.parametrize("shape", [(129, 8192, 16, 128), (1, 131_200, 64, 256)], ids=["batch", "context"])
def test_attention_to_more_than_2_31_elements_does_not_overflow(shape):
    """q, k, v, the output and each gradient have B * T * H * D > 2**31 elements; many sequences, or one long one.

    The last batch entry's last head is compared. The output gradient is zero but in the last rows there, so that the
    reference needs those queries alone.
    """
    B, T, H, D = shape
    n = 64
    assert B * T * H * D > 2**31
    needs(48)
    inputs = [torch.randn(B, T, H, D, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    grad = torch.zeros(B, T, H, D, device="cuda", dtype=torch.bfloat16)
    grad[-1, -n:, -1] = torch.randn(n, D, device="cuda")
    out, dq, dk, dv = outputs_and_gradients(causal_attention, inputs, [grad])
    for t in (dq, dk, dv):  # where no gradient flows
        assert not t[0, :, 0].any()
        assert not t[-1, :, 0].any()
    q, k, v = (t[-1:, :, -1:] for t in inputs)
    head, upstream = [q[:, -n:], k, v], grad[-1:, -n:, -1:]
    plain = outputs_and_gradients(torch_ops.causal_attention, head, [upstream])
    truth = outputs_and_gradients(reference.causal_attention, [t.double() for t in head], [upstream.double()])
    ours = [t[-1:, :, -1:] for t in (out, dq, dk, dv)]
    assert_parity([ours[0][:, -n:], ours[1][:, -n:], *ours[2:]], plain, truth, ["out", "dq", "dk", "dv"])


@pytest.mark.parametrize("strides", [(2**31 + 64, 32, 16, 1), (64, 2**26, 16, 1), (2048, 32, 2**31 + 64, 1)])
def test_attention_to_strides_beyond_2_31_elements_does_not_overflow(strides):
    """Of the batch, of positions within a tile, and of heads."""
    needs(12)
    memory = torch.empty(2**32, device="cuda", dtype=torch.bfloat16)
    far = memory.as_strided((2, 64, 2, 16), strides)
    near = torch.randn(3, 2, 64, 2, 16, device="cuda", dtype=torch.bfloat16)
    far.copy_(near[0])
    for order in ([0, 1, 2], [1, 0, 2], [1, 2, 0]):
        inputs = [near[i] for i in order]
        expected = outputs_and_gradients(causal_attention, inputs, [near[2]])
        got = outputs_and_gradients(causal_attention, [far if i == 0 else near[i] for i in order], [near[2]])
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


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


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("size", SIZES)
def test_a_loss_of_more_than_2_31_elements_does_not_overflow(size, reduction, monkeypatch):
    """All rows of x are zero but the last few, and all of weight but its last few."""
    R, C, V = SIZES[size]
    assert max(R * V, R * C, V * C) > 2**31
    needs(60)
    monkeypatch.setattr(cross_entropy, "LOGITS_BYTES", 2**34)
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


def test_peak_memory_of_the_loss_is_below_a_quarter_of_that_of_all_logits():
    needs(60)
    R, C, V = 64 * 1024, 768, 50_304
    x, weight = (t.requires_grad_() for t in inputs_of((64, 1024), C, V, torch.bfloat16))
    targets = labels((64, 1024), V)

    def ours():
        torch.autograd.grad(linear_cross_entropy(x, weight, targets), (x, weight))

    def plain():
        loss = F.cross_entropy(F.linear(x, weight).flatten(0, 1), targets.flatten())
        torch.autograd.grad(loss, (x, weight))

    def without_gradients():
        with torch.no_grad():
            linear_cross_entropy(x, weight, targets)

    for function in (ours, without_gradients):
        function()  # compiles, and makes the workspace of matrix products
    memory = extra_memory(ours)
    assert memory < extra_memory(plain) / 4
    a_few = 2**26
    # a chunk of logits; dx before and after its factor; dweight in float32 and rounded
    assert memory < cross_entropy.LOGITS_BYTES + 2 * 2 * R * C + (4 + 2) * V * C + a_few
    assert extra_memory(without_gradients) < cross_entropy.LOGITS_BYTES + a_few


@pytest.mark.parametrize("C", [768, 65536])
def test_normalized_rows_past_2_31_elements_are_their_own(C):
    """All rows are zero but the last few, whose results are those of these rows alone."""
    R, last = 2**31 // C + 5, 5
    needs(48)  # seven tensors of 4.3 GB, and float64
    half = {"dtype": torch.float16, "device": "cuda"}
    weight, bias = torch.randn(C, **half), torch.randn(C, **half)
    tails = [torch.randn(last, C, **half) for _ in range(4)]  # x, residual, and the gradients of both outputs
    x, residual, dtotal, dy = (torch.zeros(R, C, **half) for _ in tails)
    for t, tail in zip((x, residual, dtotal, dy), tails, strict=True):
        t[-last:] = tail
    got = outputs_and_gradients(norm.add_layer_norm, [x, residual, weight, bias], [dtotal, dy])
    assert not got[0][0].any()
    assert torch.equal(got[1][0], bias)
    ours = [t[-last:] if t.shape == x.shape else t for t in got]
    inputs, grads = [*tails[:2], weight, bias], tails[2:]
    truth = outputs_and_gradients(reference.add_layer_norm, [t.double() for t in inputs], [g.double() for g in grads])
    assert_parity(ours, outputs_and_gradients(torch_ops.add_layer_norm, inputs, grads), truth)


@pytest.mark.parametrize("op", ["swiglu", "relu2"])
def test_activations_past_2_31_elements_are_their_own(op):
    """As above."""
    needs(32)  # four tensors of up to 8.6 GB
    width = 4096
    R, last, shrinks = 2**31 // width + 5, 5, 2 if op == "swiglu" else 1
    tails = [torch.randn(last, n, dtype=torch.float16, device="cuda") for n in (shrinks * width, width)]
    x, dy = (torch.zeros(R, tail.shape[1], dtype=torch.float16, device="cuda") for tail in tails)
    for t, tail in zip((x, dy), tails, strict=True):
        t[-last:] = tail
    got = outputs_and_gradients(getattr(activation, op), [x], [dy])
    assert not any(t[0].any() for t in got)
    ours, (tail, grad) = [t[-last:] for t in got], tails
    truth = outputs_and_gradients(getattr(reference, op), [tail.double()], [grad.double()])
    plain = [t.half() for t in outputs_and_gradients(getattr(torch_ops, op), [tail.float()], [grad.float()])]
    assert_parity(ours, plain, truth)


@pytest.mark.parametrize(("H", "Hkv"), [(16, 16), (32, 16)])
def test_a_pool_of_more_than_2_31_elements_does_not_overflow(H, Hkv):
    """The last pages are written and read, at offsets past 2**31."""
    P, D = 16, 128
    pool = 2**31 // (P * Hkv * D) + 64
    needs(12)
    k_pages, v_pages = (torch.full((pool, P, Hkv, D), math.nan, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    length, n = 512, 70
    table = integers([list(range(pool - 1, pool - 33, -1))])
    slots = (table[0, torch.arange(length) // P].long() * P + torch.arange(length, device="cuda") % P).contiguous()
    k, v = torch.randn(length, 2 * Hkv, D, device="cuda").to(torch.bfloat16).split(Hkv, dim=1)
    kv_write(k, v, k_pages, v_pages, slots)
    q, lengths = torch.randn(n, H, D, device="cuda").to(torch.bfloat16), integers([length])
    inputs = [t[None].double() for t in (q, k, v)]
    truth = reference.causal_attention(*inputs)[0]
    plain = torch_ops.causal_attention(q[None], k[None], v[None])[0]
    got = paged_attention(q, k_pages, v_pages, table, lengths, starts=integers([0, n]))
    last = paged_attention(q[-1:], k_pages, v_pages, table, lengths)
    assert_parity([got, last], [plain, plain[-1:]], [truth, truth[-1:]], ["several queries", "one query"])


def test_a_long_context_with_dropout_is_chosen_for_without_the_references_memory():
    needs(48)
    config = dataclasses.replace(PRESETS["gpt2"], block_size=16384, batch_size=1, dropout=0.1)
    first = choose(workloads.training(config, torch.bfloat16), torch.device("cuda"))
    assert first.backends["causal_attention"] == "triton"
