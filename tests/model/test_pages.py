"""The block allocator: a state machine with a memory of its own, then one example for each promise.

To a page, the key and value of a token stand for all tokens up to it. So the machine's memory holds at each place the
whole prefix that ends there, and a page that is shared, kept or given away wrongly is read as somebody else's prefix.
"""

import copy
import dataclasses
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from fastgpt.model.pages import BlockAllocator, BlockTable, OutOfPages

WHICH = st.integers(0, 11)
TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=6)  # two tokens, so that prefixes are often the same
FEW = st.lists(st.integers(0, 1), min_size=1, max_size=3)
MOST_SEQUENCES = 6


def state(allocator: BlockAllocator, *tables: BlockTable) -> list[dict]:
    return copy.deepcopy([vars(allocator), *map(dataclasses.asdict, tables)])


@dataclass(eq=False)
class Sequence:
    """A table and the tokens that its positions mean; those from `known` on are guesses."""

    table: BlockTable
    tokens: list[int]
    known: int


class Allocations(RuleBasedStateMachine):
    steps = 0  # of all runs
    seen: ClassVar[Counter[str]] = Counter()  # what the runs met, so that a test can tell that they met it

    @initialize(
        pages=st.sampled_from([*range(1, 13), *range(6, 13)]),
        page_size=st.sampled_from([1, 2, 2, 3, 3, 4, 4]),
        row=st.integers(1, 5),
        prefix_cache=st.sampled_from([True] * 7 + [False]),
    )
    def begin(self, pages: int, page_size: int, row: int, prefix_cache: bool) -> None:
        self.allocator, self.P = BlockAllocator(pages, page_size, row=row, prefix_cache=prefix_cache), page_size
        self.memory: list[list[tuple[int, ...] | None]] = [[None] * page_size for _ in range(pages)]
        self.live: list[Sequence] = []
        self.waiting: list[list[int]] = []
        self.ended: list[BlockTable] = []
        self.peak = 0
        Allocations.steps -= 1  # the invariant counts this one too

    # What a scheduler does.

    @precondition(lambda self: len(self.live) < MOST_SEQUENCES)
    @rule(tokens=TOKENS, more=TOKENS, chunk=st.integers(1, 12))
    def start(self, tokens: list[int], more: list[int], chunk: int) -> None:
        self.admit(tokens + more, chunk)

    @precondition(lambda self: self.waiting and len(self.live) < MOST_SEQUENCES)
    @rule(which=WHICH, chunk=st.integers(1, 48))
    def resume(self, which: int, chunk: int) -> None:
        self.admit(self.waiting.pop(which % len(self.waiting)), chunk)

    @precondition(lambda self: self.live)
    @rule(which=WHICH, tokens=FEW, publish=st.booleans(), ahead=FEW)
    def grow(self, which: int, tokens: list[int], publish: bool, ahead: list[int]) -> None:
        sequence = self.pick(which)
        self.cut(sequence, sequence.known)
        if self.append(sequence, tokens):
            sequence.known = len(sequence.tokens)
            if publish:  # tokens may be known that no page holds yet
                self.allocator.publish(sequence.table, sequence.tokens + ahead)
        else:
            self.preempt(self.live[-1])

    @precondition(lambda self: self.live)
    @rule(which=WHICH, guesses=FEW)
    def guess(self, which: int, guesses: list[int]) -> None:
        sequence = self.pick(which)
        if self.append(sequence, guesses):
            self.allocator.publish(sequence.table, sequence.tokens[: sequence.known])

    @precondition(lambda self: any(len(s.tokens) > s.known for s in self.live))
    @rule(which=WHICH, accepted=st.integers(0, 3), publish=st.booleans())
    def verify(self, which: int, accepted: int, publish: bool) -> None:
        guessing = [s for s in self.live if len(s.tokens) > s.known]
        sequence = guessing[which % len(guessing)]
        sequence.known = min(sequence.known + accepted, len(sequence.tokens))
        self.cut(sequence, sequence.known)
        if publish:
            self.allocator.publish(sequence.table, sequence.tokens)

    @precondition(lambda self: self.live)
    @rule(which=WHICH, length=st.integers(0, 48))
    def truncate(self, which: int, length: int) -> None:
        """To any length at all: what others may find stays, and nothing grows."""
        sequence = self.pick(which)
        table = sequence.table
        if len(table.digests) * self.P <= length <= len(sequence.tokens):
            self.cut(sequence, length)
            return
        before = state(self.allocator, table)
        with pytest.raises(ValueError, match=f"{len(sequence.tokens)} positions cannot be cut to {length}"):
            self.allocator.truncate(table, length)
        assert state(self.allocator, table) == before
        self.seen["refused cut"] += 1

    @precondition(lambda self: self.live)
    @rule(which=WHICH, length=st.integers(0, 48))
    def only_reserve(self, which: int, length: int) -> None:
        self.reserve(self.pick(which), length)

    @precondition(lambda self: self.live and len(self.live) < MOST_SEQUENCES)
    @rule(which=WHICH, tokens=st.lists(st.integers(0, 1), max_size=3))
    def fork(self, which: int, tokens: list[int]) -> None:
        sequence, free = self.pick(which), self.allocator.free
        table = self.allocator.fork(sequence.table)
        assert self.allocator.free == free
        assert table.pages == sequence.table.pages[: self.allocator.pages_for(len(sequence.tokens))]
        twin = Sequence(table, sequence.tokens.copy(), sequence.known)
        self.live.append(twin)
        if tokens:
            self.append(twin, tokens)  # guesses of its own, into the page that it shares

    @precondition(lambda self: self.live)
    @rule(which=WHICH, preempted=st.booleans())
    def end(self, which: int, preempted: bool) -> None:
        (self.preempt if preempted else self.release)(self.pick(which))

    @precondition(lambda self: self.ended)
    @rule(which=WHICH, call=st.integers(0, 4))
    def use_after_release(self, which: int, call: int) -> None:
        table = self.ended[which % len(self.ended)]
        before = state(self.allocator, table)
        with pytest.raises(ValueError, match="released before"):
            uses(self.allocator, table)[call]()
        assert state(self.allocator, table) == before

    @rule(now=st.integers(0, 5))
    def forget(self, now: int) -> None:
        if now:
            return
        free = self.allocator.free
        self.allocator.forget()
        assert self.allocator.free == free
        assert not self.findable()

    # The steps that these share, each held to the model.

    def pick(self, which: int) -> Sequence:
        return self.live[which % len(self.live)]

    def owners(self) -> Counter[int]:
        return Counter(page for sequence in self.live for page in sequence.table.pages)

    def findable(self) -> dict[tuple[int, ...], int]:
        """The page of each prefix that `open` may find."""
        return {self.memory[page][-1]: page for page in self.allocator._digest_of}

    def admit(self, tokens: list[int], chunk: int) -> None:
        findable, expected = self.findable(), []
        for end in range(self.P, len(tokens), self.P):
            if tuple(tokens[:end]) not in findable:
                break
            expected.append(findable[tuple(tokens[:end])])
        table = self.allocator.open(tokens)
        assert table.pages == expected
        assert table.length == len(expected) * self.P < len(tokens)
        self.seen["hit"] += bool(expected)
        self.peak = max(self.peak, self.allocator.used)  # counts, even if the sequence is not let in
        sequence = Sequence(table, tokens[: table.length], table.length)
        self.live.append(sequence)
        if self.append(sequence, tokens[table.length :][:chunk]):
            sequence.known = len(sequence.tokens)
            self.allocator.publish(table, tokens)
        else:
            self.release(sequence)

    def append(self, sequence: Sequence, tokens: list[int]) -> bool:
        """Reserve and write; False, and nothing done, without pages."""
        first, length = len(sequence.tokens), len(sequence.tokens) + len(tokens)
        if not self.reserve(sequence, length):
            return False
        sequence.tokens += tokens
        sequence.table.length = length
        owners = self.owners()
        for t in range(first, length):
            page = sequence.table.pages[t // self.P]
            assert owners[page] == 1, "a shared page is written"
            assert page not in self.allocator._digest_of, "a page that others may find is written"
            self.memory[page][t % self.P] = tuple(sequence.tokens[: t + 1])
        return True

    def reserve(self, sequence: Sequence, length: int) -> bool:
        allocator, table, P = self.allocator, sequence.table, self.P
        first, last, pages, owners = len(sequence.tokens) // P, -(-length // P), table.pages.copy(), self.owners()
        written = table.pages[first:last]
        shared = [page for page in written if owners[page] > 1]
        needed, free = len(shared) + max(0, last - len(pages)), allocator.free
        if needed > free:
            before = state(allocator, *(s.table for s in self.live))
            with pytest.raises(OutOfPages, match=f"{needed} pages are needed and {free} are free"):
                allocator.reserve(table, length)
            assert state(allocator, *(s.table for s in self.live)) == before
            self.seen["out of pages"] += 1
            return False
        others, cached = state(allocator, *(s.table for s in self.live if s is not sequence))[1:], [*allocator._cached]
        copies = allocator.reserve(table, length)
        assert allocator.free == free - needed
        assert len(table.pages) == max(last, len(pages))
        assert [page for i, page in enumerate(pages) if table.pages[i] != page] == shared  # nothing else moves
        assert state(allocator, *(s.table for s in self.live if s is not sequence))[1:] == others
        assert copies == [(p, table.pages[i]) for i, p in enumerate(pages) if p in shared and i * P < table.length]
        evicted = len(cached) - len(allocator._cached)
        assert [*allocator._cached] == cached[evicted:]  # the least recently used go first,
        assert not (evicted and allocator._empty)  # and only where no page is empty
        for page in set(table.pages) - set(pages):
            self.memory[page] = [None] * P
        for source, page in copies:
            self.memory[page] = self.memory[source].copy()
        self.seen["copy"] += len(copies)
        self.seen["eviction"] += evicted
        return True

    def cut(self, sequence: Sequence, length: int) -> None:
        self.allocator.truncate(sequence.table, length)
        del sequence.tokens[length:]
        sequence.known = min(sequence.known, length)

    def preempt(self, sequence: Sequence) -> None:
        if sequence.known:
            self.waiting.append(sequence.tokens[: sequence.known])
        self.release(sequence)

    def release(self, sequence: Sequence) -> None:
        owners, pages, cached = self.owners(), sequence.table.pages.copy(), [*self.allocator._cached]
        self.allocator.release(sequence.table)
        last = [page for page in reversed(pages) if owners[page] == 1 and page in self.allocator._digest_of]
        assert [*self.allocator._cached] == cached + last
        self.live.remove(sequence)
        self.ended.append(sequence.table)

    @invariant()
    def every_page_has_one_state_and_every_table_reads_its_tokens(self) -> None:
        Allocations.steps += 1
        allocator, owners = self.allocator, self.owners()
        pages = range(allocator.pages)
        assert allocator.references == [owners[page] for page in pages]
        assert allocator.used == len(owners)
        assert sorted([*owners, *allocator._empty, *allocator._cached]) == [*pages]
        assert allocator.used + allocator.free == allocator.pages
        empty = [allocator._row - n for n in allocator._taken]
        rows = [[*pages][i * allocator._row :][: allocator._row] for i in range(len(empty))]
        assert empty == [sum(page in allocator._empty for page in row) for row in rows]
        assert set(allocator._empty_rows) == {i for i, n in enumerate(empty) if n == allocator._row}
        self.peak = max(self.peak, allocator.used)
        assert allocator.peak == self.peak
        for sequence in self.live:
            table, tokens = sequence.table, sequence.tokens
            assert table.length == len(tokens) <= len(table.pages) * self.P
            assert len(set(table.pages)) == len(table.pages)
            read = [self.memory[table.pages[t // self.P]][t % self.P] for t in range(len(tokens))]
            assert read == [tuple(tokens[: t + 1]) for t in range(len(tokens))]
        # Whatever can be found holds what its hash says, and an empty page cannot be found.
        assert {page: digest for digest, page in allocator._by_digest.items()} == allocator._digest_of
        assert len(allocator._by_digest) == len(allocator._digest_of)
        assert set(allocator._cached) <= set(allocator._digest_of) <= {*owners, *allocator._cached}
        for page, digest in allocator._digest_of.items():
            prefix = self.memory[page][-1]
            assert prefix is not None
            assert len(prefix) % self.P == 0
            assert self.memory[page] == [prefix[: len(prefix) - self.P + i + 1] for i in range(self.P)]
            wanted = b""
            for i in range(len(prefix) // self.P):
                wanted = allocator._digest(wanted, prefix, i)
            assert wanted == digest

    def teardown(self) -> None:
        if not hasattr(self, "allocator"):
            return
        while self.live:
            self.release(self.live[-1])
        assert self.allocator.free == self.allocator.pages
        assert not any(self.allocator.references)
        self.allocator.forget()
        assert sorted(self.allocator._empty) == [*range(self.allocator.pages)]
        assert not self.allocator._cached


def uses(allocator: BlockAllocator, table: BlockTable) -> list[Callable[[], object]]:
    return [
        lambda: allocator.release(table),
        lambda: allocator.reserve(table, 1),
        lambda: allocator.fork(table),
        lambda: allocator.publish(table, [0] * 8),
        lambda: allocator.truncate(table, 0),
    ]


def test_over_ten_thousand_steps_every_table_reads_its_own_tokens():
    Allocations.steps = 0
    Allocations.seen.clear()
    run_state_machine_as_test(
        Allocations, settings=settings(max_examples=400, stateful_step_count=50, deadline=None, derandomize=True)
    )
    assert Allocations.steps >= 10_000
    wanted = {"hit": 200, "copy": 50, "eviction": 200, "out of pages": 200, "refused cut": 100}
    assert all(Allocations.seen[event] >= times for event, times in wanted.items()), Allocations.seen


# One example for each promise.


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
