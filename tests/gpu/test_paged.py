"""The kernels over pages on a GPU: `pytest -m gpu`."""

import math

import pytest
import torch

from fastgpt_kernels import reference, torch_ops
from fastgpt_kernels.paged import kv_write, paged_attention
from tests.helpers.paged_cases import assert_agrees, case, decode, integers
from tests.helpers.parity import FLOAT32_LIMIT, SPREADS, assert_parity, relative_errors

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def products_in_full_precision():
    """float32 products are those of float32, not of TF32, here and in stock PyTorch."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


HEADS = [(12, 12, 64), (8, 2, 64), (32, 8, 128), (4, 4, 128), (40, 1, 80), (3, 3, 20), (2, 1, 256), (2, 2, 256)]
heads = pytest.mark.parametrize(("H", "Hkv", "D"), HEADS)
dtypes = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32], ids=lambda dtype: str(dtype)[6:]
)


@dtypes
@heads
@pytest.mark.parametrize("P", [16, 128])
@pytest.mark.parametrize("chunk", [0, 64, 1000])
@pytest.mark.parametrize("spread", SPREADS)
def test_decode_agrees_with_float64_as_nearly_as_stock_pytorch_does(spread, chunk, P, H, Hkv, D, dtype):
    made = case([1, 700, 0, 4099, 128, 129], P, H, Hkv, D, dtype=dtype, room=5, spread=spread)
    assert_agrees(made, decode(chunk) if chunk else paged_attention)


@dtypes
@heads
@pytest.mark.parametrize("P", [8, 128])
@pytest.mark.parametrize("spread", SPREADS)
def test_several_queries_agree_with_float64_as_nearly_as_stock_pytorch_does(spread, P, H, Hkv, D, dtype):
    queries = [1, 700, 0, 4, 128, 65]
    made = case([1, 700, 0, 1500, 128, 129], P, H, Hkv, D, queries=queries, dtype=dtype, room=5, spread=spread)
    assert_agrees(made)


@pytest.mark.parametrize("queries", [None, [5, 0, 700]])
@pytest.mark.parametrize(("H", "Hkv"), [(12, 12), (8, 2)])
def test_twenty_runs_give_the_same_bits(H, Hkv, queries):
    made = case([3000, 0, 1500], 16, H, Hkv, 64, queries=queries, dtype=torch.bfloat16)
    first = paged_attention(*made.inputs(), starts=made.starts)
    for _ in range(20):
        assert torch.equal(paged_attention(*made.inputs(), starts=made.starts), first)


def test_the_path_of_stock_pytorch_that_does_not_wait_agrees():
    for H, Hkv in ((12, 12), (8, 2)):
        made = case([700, 0, 129], 16, H, Hkv, 64, room=3)
        assert max(relative_errors(torch_ops.paged_attention(*made.inputs()), made.truth())) < FLOAT32_LIMIT


def step(q, k, v, k_pages, v_pages, table, lengths, slots, starts):
    kv_write(k, v, k_pages, v_pages, slots)
    return paged_attention(q, k_pages, v_pages, table, lengths, starts=starts)


def states(B, M, P, n):
    """(table, lengths, slots) of four steps: short, long, with empty slots, with other pages. n: tokens a sequence."""
    for number, lengths in enumerate(([n] * B, [M * P] * B, [0, M * P - 3, 0, n + 1], [300, n, 0, 77])):
        generator = torch.Generator().manual_seed(number)
        table = torch.randperm(B * M, generator=generator).view(B, M)
        slots = []
        for b, length in enumerate(lengths):
            positions = range(length - n, length) if length else [-1] * n
            slots += [-1 if p < 0 else int(table[b, p // P]) * P + p % P for p in positions]
            table[b, math.ceil(length / P) :] = 2**30
        yield integers(table.tolist()), integers(lengths), integers(slots, torch.int64)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize(("H", "Hkv"), [(12, 12), (8, 2)])
def test_a_graph_captured_once_serves_other_lengths_tables_and_slots(H, Hkv, n):
    torch.manual_seed(0)
    B, M, P, D = 4, 40, 16, 64
    starts = None if n == 1 else integers([n * b for b in range(B + 1)])
    q, k, v = torch.randn(B * n, H + 2 * Hkv, D, device="cuda").to(torch.bfloat16).split([H, Hkv, Hkv], dim=1)
    pages = [torch.randn(B * M, P, Hkv, D, device="cuda").to(torch.bfloat16) for _ in range(2)]
    placed = [t.clone() for t in next(states(B, M, P, n))]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles
        step(q, k, v, *pages, *placed, starts)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(q, k, v, *pages, *placed, starts)
    for state in states(B, M, P, n):
        for old, new in zip(placed, state, strict=True):
            old.copy_(new)
        q.copy_(torch.randn_like(q))
        k.copy_(torch.randn_like(k))
        right = [t.double() for t in pages]
        reference.kv_write(k.double(), v.double(), *right, state[2])
        graph.replay()
        for t, expected in zip(pages, right, strict=True):
            assert torch.equal(t.double(), expected)
        truth = reference.paged_attention(q.double(), *right, *state[:2], starts=starts)
        plain = torch_ops.paged_attention(q, *pages, *state[:2], starts=starts)
        assert_parity([out], [plain], [truth], ["out"])


def test_nothing_waits_for_the_gpu():
    made = case([300, 0, 40], 16, 4, 2, 64, dtype=torch.bfloat16)
    k, slots, starts = made.q[:, :2], integers([-1, 3, 5], torch.int64), integers([0, 1, 1, 3])
    rest = (made.block_table, integers([300, 0, 40]))

    def every_kernel():
        kv_write(k, k, made.k_pages, made.v_pages, slots)
        paged_attention(made.q, made.k_pages, made.v_pages, *rest)
        paged_attention(made.q, made.k_pages, made.v_pages, *rest, starts=starts)

    every_kernel()  # compiles
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        every_kernel()
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_float32_products_are_in_tf32_where_pytorchs_are():
    for queries in (None, [130, 1]):
        made = case([300, 40], 16, 8, 2, 64, queries=queries)
        assert max(relative_errors(paged_attention(*made.inputs(), starts=made.starts), made.truth())) < FLOAT32_LIMIT
        torch.set_float32_matmul_precision("high")
        errors = relative_errors(paged_attention(*made.inputs(), starts=made.starts), made.truth())
        assert FLOAT32_LIMIT < max(errors) < 2**-9
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("queries", [None, [3, 0, 20]])
def test_compiled_in_one_graph_it_gives_the_same(queries):
    torch._dynamo.reset()
    made = case([300, 0, 40], 16, 4, 2, 64, queries=queries, dtype=torch.bfloat16)
    k = torch.randn(2, 2, 64, device="cuda").to(torch.bfloat16)
    rest = (made.block_table, made.lengths, integers([-1, 2], torch.int64), made.starts)
    results = []
    for run in (step, torch.compile(step, fullgraph=True)):
        pages = [made.k_pages.nan_to_num(0.0), made.v_pages.nan_to_num(0.0)]
        results.append([run(made.q, k, k, *pages, *rest), *pages])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
