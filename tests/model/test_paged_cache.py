"""The paged cache: its copies, its memory, and a step over many sequences against dense attention."""

import math

import pytest
import torch

from fastgpt.config.model import ModelConfig
from fastgpt.model.kv_cache import PagedBatch, PagedCache, Sequences, page_bytes
from fastgpt.model.pages import OutOfPages
from fastgpt.ops.table import resolve

L, H, HKV, D, P, PAGES = 3, 4, 2, 8, 4, 24
CONFIG = ModelConfig(block_size=32, n_layer=L, n_head=H, n_kv_head=HKV, n_embd=H * D)


def random_cache(pages: int = PAGES) -> PagedCache:
    cache = PagedCache(CONFIG, pages, P, dtype=torch.float64)
    for pool in (*cache.keys, *cache.values):
        pool.normal_()
    return cache


def contents(cache: PagedCache) -> torch.Tensor:
    """A copy of all keys and values: (2 L, pages, P, Hkv, D)."""
    return torch.stack([*cache.keys, *cache.values])


def test_copy_on_write_copies_keys_and_values_of_all_layers_and_nothing_else():
    torch.manual_seed(0)
    cache = random_cache(6)
    table = cache.allocator.open()
    cache.reserve(table, P + 2)
    table.length = P + 2
    twin = cache.allocator.fork(table)
    before = contents(cache)
    cache.reserve(twin, P + 3)
    (p0, source), (q0, page) = table.pages, twin.pages
    assert p0 == q0
    assert page != source
    expected = before.clone()
    expected[:, page] = before[:, source]
    assert not torch.equal(expected, before)
    assert torch.equal(contents(cache), expected)


def test_growing_and_ending_move_and_copy_nothing():
    torch.manual_seed(0)
    cache = random_cache(6)
    before, table = contents(cache), cache.allocator.open()
    for length in range(1, 5 * P):
        cache.reserve(table, length)
        table.length = length
    twin = cache.allocator.fork(table)
    cache.allocator.release(table)
    cache.reserve(twin, 5 * P)  # alone again, so not even the last page is copied
    cache.allocator.release(twin)
    assert torch.equal(contents(cache), before)


def test_without_a_free_page_no_copy_is_made():
    torch.manual_seed(0)
    cache = random_cache(2)
    table = cache.allocator.open()
    cache.reserve(table, P + 2)
    table.length = P + 2
    twin, before = cache.allocator.fork(table), contents(cache)
    with pytest.raises(OutOfPages):
        cache.reserve(twin, P + 3)
    assert torch.equal(contents(cache), before)
    assert twin.pages == table.pages


def test_the_context_and_prefix_cache_reach_the_allocator():
    cache = PagedCache(CONFIG, 80, P, prefix_cache=False)
    assert not cache.allocator.prefix_cache
    one, two = cache.allocator.open(), cache.allocator.open()
    for table in (one, two):
        cache.reserve(table, 1)
    assert (one.pages, two.pages) == ([0], [math.ceil(CONFIG.block_size / P)])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("n_layer", "n_kv_head", "page_size", "pages"), [(1, None, 1, 1), (3, 2, 16, 5), (2, 1, 4, 7), (5, 4, 3, 2)]
)
def test_page_bytes_is_a_pages_share_of_the_pool(n_layer, n_kv_head, page_size, pages, dtype):
    config = ModelConfig(n_layer=n_layer, n_head=4, n_kv_head=n_kv_head, n_embd=24)
    cache = PagedCache(config, pages, page_size, dtype=dtype)
    pools = [*cache.keys, *cache.values]
    assert len(cache.keys) == len(cache.values) == n_layer
    assert {(pool.shape, pool.dtype) for pool in pools} == {((pages, page_size, n_kv_head or 4, 6), dtype)}
    assert len({pool.data_ptr() for pool in pools}) == 2 * n_layer
    assert sum(pool.nbytes for pool in pools) == pages * page_bytes(config, page_size, dtype)


