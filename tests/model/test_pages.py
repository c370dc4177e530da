"""The block allocator: one example for each promise. Its state machine is in test_pages_machine.py."""

import pytest

from fastgpt.model.pages import BlockAllocator, BlockTable, OutOfPages
from tests.helpers.block_tables import state, uses


def filled(allocator: BlockAllocator, tokens: list[int]) -> BlockTable:
    """A table of these tokens, computed and published."""
    table = allocator.open(tokens)
    allocator.reserve(table, len(tokens))
    table.length = len(tokens)
    allocator.publish(table, tokens)
    return table


def found(allocator: BlockAllocator, tokens: list[int]) -> list[int]:
    """The pages of these tokens that are cached, all of which may count. Moves them to the end of the queue."""
    table = allocator.open([*tokens, 0])
    pages = table.pages.copy()
    allocator.release(table)
    return pages


A, B = [1, 2, 3, 4], [5, 6, 7, 8]


def test_the_least_recently_used_page_goes_first():
    allocator = BlockAllocator(4, 2)
    a, b = filled(allocator, A), filled(allocator, B)
    (a0, a1), (b0, b1) = a.pages, b.pages
    allocator.release(a)
    allocator.release(b)
    assert found(allocator, A) == [a0, a1]  # a use, so B's are now older
    new = allocator.open()
    for taken in ([b1], [b1, b0], [b1, b0, a1], [b1, b0, a1, a0]):
        allocator.reserve(new, 2 * len(taken))
        assert new.pages == taken
    assert found(allocator, A) == found(allocator, B) == []


def test_in_a_large_pool_too_only_the_least_recently_used_go():
    """It may give up a few at once."""
    allocator = BlockAllocator(512, 1)
    tables = [filled(allocator, [i]) for i in range(512)]
    for i in [*range(100, 512), *range(100)]:
        allocator.release(tables[i])
    allocator.reserve(allocator.open(), 1)
    kept = [bool(found(allocator, [i])) for i in [*range(100, 512), *range(100)]]
    gone = kept.index(True)
    assert 1 <= gone <= 16
    assert all(kept[gone:])
    assert (allocator.used, allocator.free) == (1, 511)


def test_an_empty_page_is_taken_before_a_cached_one():
    allocator = BlockAllocator(4, 2)
    table = filled(allocator, A)
    kept = table.pages.copy()
    allocator.release(table)
    other = allocator.open()
    allocator.reserve(other, 4)
    assert not {*other.pages} & {*kept}
    assert found(allocator, A) == kept


def test_the_end_of_a_prefix_goes_before_its_beginning():
    allocator = BlockAllocator(3, 2)
    table = filled(allocator, [1, 2, 3, 4, 5, 6])
    pages = table.pages.copy()
    allocator.release(table)
    new = allocator.open()
    for left in (2, 1, 0):
        allocator.reserve(new, 2 * (3 - left))
        assert found(allocator, [1, 2, 3, 4, 5, 6]) == pages[:left]


def test_pages_in_use_are_never_evicted():
    allocator = BlockAllocator(2, 2)
    table, new = filled(allocator, A), allocator.open()
    assert (allocator.free, allocator.used) == (0, 2)
    with pytest.raises(OutOfPages, match="1 pages are needed and 0 are free"):
        allocator.reserve(new, 1)
    assert found(allocator, A) == table.pages


def test_equal_pages_after_different_prefixes_are_not_shared():
    allocator = BlockAllocator(8, 2)
    one = filled(allocator, [1, 2, 3, 4])
    two = filled(allocator, [5, 6, 3, 4])
    assert not {*one.pages} & {*two.pages}
    assert found(allocator, [5, 6, 3, 4]) == two.pages
    assert found(allocator, [5, 6, 1, 2]) == two.pages[:1]
    assert found(allocator, [3, 4]) == found(allocator, [1, 3]) == found(allocator, [2, 1]) == []
    assert found(allocator, [1, 2, 3, 4]) == one.pages


def test_a_prefix_is_shared_while_its_owner_still_runs():
    allocator = BlockAllocator(4, 2)
    one = filled(allocator, [1, 2, 3])
    two = filled(allocator, [1, 2, 4])
    assert one.pages[0] == two.pages[0]
    assert one.pages[1] != two.pages[1]
    assert allocator.references[one.pages[0]] == 2
    assert allocator.used == 3


def test_only_full_pages_are_found_and_the_last_token_never_counts():
    allocator = BlockAllocator(8, 2)
    pages = filled(allocator, [1, 2, 3, 4, 5]).pages
    for length, count in enumerate([0, 0, 0, 1, 1, 2, 2]):
        table = allocator.open([1, 2, 3, 4, 5, 6][:length])
        assert table.pages == pages[:count]
        assert table.length == 2 * count
        allocator.release(table)


