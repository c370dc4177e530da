"""Plans forward passes: continuous batching over a paged cache.

Every iteration gives each running sequence the tokens that it lacks, oldest first: one token while it decodes, a chunk
while its prompt is read, both in the same forward pass, up to `max_batch_tokens`. When a sequence finishes, a waiting
one takes its place in the next iteration (Yu et al., 2022, "Orca", section 4.1). When pages run out, the youngest
sequence gives up its pages and is computed again later (recomputation: Kwon et al., 2023, section 4.5), so the oldest
always makes progress.
"""

import bisect
from collections import OrderedDict
from collections.abc import Iterable

from fastgpt.generation.plan import Chunk, DecodeBatch, LastToken, Plan, Sample
from fastgpt.model.kv_cache import PagedCache
from fastgpt.model.pages import BlockAllocator, BlockTable, OutOfPages


class Scheduler:
    """Holds the queue and the running sequences; see the module.

    Attributes:
        hits: tokens of prompts that were found in cached pages and not computed.
        preemptions: how many times a sequence lost its pages.
        free_slots: the slots that no running sequence has; the last one is given out next.
    """

    def __init__(
        self,
        cache: PagedCache,
        block_size: int,
        *,
        max_batch: int,
        max_batch_tokens: int,
        drafts: int = 0,
    ):
        """`drafts`: tokens that a guess has at most."""
        self.cache, self.block_size, self.drafts = cache, block_size, drafts
        self.max_batch, self.max_batch_tokens = max_batch, max_batch_tokens
        self.waiting: OrderedDict[Sample, None] = OrderedDict()  # in order; any of them is removed in constant time
        self.running: list[Sample] = []  # oldest first
        self.hits, self.preemptions = 0, 0
        self.free_slots = list(reversed(range(max_batch)))
        self._batch: DecodeBatch | None = None  # of the last plan, if no sequence has come or gone since
        self._refused: tuple[Sample, int] | None = None  # the sequence that did not fit, and the free pages then

    @property
    def allocator(self) -> BlockAllocator:
        return self.cache.allocator

    def most_positions(self, prompt: int, new: int) -> int:
        """The positions that a continuation needs in the cache at most: its last token is never an input."""
        return min(prompt + new - 1, self.block_size)

    def add(self, sample: Sample) -> None:
        """Put a sequence at the end of the queue."""
        self.waiting[sample] = None

    def plan(self) -> Plan:
        """The next forward pass; it has no chunks when nothing waits or runs.

        Pages are reserved, and block tables count the new tokens. Every sequence that predicted in the plan before must
        have got a token since, or have been dropped.
        """
        budget, one, many, asked, changed = self.max_batch_tokens, [], [], [], []
        batch, self._batch = self._batch, None
        if batch and self._advance(batch, changed):
            one += batch.chunks
            budget -= len(one)
        else:
            batch = None
            for sample in self.running.copy():
                if budget == 0:
                    break
                table, chunk = sample.table, sample.decoding
                if table is None:  # it has just lost its pages to an older sequence
                    continue
                if (
                    chunk is not None
                    and len(sample.tokens) == table.length + 1
                    and (table.length < sample.granted or self._grant(sample, table, changed))
                ):
                    table.length += 1
                    if table.length == sample.granted:
                        self._publish(sample)
                    one.append(chunk)
                    budget -= 1
                elif (chunk := self._next_chunk(sample, budget)) is not None:
                    asked.append(chunk)
                    (one if len(chunk.tokens) == 1 else many).append(chunk)
                    budget -= len(chunk.tokens)
        while budget and self.waiting and self.free_slots and self._admit(sample := next(iter(self.waiting))):
            del self.waiting[sample]
            chunk = self._chunk(sample, budget, [])
            asked.append(chunk)
            (one if len(chunk.tokens) == 1 else many).append(chunk)
            budget -= len(chunk.tokens)
        if not asked and one and len(one) == len(self.running):
            self._batch = batch or DecodeBatch(one, self.allocator.page_size)
        chunks, spent = one + many, self.max_batch_tokens - budget
        rows = len(chunks) + sum(chunk.rows - 1 for chunk in asked)
        read = sum(len(chunk.tokens) for chunk in asked if chunk.reading)
        # A sequence that was given a page in this plan may have lost all its pages since, to an older sequence.
        changed = [sample for sample in changed if sample.table] + [chunk.sample for chunk in asked]
        return Plan(chunks, len(one), rows, spent, read, changed, self._batch)

    def _advance(self, batch: DecodeBatch, changed: list[Sample]) -> bool:
        """Move to the batch's next iteration; False, with no token counted, where a sequence can get no page."""
        batch.advance()
        for i in batch.full.pop(batch.iteration, ()):
            sample, table = batch.samples[i], batch.tables[i]
            if not self._grant(sample, table, changed):
                return False
            batch.longs[2, i] = table.pages[-1] * self.allocator.page_size
            batch.full[batch.iteration + sample.granted - table.length].append(i)
        for table in batch.tables:
            table.length += 1
        for i in batch.full.get(batch.iteration + 1, ()):
            self.allocator.publish(batch.tables[i], batch.samples[i].tokens)
        return True

    def _grant(self, sample: Sample, table: BlockTable, changed: list[Sample]) -> bool:
        """Give a decoding sequence its next page, if its pages are full and a page is free; whether it got one."""
        allocator, length = self.allocator, table.length
        if sample.granted != length or length % allocator.page_size or length == self.block_size:
            return False
        if not allocator.extend(table):
            return False
        sample.granted = min(length + allocator.page_size, self.block_size)
        changed.append(sample)
        return True

    def fork(self, sample: Sample, sibling: Sample) -> bool:
        """Start a continuation of the same prompt on the same pages; False where the batch has no free slot."""
        assert sample.table is not None
        if not self.free_slots:
            return False
        sibling.table = self.allocator.fork(sample.table)
        sample.granted = 0  # its last page is no longer its own
        self._run(sibling)
        return True

    def put_back(self, samples: Iterable[Sample]) -> None:
        """Put sequences back into the queue by their order, which is before all that never ran."""
        front = sorted(samples, key=lambda sample: sample.order)
        while front and self.waiting and (first := next(iter(self.waiting))).order < front[-1].order:
            del self.waiting[first]
            bisect.insort(front, first, key=lambda sample: sample.order)
        for sample in reversed(front):
            self.waiting[sample] = None
            self.waiting.move_to_end(sample, last=False)

    def drop(self, sample: Sample) -> None:
        """Remove a sequence that is finished or cancelled, whether it runs or waits."""
        if sample.slot >= 0:
            self._stop(sample)
        else:
            self.waiting.pop(sample, None)

    def start_over(self) -> None:
        """Preempt all sequences and forget all pages: after a forward pass that failed, their content is unknown."""
        for sample in self.running.copy():
            # A sibling may just have started.
            sample.siblings = [sibling for sibling in sample.siblings if sibling.slot < 0]
        for sample in self.running.copy():
            self._preempt(sample)
        self.waiting = OrderedDict.fromkeys(sorted(self.waiting, key=lambda sample: sample.order))
        self.allocator.forget()

    def _next_chunk(self, sample: Sample, budget: int) -> Chunk | None:
        """The tokens that a running sequence lacks, with pages reserved for them.

        Younger sequences are preempted for that. None where it was preempted itself.
        """
        assert sample.table is not None
        if self._slid(sample):
            self.allocator.release(sample.table)
            sample.table = BlockTable()
        lacking = len(sample.tokens) - sample.start - sample.table.length
        draft = self._draft(sample, budget) if lacking == 1 else []
        target = sample.table.length + min(budget, lacking + len(draft))
        while True:
            try:
                self.cache.reserve(sample.table, target)
                return self._chunk(sample, budget, draft)
            except OutOfPages:
                if draft:  # no sequence is preempted for a guess
                    target, draft = sample.table.length + 1, []
                    continue
                victim = self.running[-1]
                self._preempt(victim)
                if victim is sample:
                    return None

    def _admit(self, sample: Sample) -> bool:
        """Start a waiting sequence if pages are free for all its tokens, and one more for each running sequence."""
        self._slid(sample)
        if self.running and self._refused == (sample, self.allocator.free):
            return False  # nothing has changed since, so the prompt is not hashed again
        length = len(sample.tokens) - sample.start
        table = self.allocator.open([] if sample.start else sample.tokens)
        try:
            missing = self.allocator.pages_for(length) - len(table.pages)
            if self.running and missing + len(self.running) > self.allocator.free:
                raise OutOfPages
            self.cache.reserve(table, length)
        except OutOfPages:
            self.allocator.release(table)
            self._refused = (sample, self.allocator.free)
            return False
        if not sample.generated:
            self.hits += table.length
        sample.table = table
        self._run(sample)
        return True

    def _chunk(self, sample: Sample, budget: int, draft: list[int]) -> Chunk:
        """The next tokens of a sequence whose pages are reserved, counted in its table."""
        table = sample.table
        assert table is not None
        first, known = table.length, len(sample.tokens) - sample.start
        tokens = [*sample.tokens[sample.start + first : sample.start + min(known, first + budget)], *draft]
        table.length += len(tokens)
        self._publish(sample)
        rows = 1 + len(draft) if table.length >= known else 0
        reading = sample.generated == 0 or (known - first > 1 and not sample.start)  # not each time the window slides
        if rows and sample.proposer is None and not sample.start:
            sample.decoding = sample.decoding or LastToken(sample)
            sample.granted = min(self.allocator.pages_for(table.length) * self.allocator.page_size, self.block_size)
        return Chunk(sample, first, tokens, draft, reading, rows)

    def _publish(self, sample: Sample) -> None:
        """Let others find its full pages, even in the same forward pass, which writes all keys before it reads any."""
        table = sample.table
        assert table is not None
        if not sample.start and table.length // self.allocator.page_size > len(table.digests):
            self.allocator.publish(table, sample.tokens)

    def _slid(self, sample: Sample) -> bool:
        """Move the window of a sequence that has outgrown it; whether it moved.

        All positions have changed then, and nothing that is cached is valid.
        """
        start = max(0, len(sample.tokens) - self.block_size)
        moved, sample.start = start > sample.start, start
        return moved

    def _draft(self, sample: Sample, budget: int) -> list[int]:
        if sample.proposer is None or sample.start or sample.siblings:  # siblings share its pages, without guesses
            return []
        left = sample.params.max_new_tokens - sample.generated - 1  # the last token is not worth a guess
        most = min(self.drafts, left, budget - 1, self.block_size - len(sample.tokens))
        return sample.proposer.propose(sample.tokens, most)

    def _run(self, sample: Sample) -> None:
        if not sample.generated:
            sample.tokens = list(sample.tokens)  # its siblings hold the same list until they run
        sample.slot, self._batch = self.free_slots.pop(), None
        bisect.insort(self.running, sample, key=lambda other: other.order)

    def _stop(self, sample: Sample) -> None:
        assert sample.table is not None
        self.allocator.release(sample.table)
        self.free_slots.append(sample.slot)
        sample.table, sample.slot, sample.decoding, sample.granted, self._batch = None, -1, None, 0, None
        self.running.remove(sample)

    def _preempt(self, sample: Sample) -> None:
        self._stop(sample)
        self.put_back([sample])
        self.preemptions += 1