def dense_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """One query and all keys that it sees, head by head: q (H, D), k and v (T, Hkv, D) -> (H, D)."""
    outs = []
    for h in range(H):
        keys, values = k[:, h // (H // HKV)], v[:, h // (H // HKV)]
        outs.append((keys @ q[h] / math.sqrt(D)).softmax(0) @ values)
    return torch.stack(outs)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("layer", [0, L - 1])
@pytest.mark.parametrize(
    ("decoding", "reading"),
    [
        ([9], [(6, 6)]),
        ([1, P, 13], [(7, 3), (P, P), (11, 1)]),  # (tokens in all, of them new)
        ([5, 5, 2, 8], []),
        ([], [(10, 10), (9, 4)]),
    ],
    ids=["one of each", "many", "only decoding", "only reading"],
)
def test_a_step_agrees_with_dense_attention_and_writes_only_its_slots(decoding, reading, layer, backend):
    torch.manual_seed(0)
    cache, ops = random_cache(), resolve(backend)
    sequences = [(length, 1) for length in decoding] + reading
    free = torch.randperm(PAGES).tolist()  # no row, no order
    tables = [[free.pop() for _ in range(math.ceil(length / P))] for length, _ in sequences]
    block_table = torch.tensor([table + [0] * (8 - len(table)) for table in tables], dtype=torch.int32)
    lengths = torch.tensor([length for length, _ in sequences], dtype=torch.int32)
    starts = torch.tensor([0, *(new for _, new in reading)]).cumsum(0).to(torch.int32)
    first = Sequences(block_table[: len(decoding)], lengths[: len(decoding)]) if decoding else None
    others = Sequences(block_table[len(decoding) :], lengths[len(decoding) :], starts) if reading else None
    at = [t for length, new in sequences for t in range(length - new, length)]
    whose = [b for b, (_, new) in enumerate(sequences) for _ in range(new)]
    slots = [tables[b][t // P] * P + t % P for b, t in zip(whose, at, strict=True)]
    N = len(at)
    step = PagedBatch(cache.keys, cache.values, torch.tensor(at), torch.tensor(slots), first, others)
    q, k, v = (torch.randn(1, N, heads, D, dtype=torch.float64) for heads in (H, HKV, HKV))
    expected = contents(cache)
    expected[layer].flatten(0, 1)[slots] = k[0]
    expected[L + layer].flatten(0, 1)[slots] = v[0]

    out = step.attend(ops, layer, q, k, v)

    assert torch.equal(contents(cache), expected)
    assert step.positions(N).tolist() == at
    keys, values = expected[layer].flatten(0, 1), expected[L + layer].flatten(0, 1)
    seen = [[tables[b][j // P] * P + j % P for j in range(t + 1)] for b, t in zip(whose, at, strict=True)]
    dense = torch.stack([dense_attention(q[0, i], keys[own], values[own]) for i, own in enumerate(seen)])
    torch.testing.assert_close(out, dense[None], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_padding_is_not_written_and_gives_zeros(backend):
    torch.manual_seed(0)
    cache, ops = random_cache(), resolve(backend)
    decode = Sequences(torch.tensor([[3, 5], [0, 0]], dtype=torch.int32), torch.tensor([P + 1, 0], dtype=torch.int32))
    read = Sequences(
        torch.tensor([[7, 2], [0, 0]], dtype=torch.int32),
        torch.tensor([2, 0], dtype=torch.int32),
        torch.tensor([0, 2, 2], dtype=torch.int32),
    )
    slots = [5 * P, -1, 7 * P, 7 * P + 1]
    step = PagedBatch(cache.keys, cache.values, torch.tensor([P, 0, 0, 1]), torch.tensor(slots), decode, read)
    q, k, v = (torch.randn(1, 4, heads, D, dtype=torch.float64) for heads in (H, HKV, HKV))
    expected = contents(cache)
    for i in (0, 2, 3):
        expected[1].flatten(0, 1)[slots[i]] = k[0, i]
        expected[L + 1].flatten(0, 1)[slots[i]] = v[0, i]
    out = step.attend(ops, 1, q, k, v)
    assert torch.equal(contents(cache), expected)
    assert not out[0, 1].any()
    own = [*range(3 * P, 4 * P), 5 * P]
    dense = dense_attention(q[0, 0], *(expected[i].flatten(0, 1)[own] for i in (1, L + 1)))
    torch.testing.assert_close(out[0, 0], dense, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out[0, 2], v[0, 2].repeat_interleave(H // HKV, 0), rtol=1e-12, atol=1e-12)


def test_a_copied_page_reads_the_same_and_then_goes_its_own_way():
    """Two continuations of one prompt: equal until each writes its own next token."""
    torch.manual_seed(0)
    cache, ops, T = random_cache(), resolve("reference"), P + 2
    table = cache.allocator.open()
    cache.reserve(table, T)
    table.length = T
    twin = cache.allocator.fork(table)
    prompt = [table.pages[t // P] * P + t % P for t in range(T)]
    old_k, old_v = (pool[0].flatten(0, 1)[prompt] for pool in (cache.keys, cache.values))
    for each in (table, twin):
        cache.reserve(each, T + 1)
        each.length = T + 1
    tables = torch.tensor([table.pages, twin.pages], dtype=torch.int32)
    slots = tables[:, 1].long() * P + T % P
    part = Sequences(tables, torch.tensor([T + 1, T + 1], dtype=torch.int32))
    step = PagedBatch(cache.keys, cache.values, torch.tensor([T, T]), slots, part, None)
    q, k, v = (torch.randn(1, 2, heads, D, dtype=torch.float64) for heads in (H, HKV, HKV))
    out = step.attend(ops, 0, q, k, v)
    for i in range(2):
        dense = dense_attention(q[0, i], torch.cat([old_k, k[0, i, None]]), torch.cat([old_v, v[0, i, None]]))
        torch.testing.assert_close(out[0, i], dense, rtol=1e-12, atol=1e-12)