def test_only_tokens_that_are_both_written_and_named_are_published():
    allocator = BlockAllocator(8, 2)
    table = allocator.open(A)
    allocator.reserve(table, 4)
    table.length = 3
    allocator.publish(table, A)  # the fourth is not written
    assert found(allocator, A) == table.pages[:1]
    table.length = 4
    allocator.publish(table, A[:3])  # the fourth is only a guess
    assert found(allocator, A) == table.pages[:1]
    allocator.publish(table, A)
    assert found(allocator, A) == table.pages


def test_of_two_that_compute_one_prefix_the_first_is_found_and_both_keep_theirs():
    allocator = BlockAllocator(4, 2)
    one, two = allocator.open(A), allocator.open(A)
    for table in (one, two):
        allocator.reserve(table, 4)
        table.length = 4
    for table in (one, two):
        allocator.publish(table, A)
    first, second = one.pages.copy(), two.pages.copy()
    assert not {*first} & {*second}
    assert found(allocator, A) == first
    allocator.release(two)
    assert found(allocator, A) == first
    allocator.release(one)
    assert found(allocator, A) == first


def test_the_pages_of_a_sequence_lie_in_a_row():
    allocator = BlockAllocator(10, 3)
    table = allocator.open()
    for length in range(1, 31):
        assert allocator.reserve(table, length) == []
        table.length = length
    assert table.pages == [*range(10)]


def test_sequences_that_grow_at_once_each_have_a_row():
    allocator = BlockAllocator(15, 4, row=5)
    tables = [allocator.open() for _ in range(3)]
    for length in range(1, 20):
        for table in tables:
            allocator.reserve(table, length)
            table.length = length
    assert [table.pages for table in tables] == [[*range(5)], [*range(5, 10)], [*range(10, 15)]]


def test_a_new_sequence_takes_the_row_that_was_given_back_last():
    allocator = BlockAllocator(14, 4, row=4)  # three rows, and two pages that are none
    tables = [filled(allocator, [i] * 3) for i in range(3)]
    assert [table.pages for table in tables] == [[0], [4], [8]]
    allocator.release(tables[0])
    allocator.release(tables[1])
    assert [filled(allocator, [i] * 3).pages for i in (3, 4)] == [[4], [0]]
    others = [filled(allocator, [i] * 3).pages[0] for i in range(5, 16)]  # no row is left, but pages are
    assert sorted(others) == [1, 2, 3, 5, 6, 7, 9, 10, 11, 12, 13]


def test_a_fork_shares_all_and_copies_only_the_page_it_writes():
    allocator = BlockAllocator(8, 2)
    table = filled(allocator, [1, 2, 3])
    allocator.reserve(table, 7)  # two pages more, which are not yet written: no use to a fork
    p0, p1, p2, p3 = table.pages
    twin = allocator.fork(table)
    assert (twin.pages, twin.length) == ([p0, p1], 3)
    assert allocator.used == 4
    ((source, page),) = allocator.reserve(twin, 4)
    assert source == p1
    assert twin.pages == [p0, page]
    assert table.pages == [p0, p1, p2, p3]
    assert page not in table.pages
    assert allocator.reserve(table, 4) == allocator.reserve(twin, 4) == []  # each now has its own
    assert [allocator.references[p] for p in (p0, p1, page)] == [2, 1, 1]


def test_a_fork_at_the_end_of_a_page_copies_nothing():
    allocator = BlockAllocator(8, 2)
    table = filled(allocator, A)
    twin = allocator.fork(table)
    assert allocator.reserve(twin, 6) == allocator.reserve(table, 6) == []
    assert twin.pages[:2] == table.pages[:2]
    assert twin.pages[2] != table.pages[2]


def test_a_shared_page_that_holds_nothing_any_more_is_replaced_without_a_copy():
    allocator = BlockAllocator(8, 2)
    table = allocator.open()
    allocator.reserve(table, 4)
    table.length = 4
    twin = allocator.fork(table)
    allocator.truncate(twin, 2)
    assert allocator.reserve(twin, 3) == []
    assert twin.pages[0] == table.pages[0]
    assert twin.pages[1] != table.pages[1]


def test_without_a_page_for_the_copy_nothing_changes():
    allocator = BlockAllocator(3, 2)
    table = filled(allocator, [1, 2, 3])
    twin = allocator.fork(table)
    before = state(allocator, table, twin)
    with pytest.raises(OutOfPages, match="2 pages are needed and 1 are free"):
        allocator.reserve(twin, 5)
    assert state(allocator, table, twin) == before
    assert len(allocator.reserve(twin, 4)) == 1


@pytest.mark.parametrize("use", range(5), ids=["release", "reserve", "fork", "publish", "truncate"])
def test_a_released_table_is_not_used_again(use: int):
    allocator = BlockAllocator(4, 2)
    table, other = filled(allocator, A), filled(allocator, B)
    allocator.release(table)
    before = state(allocator, table, other)
    with pytest.raises(ValueError, match="this block table was released before"):
        uses(allocator, table)[use]()
    assert state(allocator, table, other) == before
    assert allocator.free == 2


