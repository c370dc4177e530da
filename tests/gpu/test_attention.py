"""The attention kernels on a GPU: `pytest -m gpu`."""

import pytest
import torch

from fastgpt_kernels import reference
from fastgpt_kernels.attention import causal_attention
from fastgpt_kernels.dropout import dropout_mask
from tests.helpers.parity import FLOAT32_LIMIT, SPREADS, assert_op_agrees, flash, outputs_and_gradients, relative_errors

pytestmark = pytest.mark.gpu


def packed(B, Tq, Tk, H, Hkv, D, dtype=torch.bfloat16, spread=1):
    """q, k and v as views of one packed projection (B, Tk, (H + 2 Hkv) D); the last Tq queries."""
    qkv = torch.randn(B, Tk, H + 2 * Hkv, D, device="cuda").to(dtype)
    qkv[:, :, : H + Hkv] *= spread**0.5
    return [qkv[:, Tk - Tq :, :H], *qkv[:, :, H:].split(Hkv, dim=2)]


def seeded(number, p=0.2):
    return {"dropout_p": p, "seed": torch.tensor(number, device="cuda")}


@pytest.fixture(autouse=True)
def products_in_full_precision():
    """float32 products are those of float32, not of TF32, here and in stock PyTorch."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


SHAPES = [
    # (B, Tq, Tk, H, Hkv, D)
    (2, 1, 513, 12, 12, 64),
    (2, 300, 300, 4, 4, 64),
    (1, 1024, 1024, 6, 2, 64),
    (2, 129, 257, 4, 1, 128),
    (1, 127, 127, 2, 2, 20),
    (2, 65, 65, 2, 1, 16),
    (1, 200, 333, 2, 2, 80),
    (1, 130, 260, 2, 1, 256),
]
shapes = pytest.mark.parametrize("shape", SHAPES)
dtypes = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32], ids=lambda dtype: str(dtype)[6:]
)


@dtypes
@shapes
@pytest.mark.parametrize("options", [(), ("documents",), ("dropout",), ("dropout", "documents")], ids="+".join)
def test_agrees_with_float64_as_nearly_as_stock_pytorch_does(options, shape, dtype):
    torch.manual_seed(0)
    arguments = seeded(2**40 + 5) if "dropout" in options else {}
    if "documents" in options:
        arguments["doc_ids"] = torch.randint(2, (shape[0], shape[2]), device="cuda")
    assert_op_agrees(causal_attention, "causal_attention", packed(*shape, dtype), layout="gapped", **arguments)


@dtypes
@shapes
@pytest.mark.parametrize("spread", SPREADS[1:])
def test_wide_scores_agree_too(spread, shape, dtype):
    torch.manual_seed(0)
    assert_op_agrees(
        causal_attention,
        "causal_attention",
        packed(*shape, dtype, spread),
        layout="gapped",
        other=flash,
        spread=spread,
    )


@shapes
@pytest.mark.parametrize("options", [{}, {"dropout_p": 0.2}])
def test_twenty_runs_give_the_same_bits(options, shape):
    torch.manual_seed(0)
    inputs, arguments = packed(*shape), seeded(3) if options else {}
    grad = torch.randn_like(inputs[0], memory_format=torch.contiguous_format)
    first = outputs_and_gradients(causal_attention, inputs, [grad], **arguments)
    for _ in range(20):
        again = outputs_and_gradients(causal_attention, inputs, [grad], **arguments)
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize(("B", "H", "Tq", "Tk"), [(2, 3, 64, 64), (1, 2, 3, 64)])
def test_every_kernel_keeps_what_the_mask_says(B, H, Tq, Tk, dtype, D):
    """Unit vectors as queries, keys and output gradients, and a delta of zero: a weight decides one number of each."""
    seed = torch.tensor(-(2**40) - 3, device="cuda")
    expected = dropout_mask(seed, B, H, Tq, Tk, 0.25) & reference.visible(Tq, Tk, None, seed.device)
    q, k = (torch.eye(T, D, device="cuda", dtype=dtype)[None, :, None].repeat(B, 1, H, 1) for T in (Tq, Tk))
    out = causal_attention(torch.zeros_like(q), k, k, dropout_p=0.25, seed=seed)
    lse = torch.zeros(B, H, Tq, device="cuda")
    rest = (q, k, torch.ones_like(k), seed, None, 0.25, 0.5)
    dq, dk, dv = torch.ops.fastgpt.attention_backward(q, torch.zeros_like(q), lse, *rest)
    assert torch.equal(out.transpose(1, 2)[..., :Tk] != 0, expected)
    assert torch.equal(dq.transpose(1, 2)[..., :Tk] != 0, expected)
    assert torch.equal(dk.transpose(1, 2)[..., :Tq].mT != 0, expected)
    assert torch.equal(dv.transpose(1, 2)[..., :Tq].mT != 0, expected)


def test_memory_is_linear_in_time():
    def peak(T):
        inputs, grad = packed(1, T, T, 2, 2, 64), torch.randn(1, T, 2, 64, device="cuda").to(torch.bfloat16)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        outputs_and_gradients(causal_attention, inputs, [grad], **seeded(3))
        return torch.cuda.max_memory_allocated() - before

    peak(256)  # compiles
    row = 2 * 64 * 2  # bytes of a token in each tensor like q
    for T in (4096, 8192, 16384):
        assert peak(T) <= T * (4 * row + 2 * 2 * 4) + 8192  # out, three gradients, lse and delta; rounding up


def test_float32_products_are_in_tf32_where_pytorchs_are():
    torch.manual_seed(0)
    inputs = packed(1, 130, 130, 2, 1, 64, torch.float32)
    truth = reference.causal_attention(*(t.double() for t in inputs))
    assert max(relative_errors(causal_attention(*inputs), truth)) < FLOAT32_LIMIT
    torch.set_float32_matmul_precision("high")
    assert FLOAT32_LIMIT < max(relative_errors(causal_attention(*inputs), truth)) < 2**-9


@pytest.mark.parametrize("dropping", [False, True])
def test_compiled_in_one_graph_it_gives_the_same(dropping):
    torch.manual_seed(0)
    torch._dynamo.reset()
    compiled = torch.compile(causal_attention, fullgraph=True)
    inputs, arguments = packed(2, 130, 130, 4, 2, 64), seeded(3) if dropping else {}
    grad = torch.randn_like(inputs[0], memory_format=torch.contiguous_format)
    eager = outputs_and_gradients(causal_attention, inputs, [grad], **arguments)
    got = outputs_and_gradients(compiled, inputs, [grad], **arguments)
    assert all(torch.equal(a, b) for a, b in zip(got, eager, strict=True))
