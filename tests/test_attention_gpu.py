"""What only a GPU can show of the attention kernels: `pytest -m gpu`."""

import pytest
import torch

from fastgpt_kernels import reference, stock
from fastgpt_kernels.attention import causal_attention
from fastgpt_kernels.dropout import dropout_mask
from tests.parity import FLOAT32_LIMIT, assert_op_agrees, assert_parity, outputs_and_gradients, relative_errors

pytestmark = pytest.mark.gpu


def packed(B, Tq, Tk, H, Hkv, D, dtype=torch.bfloat16):
    """q, k and v as views of one packed projection (B, Tk, (H + 2 Hkv) D); the last Tq queries."""
    qkv = torch.randn(B, Tk, H + 2 * Hkv, D, device="cuda").to(dtype)
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


@pytest.mark.parametrize("shape", [(129, 8192, 16, 128), (1, 131_200, 64, 256)], ids=["batch", "context"])
def test_more_than_2_31_elements_do_not_overflow(shape):
    """q, k, v, the output and each gradient have B * T * H * D > 2**31 elements; many sequences, or one long one.

    The last batch entry's last head is compared. The output gradient is zero but in the last rows there, so that the
    reference needs those queries alone.
    """
    B, T, H, D = shape
    n = 64
    assert B * T * H * D > 2**31
    if torch.cuda.mem_get_info()[0] < 48 * 2**30:
        pytest.skip("needs 48 GiB of free GPU memory")
    torch.manual_seed(0)
    inputs = [torch.randn(B, T, H, D, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    grad = torch.zeros(B, T, H, D, device="cuda", dtype=torch.bfloat16)
    grad[-1, -n:, -1] = torch.randn(n, D, device="cuda")
    out, dq, dk, dv = outputs_and_gradients(causal_attention, inputs, [grad])
    for t in (dq, dk, dv):  # where no gradient flows
        assert not t[0, :, 0].any()
        assert not t[-1, :, 0].any()
    q, k, v = (t[-1:, :, -1:] for t in inputs)
    head, upstream = [q[:, -n:], k, v], grad[-1:, -n:, -1:]
    plain = outputs_and_gradients(stock.causal_attention, head, [upstream])
    truth = outputs_and_gradients(reference.causal_attention, [t.double() for t in head], [upstream.double()])
    ours = [t[-1:, :, -1:] for t in (out, dq, dk, dv)]
    assert_parity([ours[0][:, -n:], ours[1][:, -n:], *ours[2:]], plain, truth, ["out", "dq", "dk", "dv"])


@pytest.mark.parametrize("strides", [(2**31 + 64, 32, 16, 1), (64, 2**26, 16, 1), (2048, 32, 2**31 + 64, 1)])
def test_strides_beyond_2_31_elements_do_not_overflow(strides):
    """Of the batch, of positions within a tile, and of heads."""
    torch.manual_seed(0)
    memory = torch.empty(2**32, device="cuda", dtype=torch.bfloat16)
    far = memory.as_strided((2, 64, 2, 16), strides)
    near = torch.randn(3, 2, 64, 2, 16, device="cuda", dtype=torch.bfloat16)
    far.copy_(near[0])
    for order in ([0, 1, 2], [1, 0, 2], [1, 2, 0]):
        inputs = [near[i] for i in order]
        expected = outputs_and_gradients(causal_attention, inputs, [near[2]])
        got = outputs_and_gradients(causal_attention, [far if i == 0 else near[i] for i in order], [near[2]])
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


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
