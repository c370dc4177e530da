"""Attention over pages and the writing of them: every backend against dense attention in float64, guarded and poisoned.

What nothing was written to is NaN, and table entries past the length are a number that no pool has.
"""

import math

import pytest
import torch
from hypothesis import strategies as st

from fastgpt_kernels import launch, paged, paged_decode, paged_prefill, reference, torch_ops
from fastgpt_kernels.paged import kv_write, paged_attention
from tests.helpers.covering import some
from tests.helpers.paged_cases import Case, assert_agrees, case, decode, integers
from tests.helpers.parity import DEVICE, SPREADS, Guards, assert_parity, poisoned, zeros
from tests.helpers.random_cases import random_cases

DTYPES = [torch.float32, torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float16"])


def tiled(monkeypatch, **tiles):
    """From here on these kernels work on these tiles (rows, columns)."""
    row = launch._row

    def patched(kernel, *rest):
        return launch.Config(*tiles[kernel], 4, 2) if kernel in tiles else row(kernel, *rest)

    monkeypatch.setattr(launch, "_row", patched)


HEADS = [(1, 1), (3, 3), (2, 1), (6, 2), (5, 1)]


@random_cases(
    2,
    40,
    lengths=st.lists(st.one_of(st.integers(1, 40), st.integers(1, 300), st.just(0)), min_size=1, max_size=4),
    P=st.sampled_from([1, 5, 8, 16, 32, 64]),
    heads=st.sampled_from(HEADS),
    D=st.sampled_from([1, 8, 16, 20, 33, 64]),
    chunk=st.sampled_from([0, 1, 64, 96]),
    room=st.integers(0, 20),
    scale=st.sampled_from([None, None, 0.3, -0.3]),
    spread=st.sampled_from(SPREADS),
    seed=st.integers(0, 99),
)
@dtypes
def test_decode_agrees_at_any_shape(dtype, lengths, P, heads, D, chunk, room, scale, spread, seed):
    chosen = decode(chunk) if chunk and (scale is None or scale > 0) else paged_attention
    made = case(lengths, P, *heads, D, dtype=dtype, room=room, seed=seed, spread=spread)
    assert_agrees(made, chosen, **({} if scale is None else {"scale": scale}))


@random_cases(
    3,
    40,
    sequences=st.lists(
        st.one_of(
            st.tuples(st.integers(1, 40), st.integers(0, 40)),
            st.tuples(st.integers(1, 300), st.integers(0, 6)),
            st.tuples(st.just(0), st.integers(0, 3)),
        ),
        min_size=1,
        max_size=4,
    ),
    P=st.sampled_from([1, 5, 8, 16, 32]),
    heads=st.sampled_from(HEADS),
    D=st.sampled_from([1, 8, 20, 33, 64]),
    scale=st.sampled_from([None, None, 0.3, -0.3]),
    spread=st.sampled_from(SPREADS),
    seed=st.integers(0, 99),
)
@dtypes
def test_several_queries_agree_at_any_shape(dtype, sequences, P, heads, D, scale, spread, seed):
    lengths = [length for length, _ in sequences]
    queries = [min(n, length) if length else n for length, n in sequences]
    made = case(lengths, P, *heads, D, queries=queries, dtype=dtype, seed=seed, spread=spread)
    if len(made.q):
        assert_agrees(made, **({} if scale is None else {"scale": scale}))


@dtypes
@pytest.mark.parametrize(("H", "Hkv"), [(2, 2), (4, 2)])
@pytest.mark.parametrize("splits", some(3, [1, 4, 5, 2, 6, 7, 8, 3]))
@pytest.mark.covering_array(1)
def test_decode_agrees_at_every_number_of_splits(splits, H, Hkv, dtype, launches):
    chunk, P = 64, (8, 16, 32)[splits % 3]
    longest = chunk * (splits - 1) + 7
    made = case([longest, 1, 0, chunk, chunk * splits], P, H, Hkv, 20, dtype=dtype)
    assert_agrees(made, decode(chunk))
    assert [done.name for done in launches][1:] == ([] if splits == 1 else ["paged_merge"])


@pytest.mark.parametrize("tile", [(16, 16), (32, 32), (64, 64)])
@pytest.mark.parametrize("pages_in_a_tile", [2, 1, 0.5])
@pytest.mark.parametrize(("H", "Hkv"), [(2, 2), (17, 1)])
@pytest.mark.covering_array(1)
def test_decode_agrees_in_every_tile_and_where_tiles_lie_in_a_page(tile, pages_in_a_tile, H, Hkv, monkeypatch):
    """A group of 17 heads is one more than share a program."""
    rows, columns = tile
    tiled(monkeypatch, paged_decode=(1, columns), paged_decode_grouped=(16, columns), paged_merge=(rows // 8, 32))
    assert_agrees(case([150, 64, 0, 129], int(columns / pages_in_a_tile), H, Hkv, 20, room=3), decode(64))


@pytest.mark.parametrize("tile", [(16, 16), (64, 32), (16, 64), (128, 64)])
@pytest.mark.parametrize("P", [16, 128])
@pytest.mark.parametrize(("H", "Hkv"), [(2, 2), (6, 1)])
@pytest.mark.covering_array(1)
def test_several_queries_agree_in_every_tile(tile, P, H, Hkv, monkeypatch):
    tiled(monkeypatch, paged_prefill=tile)
    assert_agrees(case([150, 64, 0, 3, 129], P, H, Hkv, 20, queries=[70, 30, 2, 0, 1], room=1))


@pytest.mark.parametrize("queries", [[1, 1, 1], [1, 33, 17], [0, 65, 0]])
def test_every_tile_of_queries_finds_a_program(queries):
    """Each sequence's last tile has one query: so many tiles that the grid has no program to spare."""
    assert launch.tuning(torch.device("cpu"), torch.float32).row("paged_prefill", 16).rows == 16
    assert_agrees(case([65, 65, 65], queries=queries))


@pytest.mark.parametrize("programs", [1, 8, 40])
@pytest.mark.parametrize(("H", "Hkv"), [(2, 2), (4, 1)])
@pytest.mark.parametrize(
    "lengths", [[1] * 9, [33] * 5, [65, 1, 1, 0, 97], [0, 0, 300], [0] * 3, [129, 257, 128]], ids=str
)
@pytest.mark.covering_array(1)
def test_every_split_finds_a_program_whatever_the_lengths(lengths, programs, H, Hkv, monkeypatch, launches):
    """Where the device chooses their length. Most sequences are a token past a chunk's end."""
    monkeypatch.setattr(launch, "DECODE_PROGRAMS", dict.fromkeys(launch.TARGETS, programs))
    monkeypatch.setattr(paged_decode, "LEAST_CHUNK", 32)
    assert_agrees(case(lengths, 16, H, Hkv, 8))
    first, *rest = launches
    bound = len(lengths) * math.ceil(math.ceil(max(1, *lengths) / 16) * 16 / 32)
    assert first.grid[0] <= min(bound * Hkv, programs + len(lengths) * Hkv)
    assert len(rest) == (max(lengths) > 32)


def test_a_table_without_room_for_two_splits_needs_one_launch(launches):
    least = paged_decode.LEAST_CHUNK
    for M, names in ((least // 16, ["paged_decode"]), (least // 16 + 1, ["paged_decode", "paged_merge"])):
        launches.clear()
        made = case([5, 0], room=M - 1)
        assert_agrees(made)
        assert [done.name for done in launches] == names


def test_the_grid_depends_on_shapes_alone(launches):
    grids = set()
    for lengths in ([140, 1, 0], [1, 139, 140], [0, 0, 140]):
        launches.clear()
        assert_agrees(case(lengths))
        grids.add(tuple(done.grid for done in launches))
    assert len(grids) == 1


@pytest.mark.parametrize("backend", [reference, torch_ops], ids=["reference", "torch"])
@pytest.mark.parametrize("P", [8, 16, 32])
@pytest.mark.parametrize(("H", "Hkv", "D"), [(2, 2, 16), (4, 2, 33)])
@pytest.mark.parametrize("queries", [None, [7, 300, 0, 2, 1]])
def test_the_twins_agree_with_dense_attention(backend, P, H, Hkv, D, queries):
    made = case([7, 300, 129, 0, 64], P, H, Hkv, D, queries=queries, room=2)
    exact = [t.double() if t.is_floating_point() else t for t in made.inputs()]
    for scale in (None, 0.3, -0.3):
        got = backend.paged_attention(*exact, starts=made.starts, scale=scale)
        torch.testing.assert_close(got, made.truth(scale))


@dtypes
@pytest.mark.parametrize(("H", "Hkv"), [(2, 2), (4, 2)])
def test_stock_decode_that_does_not_wait_agrees(H, Hkv, dtype):
    """Its path on a GPU, which runs on a CPU too."""
    made = case([7, 300, 129, 0, 64], 16, H, Hkv, 20, dtype=dtype, room=2)
    plain = torch_ops.paged_attention(*made.inputs(), scale=0.3)
    assert_parity([torch_ops._decode_without_waiting(*made.inputs(), 0.3)], [plain], [made.truth(0.3)])


@pytest.mark.parametrize("queries", [None, [2, 0, 40]])
@pytest.mark.parametrize(("H", "Hkv"), [(2, 2), (4, 2)])
@pytest.mark.parametrize("score", [1e4, -1e4])
@pytest.mark.covering_array(1)
def test_equal_scores_give_the_mean_of_the_values(score, H, Hkv, queries):
    """Past the last key lie zeros to the kernel, whose score of 0 would exceed one of -1e4 by far."""
    made = case([70, 0, 161], 16, H, Hkv, queries=queries)
    made.q.fill_(25.0)
    for k in (made.k_pages, *made.keys):
        k.masked_fill_(~k.isnan(), score / 400)
    assert_agrees(made, paged_attention if queries else decode(64), scale=1.0)


@dtypes
@pytest.mark.parametrize("queries", [None, [2, 0, 40]])
@pytest.mark.covering_array(1)
def test_a_scale_of_zero_gives_the_mean_of_the_values(queries, dtype):
    made = case([70, 0, 161], H=4, queries=queries, dtype=dtype)
    got = paged_attention(*made.inputs(), starts=made.starts, scale=0.0)
    torch.testing.assert_close(got, made.truth(0.0).to(dtype))


@pytest.mark.parametrize("queries", some(1, [None, [1, 0, 30]]))
def test_views_of_any_strides_are_read(queries):
    made = case([70, 0, 33], H=4, D=20, queries=queries)
    expected = paged_attention(*made.inputs(), starts=made.starts)
    q, *pages, table, lengths = made.inputs()
    wide = torch.full((*q.shape, 2), math.nan, device=DEVICE)
    wide[..., 0] = q
    swapped = q.transpose(0, 1).contiguous().transpose(0, 1)
    wide_table = torch.stack([table, table + 1], dim=2)
    longer = torch.stack([lengths, lengths + 9], dim=1)[:, 0]
    starts = None if queries is None else torch.stack([made.starts, made.starts + 1], dim=1)[:, 0]
    for view in (wide[..., 0], swapped):
        for tables in (wide_table[..., 0], table.t().contiguous().t()):
            assert torch.equal(paged_attention(view, *pages, tables, longer, starts=starts), expected)


def test_the_same_bits_in_every_run():
    for queries in (None, [3, 0, 20]):
        made = case([130, 0, 61], H=4, D=20, queries=queries)
        first = paged_attention(*made.inputs(), starts=made.starts)
        assert torch.equal(paged_attention(*made.inputs(), starts=made.starts), first)


def test_without_queries_the_output_is_empty(launches):
    made = case([3, 0], queries=[0, 0])
    assert paged_attention(*made.inputs(), starts=made.starts).shape == (0, 2, 16)
    table, lengths = integers([]).view(0, 4), integers([])
    assert paged_attention(made.q, made.k_pages, made.v_pages, table, lengths).shape == (0, 2, 16)
    assert not launches


@pytest.mark.parametrize("attention", [paged_attention, decode(64)])
def test_a_table_without_pages_has_room_for_empty_slots(attention):
    made = case([0, 0])
    assert_agrees(made._replace(block_table=made.block_table[:, :0]), attention)


def written(N, Hkv, D, P, dtype, *, layout="packed", pool=6):
    """k and v (N, Hkv, D), pages full of NaN, and slots of which each third is padding."""
    torch.manual_seed(0)
    qkv = torch.randn(N, 4 * Hkv, D, device=DEVICE).to(dtype)
    k, v = qkv[:, 2 * Hkv :].split(Hkv, dim=1)
    if layout == "gapped":
        k, v = (torch.stack([t, t], dim=-1)[..., 0] for t in (k, v))
    elif layout == "swapped":
        k, v = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in (k, v))
    pages = [torch.full((pool, P, Hkv, D), math.nan, device=DEVICE, dtype=dtype) for _ in range(2)]
    slots = torch.randperm(pool * P)[:N].to(DEVICE)
    slots[::3] = -1
    return k, v, *pages, slots


class OnGpu(torch.Tensor):
    """A tensor that stock takes for one of a GPU, wherever it is."""

    class Device(str):
        type = "cuda"

    device = Device(DEVICE)  # type: ignore[assignment]


@dtypes
@pytest.mark.parametrize("layout", ["packed", "gapped", "swapped"])
@pytest.mark.parametrize(("N", "Hkv", "D", "P"), [(1, 1, 1, 1), (2, 3, 20, 8), (90, 3, 33, 16), (31, 2, 64, 32)])
def test_keys_and_values_are_written_to_their_slots_alone(N, Hkv, D, P, layout, dtype):
    k, v, k_pages, v_pages, slots = written(N, Hkv, D, P, dtype, layout=layout)
    expected = [t.clone() for t in (k_pages, v_pages)]
    for token, slot in enumerate(slots.tolist()):
        if slot != -1:
            for pages, t in zip(expected, (k, v), strict=True):
                pages[slot // P, slot % P] = t[token]
    guards = Guards()
    inputs = [guards.input(t, name) for t, name in ((k, "k"), (v, "v"), (slots, "slots"))]
    ours = [guards.output(t, "pages") for t in (k_pages, v_pages)]
    with poisoned(guards):
        assert kv_write(*inputs[:2], *ours, inputs[2]) is None
    plain, waiting, math_ = ([t.clone() for t in (k_pages, v_pages)] for _ in range(3))
    torch_ops.kv_write(k, v, *plain, slots)
    torch_ops.kv_write(k, v, *waiting, slots.as_subclass(OnGpu))
    reference.kv_write(k, v, *math_, slots)
    for got in (ours, plain, waiting, math_):
        for pages, right in zip(got, expected, strict=True):
            assert torch.equal(pages.nan_to_num(9.0), right.nan_to_num(9.0))


def test_padding_alone_and_no_token_write_nothing(launches):
    k, v, k_pages, v_pages, slots = written(7, 2, 16, 8, torch.float32)
    kv_write(k, v, k_pages, v_pages, torch.full_like(slots, -1))
    kv_write(k[:0], v[:0], k_pages, v_pages, slots[:0])
    assert k_pages.isnan().all()
    assert v_pages.isnan().all()
    assert len(launches) == 1


def test_slots_past_the_last_token_are_not_read():
    k, v, k_pages, v_pages, slots = written(40, 1, 16, 8, torch.float32)
    slots.copy_(torch.arange(40))
    kv_write(k[:5], v[:5], k_pages, v_pages, slots[:5])
    for pages, t in ((k_pages, k), (v_pages, v)):
        assert torch.equal(pages.flatten(0, 1)[:5], t[:5])
        assert pages.flatten(0, 1)[5:].isnan().all()


def test_a_strided_projection_is_read_where_it_is(launches):
    made = case([40, 3])
    paged_attention(*made.inputs())
    paged_attention(*made.inputs(), starts=integers([0, 1, 2]))
    k, v, *pages, slots = written(7, 2, 16, 8, torch.float32)
    kv_write(k, v, *pages, slots)
    for done, t in zip(launches, (made.q, made.q, k), strict=True):
        assert any(arg is t for arg in done.args)


def finite(made: Case) -> Case:
    return made._replace(k_pages=made.k_pages.nan_to_num(0.0), v_pages=made.v_pages.nan_to_num(0.0))


@dtypes
@pytest.mark.parametrize(("H", "Hkv", "lengths"), some(1, [(4, 2, [3, 1]), (2, 2, [200, 0]), (4, 2, [70, 0])]))
@pytest.mark.covering_array(1)
def test_operators_pass_opcheck(H, Hkv, lengths, dtype):
    q, k_pages, v_pages, table, sizes = finite(case(lengths, H=H, Hkv=Hkv, dtype=dtype)).inputs()
    ops = torch.ops.fastgpt
    torch.library.opcheck(ops.paged_decode.default, (q, k_pages, v_pages, table, sizes, 0.3, 0))
    starts = integers([0, 1, 2])
    torch.library.opcheck(ops.paged_prefill.default, (q, k_pages, v_pages, table, sizes, starts, 0.3))
    k, slots = q[:, :Hkv], integers([3, -1], torch.int64)
    torch.library.opcheck(ops.kv_write.default, (k, k.clone(), k_pages, v_pages, slots))


@pytest.mark.parametrize("backend", [paged, torch_ops], ids=["triton", "torch"])
@pytest.mark.parametrize("queries", [None, [3, 2]])
@pytest.mark.covering_array(1)
def test_compiled_in_one_graph_it_gives_the_same(queries, backend):
    torch._dynamo.reset()
    made = finite(case([200, 5], H=4, queries=queries))
    k, v, *_ = written(2, 2, 16, 16, torch.float32)
    slots = integers([2, -1], torch.int64)

    def step(q, k_pages, v_pages, table, lengths):
        backend.kv_write(k, v, k_pages, v_pages, slots)
        return backend.paged_attention(q, k_pages, v_pages, table, lengths, starts=made.starts)

    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        q, k_pages, v_pages, *rest = made.inputs()
        pages = [k_pages.clone(), v_pages.clone()]
        results.append([run(q, *pages, *rest), *pages])
    assert torch.equal(results[0][1][0, 2], k[0])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


INT, LONG = torch.int32, torch.int64
HALF = torch.float16
RIGHT = {
    "q": zeros(2, 4, 16),
    "k_pages": zeros(3, 8, 2, 16),
    "v_pages": zeros(3, 8, 2, 16),
    "block_table": zeros(2, 3, dtype=INT),
    "lengths": zeros(2, dtype=INT),
}
STARTS = integers([0, 1, 2])


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"q": zeros(2, 64)}, "q has shape (2, 64); expected 3 dimensions"),
        ({"k_pages": zeros(3, 8, 32)}, "k_pages has shape (3, 8, 32); expected 4 dimensions"),
        ({"v_pages": zeros(3, 8, 32)}, "v_pages has shape (3, 8, 32); expected 4 dimensions"),
        ({"q": zeros(2, 4, 16, dtype=INT)}, "q (2, 4, 16) is torch.int32; expected float32, float16 or bfloat16"),
        ({"q": zeros(2, 4, 16, device="meta")}, "k_pages (3, 8, 2, 16) is on cpu; expected meta, as q"),
        ({"k_pages": zeros(3, 8, 2, 16, dtype=HALF)}, "k_pages (3, 8, 2, 16) is torch.float16; expected torch.float32"),
        ({"v_pages": zeros(3, 8, 2, 16, dtype=HALF)}, "v_pages (3, 8, 2, 16) is torch.float16; expected torch.float32"),
        ({"q": zeros(2, 4, 0)}, "q has shape (2, 4, 0); expected a head size of 1 to 256"),
        ({"q": zeros(2, 4, 257)}, "q has shape (2, 4, 257); expected a head size of 1 to 256"),
        ({"k_pages": zeros(3, 8, 2, 8)}, "k_pages has shape (3, 8, 2, 8); expected (pages, P, Hkv, 16), as q"),
        ({"k_pages": zeros(3, 0, 2, 16)}, "k_pages has shape (3, 0, 2, 16); expected (pages, P, Hkv, 16)"),
        ({"v_pages": zeros(3, 8, 1, 16)}, "v_pages has shape (3, 8, 1, 16); expected (3, 8, 2, 16), as k_pages"),
        ({"k_pages": zeros(8, 3, 2, 16).transpose(0, 1)}, "k_pages (3, 8, 2, 16) has strides"),
        ({"v_pages": zeros(8, 3, 2, 16).transpose(0, 1)}, "v_pages (3, 8, 2, 16) has strides"),
        ({"q": zeros(2, 3, 16)}, "q has 3 heads (2, 3, 16); expected a multiple of k_pages' 2"),
        ({"block_table": zeros(6, dtype=INT)}, "block_table has shape (6,); expected (B, M)"),
        ({"block_table": zeros(2, 3, dtype=LONG)}, "block_table (2, 3) is torch.int64; expected torch.int32"),
        ({"lengths": zeros(2, dtype=LONG)}, "lengths (2,) is torch.int64; expected torch.int32"),
        ({"lengths": zeros(3, dtype=INT)}, "lengths has shape (3,) on cpu; expected (2,) on cpu"),
        ({"lengths": zeros(2, dtype=INT, device="meta")}, "lengths has shape (2,) on meta; expected (2,) on cpu"),
        ({"starts": STARTS.long()}, "starts (3,) is torch.int64; expected torch.int32"),
        ({"starts": STARTS[:2]}, "starts has shape (2,) on cpu; expected (3,) on cpu"),
        ({"q": zeros(5, 4, 16)}, "q has shape (5, 4, 16); expected (2, H, D), a query for each row of block_table"),
        ({"lengths": integers([0, 25])}, "lengths (2,) holds 25; expected 0 to 24, the slots of block_table (2, 3)"),
        ({"lengths": integers([-1, 4])}, "lengths (2,) holds -1; expected 0 to 24"),
        (
            {"lengths": integers([0, 9]), "block_table": integers([[9, 9, 9], [2, 3, 9]])},
            "block_table (2, 3) holds 3; expected 0 to 2, the pages of k_pages (3, 8, 2, 16)",
        ),
        ({"starts": integers([0, 1, 3])}, "starts (3,) is [0, 1, 3]; expected it to rise from 0 to 2"),
        ({"starts": integers([1, 1, 2])}, "starts (3,) is [1, 1, 2]; expected it to rise from 0 to 2"),
        ({"starts": integers([0, 3, 2])}, "starts (3,) is [0, 3, 2]; expected it to rise from 0 to 2"),
        (
            {"starts": integers([0, 0, 2]), "lengths": integers([0, 1])},
            "starts (3,) is [0, 0, 2]; expected no more queries than lengths [0, 1] has tokens",
        ),
    ],
)
def test_attention_names_what_does_not_fit(changed, words):
    if DEVICE != "cpu" and ("cpu" in words or "holds" in words or "rise" in words or "no more" in words):
        pytest.skip("on a GPU numbers are not checked, and the device has another name")
    with pytest.raises(ValueError) as caught:
        paged_attention(**(RIGHT | changed))
    assert str(caught.value).startswith("paged_attention: ")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"k": zeros(2, 32)}, "k has shape (2, 32); expected 3 dimensions"),
        ({"v": zeros(2, 2, 16, dtype=HALF)}, "v (2, 2, 16) is torch.float16; expected torch.float32, as k"),
        ({"v": zeros(1, 2, 16)}, "v has shape (1, 2, 16); expected (2, 2, 16), as k"),
        ({"k": zeros(2, 2, 257)}, "k has shape (2, 2, 257); expected a head size of 1 to 256"),
        ({"k": zeros(2, 4, 16), "v": zeros(2, 4, 16)}, "k has 4 heads (2, 4, 16); expected k_pages' 2"),
        ({"k_pages": zeros(3, 8, 2, 16, dtype=HALF)}, "k_pages (3, 8, 2, 16) is torch.float16; expected torch.float32"),
        ({"v_pages": zeros(8, 3, 2, 16).transpose(0, 1)}, "v_pages (3, 8, 2, 16) has strides"),
        ({"slots": zeros(2, dtype=INT)}, "slots (2,) is torch.int32; expected torch.int64"),
        ({"slots": zeros(3, dtype=LONG)}, "slots has shape (3,) on cpu; expected (2,) on cpu"),
        ({"slots": integers([24, 0], LONG)}, "slots (2,) holds 24; expected less than 24, the slots of k_pages"),
    ],
)
def test_writing_names_what_does_not_fit(changed, words):
    if DEVICE != "cpu" and ("cpu" in words or "holds" in words):
        pytest.skip("on a GPU numbers are not checked, and the device has another name")
    pages = {name: RIGHT[name].clone() for name in ("k_pages", "v_pages")}
    right = {"k": zeros(2, 2, 16), "v": zeros(2, 2, 16), "slots": zeros(2, dtype=LONG)} | pages
    with pytest.raises(ValueError) as caught:
        kv_write(**(right | changed))
    assert str(caught.value).startswith("kv_write: ")
    assert words in str(caught.value)


@pytest.mark.skipif(DEVICE != "cpu", reason="numbers are checked on a CPU anyway")
def test_numbers_are_left_unread_where_a_check_would_wait(monkeypatch):
    """As on a GPU, unless FASTGPT_DEBUG=1."""
    bad = [t.to("meta") for t in (RIGHT["q"], RIGHT["k_pages"], RIGHT["block_table"], RIGHT["lengths"])]
    paged_prefill.check_values(*bad, STARTS.to("meta"))  # a look at a number of these would raise
    monkeypatch.setattr(paged_prefill, "DEBUG", True)
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        paged_prefill.check_values(*bad, STARTS.to("meta"))