def test_truncate_keeps_its_pages_and_refuses_what_others_can_find():
    allocator = BlockAllocator(4, 2)
    table = filled(allocator, [1, 2, 3, 4, 5])
    pages = table.pages.copy()
    allocator.truncate(table, 4)
    assert (table.length, table.pages) == (4, pages)
    for length in (3, 0, -1, 5):
        with pytest.raises(ValueError, match=f"a table of 4 positions cannot be cut to {length}"):
            allocator.truncate(table, length)
    assert (table.length, table.pages) == (4, pages)
    assert found(allocator, A) == pages[:2]


def test_a_prefix_that_was_found_or_forked_is_not_cut_either():
    allocator = BlockAllocator(8, 2)
    table = filled(allocator, A)
    for other in (allocator.open([*A, 0]), allocator.fork(table)):
        with pytest.raises(ValueError, match="4 positions cannot be cut to 3"):
            allocator.truncate(other, 3)


def test_a_fork_publishes_for_itself():
    allocator = BlockAllocator(8, 2)
    table = filled(allocator, [1, 2, 3])
    twin = allocator.fork(table)
    for each, token in ((table, 4), (twin, 5)):
        allocator.reserve(each, 4)
        each.length = 4
        allocator.publish(each, [1, 2, 3, token])
    assert found(allocator, [1, 2, 3, 4]) == table.pages
    assert found(allocator, [1, 2, 3, 5]) == twin.pages


def test_guesses_are_cut_off_and_never_found():
    allocator = BlockAllocator(6, 2)
    table = filled(allocator, [1, 2, 3])
    allocator.reserve(table, 6)
    table.length = 6
    allocator.publish(table, [1, 2, 3])  # 4, 9, 9 are guesses
    assert found(allocator, [1, 2, 3, 4, 9, 9]) == table.pages[:1]
    allocator.truncate(table, 4)
    allocator.publish(table, A)
    assert found(allocator, [1, 2, 3, 4, 9, 9]) == table.pages[:2]


def test_a_page_that_another_table_published_is_not_written():
    allocator = BlockAllocator(4, 2)
    twin = allocator.open()
    allocator.reserve(twin, 2)
    twin.length = 2
    leader = allocator.fork(twin)
    allocator.publish(leader, [1, 2])
    allocator.release(leader)
    allocator.truncate(twin, 1)
    allocator.reserve(twin, 2)  # to write another token than 2
    twin.length = 2
    assert not {*found(allocator, [1, 2])} & {*twin.pages}


def test_forget_empties_what_is_cached_and_hides_what_is_used():
    allocator = BlockAllocator(6, 2)
    done, running = filled(allocator, A), filled(allocator, B)
    allocator.release(done)
    allocator.forget()
    assert (allocator.free, allocator.used) == (4, 2)
    assert found(allocator, A) == found(allocator, B) == []
    allocator.release(running)
    assert found(allocator, B) == []
    assert allocator.free == 6
    again = filled(allocator, A)
    assert found(allocator, A) == again.pages


def test_peak_is_the_most_pages_in_use_at_once():
    allocator = BlockAllocator(8, 2)
    first, second = filled(allocator, A), filled(allocator, B)
    allocator.release(first)
    assert (allocator.used, allocator.peak) == (2, 4)
    allocator.reserve(second, 6)
    assert allocator.peak == 4
    taken = allocator.open([*A, 0])  # taking up cached pages counts
    assert (allocator.used, allocator.peak) == (5, 5)
    allocator.fork(taken)  # sharing them does not
    assert allocator.peak == 5


def test_without_a_prefix_cache_nothing_is_found_or_kept():
    allocator = BlockAllocator(2, 2, prefix_cache=False)
    table = filled(allocator, A)
    assert found(allocator, A) == []
    twin = allocator.fork(table)  # sharing by fork is another matter
    assert twin.pages == table.pages
    allocator.release(table)
    allocator.release(twin)
    assert allocator.free == 2
    assert found(allocator, A) == []
    assert sorted(filled(allocator, B).pages) == [0, 1]


@pytest.mark.parametrize(("length", "pages"), [(0, 0), (1, 1), (3, 1), (4, 2), (6, 2), (7, 3)])
def test_a_page_is_counted_from_its_first_position(length: int, pages: int):
    allocator = BlockAllocator(3, 3)
    assert allocator.pages_for(length) == pages
    allocator.reserve(allocator.open(), length)
    assert allocator.used == pages


@pytest.mark.parametrize(("pages", "page_size"), [(0, 1), (1, 0), (-1, 4)])
def test_a_cache_of_nothing_is_refused(pages: int, page_size: int):
    with pytest.raises(ValueError, match=f"at least 1 page of 1 position, not {pages} of {page_size}"):
        BlockAllocator(pages, page_size)
