"""The block allocator against a model of it, over thousands of random steps. Examples are in test_pages.py.

To a page, the key and value of a token stand for all tokens up to it. So the model's memory holds at each place the
whole prefix that ends there, and a page that is shared, kept or given away wrongly is read as somebody else's prefix.
The model also keeps which prefix each page can be found by, and the order in which cached pages are evicted.
"""

import copy
import itertools
from collections import Counter
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
from tests.helpers.block_tables import state, uses

WHICH = st.integers(0, 11)
TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=6)  # two tokens, so that prefixes are often the same
FEW = st.lists(st.integers(0, 1), min_size=1, max_size=3)
MOST_SEQUENCES = 6


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
        self.prefix_of: dict[int, tuple[int, ...]] = {}  # what each page can be found by
        self.cached: list[int] = []  # the least recently used first
        self.row = row
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
                self.publish(sequence, sequence.tokens + ahead)
        else:
            self.preempt(self.live[-1])

    @precondition(lambda self: self.live)
    @rule(which=WHICH, guesses=FEW)
    def guess(self, which: int, guesses: list[int]) -> None:
        sequence = self.pick(which)
        if self.append(sequence, guesses):
            self.publish(sequence, sequence.tokens[: sequence.known])

    @precondition(lambda self: any(len(s.tokens) > s.known for s in self.live))
    @rule(which=WHICH, accepted=st.integers(0, 3), publish=st.booleans())
    def verify(self, which: int, accepted: int, publish: bool) -> None:
        guessing = [s for s in self.live if len(s.tokens) > s.known]
        sequence = guessing[which % len(guessing)]
        sequence.known = min(sequence.known + accepted, len(sequence.tokens))
        self.cut(sequence, sequence.known)
        if publish:
            self.publish(sequence, sequence.tokens)

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
        self.cached.clear()
        self.prefix_of.clear()

    # The steps that these share, each held to the model.

    def pick(self, which: int) -> Sequence:
        return self.live[which % len(self.live)]

    def owners(self) -> Counter[int]:
        return Counter(page for sequence in self.live for page in sequence.table.pages)

    def empty(self) -> set[int]:
        return {*range(self.allocator.pages)} - {*self.owners()} - {*self.cached}

    def findable(self, tokens: list[int]) -> list[int]:
        """The pages that `open` should find for these tokens."""
        page_of = {prefix: page for page, prefix in self.prefix_of.items()}
        ends = itertools.takewhile(lambda end: tuple(tokens[:end]) in page_of, range(self.P, len(tokens), self.P))
        return [page_of[tuple(tokens[:end])] for end in ends]

    def admit(self, tokens: list[int], chunk: int) -> None:
        expected = self.findable(tokens)
        table = self.allocator.open(tokens)
        assert table.pages == expected
        assert table.length == len(expected) * self.P < len(tokens)
        self.cached = [page for page in self.cached if page not in expected]
        self.seen["hit"] += bool(expected)
        self.peak = max(self.peak, self.allocator.used)  # counts, even if the sequence is not let in
        sequence = Sequence(table, tokens[: table.length], table.length)
        self.live.append(sequence)
        if self.append(sequence, tokens[table.length :][:chunk]):
            sequence.known = len(sequence.tokens)
            self.publish(sequence, tokens)
        else:
            self.release(sequence)

    def publish(self, sequence: Sequence, tokens: list[int]) -> None:
        table = sequence.table
        done = len(table.digests)
        self.allocator.publish(table, tokens)
        full = min(len(tokens), table.length) // self.P
        assert len(table.digests) == (max(done, full) if self.allocator.prefix_cache else 0)
        for i in range(done, len(table.digests)):
            prefix = tuple(tokens[: (i + 1) * self.P])
            if prefix not in self.prefix_of.values():
                self.prefix_of[table.pages[i]] = prefix

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
            assert page not in self.prefix_of, "a page that others may find is written"
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
        others = state(allocator, *(s.table for s in self.live if s is not sequence))[1:]
        empty = self.empty()
        copies = allocator.reserve(table, length)
        assert allocator.free == free - needed
        assert len(table.pages) == max(last, len(pages))
        assert [page for i, page in enumerate(pages) if table.pages[i] != page] == shared  # nothing else moves
        assert state(allocator, *(s.table for s in self.live if s is not sequence))[1:] == others
        assert copies == [(p, table.pages[i]) for i, p in enumerate(pages) if p in shared and i * P < table.length]
        for page in written:
            if owners[page] == 1:
                self.prefix_of.pop(page, None)
        before: list[int | None] = [*shared, *[None, *table.pages][len(pages) : -1]]
        taken = [table.pages[pages.index(page)] for page in shared] + table.pages[len(pages) :]
        for neighbour, page in zip(before, taken, strict=True):
            self.take(neighbour, page, empty)
            self.memory[page] = [None] * P
        for source, page in copies:
            self.memory[page] = self.memory[source].copy()
        self.seen["copy"] += len(copies)
        return True

    def take(self, neighbour: int | None, page: int, empty: set[int]) -> None:
        """Hold a page that was allocated against the model: an empty one, else the least recently used one.

        A first page begins an empty row, and another is the next one, where there is one.
        """
        if not empty:
            evicted = self.cached.pop(0)
            del self.prefix_of[evicted]
            empty.add(evicted)
            self.seen["eviction"] += 1
        rows = [{*range(first, first + self.row)} for first in range(0, self.allocator.pages, self.row)]
        beginnings = {min(row) for row in rows if row <= empty}
        wanted = beginnings if neighbour is None else {neighbour + 1} & empty
        assert page in (wanted or empty)
        empty.remove(page)

    def cut(self, sequence: Sequence, length: int) -> None:
        self.allocator.truncate(sequence.table, length)
        del sequence.tokens[length:]
        sequence.known = min(sequence.known, length)

    def preempt(self, sequence: Sequence) -> None:
        if sequence.known:
            self.waiting.append(sequence.tokens[: sequence.known])
        self.release(sequence)

    def release(self, sequence: Sequence) -> None:
        owners, pages = self.owners(), sequence.table.pages.copy()
        self.allocator.release(sequence.table)
        self.cached += [page for page in reversed(pages) if owners[page] == 1 and page in self.prefix_of]
        self.live.remove(sequence)
        self.ended.append(sequence.table)

    @invariant()
    def every_page_has_one_state_and_every_table_reads_its_tokens(self) -> None:
        Allocations.steps += 1
        allocator, owners = self.allocator, self.owners()
        assert allocator.references == [owners[page] for page in range(allocator.pages)]
        assert allocator.used == len(owners)
        assert allocator.used + allocator.free == allocator.pages
        self.peak = max(self.peak, allocator.used)
        assert allocator.peak == self.peak
        for sequence in self.live:
            table, tokens = sequence.table, sequence.tokens
            assert table.length == len(tokens) <= len(table.pages) * self.P
            assert len(set(table.pages)) == len(table.pages)
            read = [self.memory[table.pages[t // self.P]][t % self.P] for t in range(len(tokens))]
            assert read == [tuple(tokens[: t + 1]) for t in range(len(tokens))]
        # Whatever can be found holds its prefix, and nothing else can be found.
        for page, prefix in self.prefix_of.items():
            assert self.memory[page] == [prefix[: len(prefix) - self.P + i + 1] for i in range(self.P)]
        probe = copy.deepcopy(allocator)  # to open a table counts as a use
        for prefix in {*self.prefix_of.values(), *(tuple(s.tokens) for s in self.live)}:
            assert probe.open([*prefix, 0]).pages == self.findable([*prefix, 0])

    def teardown(self) -> None:
        if not hasattr(self, "allocator"):
            return
        while self.live:
            self.release(self.live[-1])
        assert self.allocator.free == self.allocator.pages
        assert not any(self.allocator.references)
        self.allocator.forget()
        table = self.allocator.open()
        self.allocator.reserve(table, self.allocator.pages * self.P)
        assert sorted(table.pages) == [*range(self.allocator.pages)]


@pytest.mark.parametrize("runs", [40, pytest.param(400, marks=pytest.mark.slow)])
def test_over_thousands_of_steps_every_table_reads_its_own_tokens(runs: int):
    Allocations.steps = 0
    Allocations.seen.clear()
    run_state_machine_as_test(
        Allocations, settings=settings(max_examples=runs, stateful_step_count=50, deadline=None, derandomize=True)
    )
    assert Allocations.steps >= 25 * runs
    wanted = {"hit": 1 / 2, "copy": 1 / 16, "eviction": 1 / 2, "out of pages": 1 / 2, "refused cut": 1 / 4}
    assert all(Allocations.seen[event] >= of_a_run * runs for event, of_a_run in wanted.items()), Allocations.seen
