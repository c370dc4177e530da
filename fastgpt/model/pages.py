"""Which page of a paged cache belongs to whom: reference counts, copy-on-write, and reuse of shared prefixes.

Bookkeeping alone, without a tensor: `kv_cache.PagedCache` holds the pages themselves. Paging and sharing are
those of Kwon et al. (2023), "Efficient Memory Management for Large Language Model Serving with PagedAttention",
section 4. A page is in one of three states: used (some table refers to it), cached (no table does, but it still holds
a known prefix and may be taken up again) or empty. Cached and empty pages together are free.
"""

import struct
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256


class OutOfPages(Exception):
    """Fewer pages are free than were asked for. Nothing has changed."""


@dataclass(eq=False, slots=True)
class BlockTable:
    """A sequence's pages in order; position t lies in `pages[t // P]`, at place t % P.

    Attributes:
        length: positions that are written, or will be by the forward pass that is being prepared.
        digests: for each full page that others may find, the hash of all tokens up to its end.
        closed: released, and not to be used again.
        copied: how many of the first entries of `pages` a `PageTables` holds as they are.
    """

    pages: list[int] = field(default_factory=list)
    length: int = 0
    digests: list[bytes] = field(default_factory=list)
    closed: bool = False
    copied: int = 0


class BlockAllocator:
    """Hands out `pages` pages of `page_size` positions each.

    Full pages are found again by a chain of SHA-256 hashes, each over the hash before it and the page's tokens, so that
    equal hashes mean equal prefixes and not only equal pages. Of the cached pages the least recently used go first.

    Attributes:
        peak: the most pages that were in use at once.
    """

    def __init__(self, pages: int, page_size: int, *, row: int = 1, prefix_cache: bool = True):
        """`row`: the most pages that a sequence comes to have, for which a place side by side is looked for."""
        if pages < 1 or page_size < 1:
            raise ValueError(f"a cache needs at least 1 page of 1 position, not {pages} of {page_size}")
        self.pages, self.page_size, self.prefix_cache = pages, page_size, prefix_cache
        self.references = [0] * pages
        self.peak = 0
        self._empty: OrderedDict[int, None] = OrderedDict.fromkeys(reversed(range(pages)))  # the last one goes first
        # Rows of pages: how many of each are not empty, and which rows are empty throughout, the last one first.
        self._row = row
        self._taken = [0] * (pages // row)
        self._empty_rows: OrderedDict[int, None] = OrderedDict.fromkeys(reversed(range(pages // row)))
        self._cached: OrderedDict[int, None] = OrderedDict()  # the least recently used first
        self._evicted_at_once = max(1, pages // 64)
        self._by_digest: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}
        self._pack = struct.Struct(f"<{page_size}q").pack

    @property
    def free(self) -> int:
        """Pages that can be had: empty ones, and cached ones that would be given up."""
        return len(self._empty) + len(self._cached)

    @property
    def used(self) -> int:
        """Pages that some table refers to."""
        return self.pages - self.free

    def pages_for(self, length: int) -> int:
        """How many pages hold this many positions."""
        return -(-length // self.page_size)

    def open(self, tokens: Sequence[int] = ()) -> BlockTable:
        """A table for a new sequence that begins with what is cached of these tokens.

        Only full pages count, and the last token never does, because it must be computed to predict what follows.
        """
        table = BlockTable()
        if self.prefix_cache:
            digest = b""
            for i in range((len(tokens) - 1) // self.page_size):
                digest = self._digest(digest, tokens, i)
                page = self._by_digest.get(digest)
                if page is None:
                    break
                self._refer(page)
                table.pages.append(page)
                table.digests.append(digest)
        table.length = len(table.pages) * self.page_size
        return table

    def reserve(self, table: BlockTable, length: int) -> list[tuple[int, int]]:
        """Make the positions from `table.length` to `length` - 1 writable by this table alone.

        Returns:
            (from, to) pages whose contents the caller must copy before it writes (copy-on-write).

        Raises:
            OutOfPages: not enough free pages; nothing has changed.
        """
        self._check_open(table)
        P, first = self.page_size, table.length // self.page_size
        last = self.pages_for(length)
        shared = [i for i in range(first, min(last, len(table.pages))) if self.references[table.pages[i]] > 1]
        fresh = max(0, last - len(table.pages))
        if len(shared) + fresh > self.free:
            raise OutOfPages(f"{len(shared) + fresh} pages are needed and {self.free} are free")
        for page in table.pages[first:last]:
            if self.references[page] == 1:
                self._unpublish(page)
        copies = []
        for i in shared:
            source, page = table.pages[i], self._take(table.pages[i])
            if i * P < table.length:
                copies.append((source, page))
            self._drop(source)
            table.pages[i] = page
            table.copied = min(table.copied, i)
        for _ in range(fresh):
            table.pages.append(self._take(table.pages[-1] if table.pages else None))
        return copies

    def extend(self, table: BlockTable) -> bool:
        """Add the next page to a table whose pages are full, as `reserve` would; False without a free one."""
        if not self._empty and not self._cached:
            return False
        table.pages.append(self._take(table.pages[-1]))
        return True

    def fork(self, table: BlockTable) -> BlockTable:
        """A second table over the same positions. Whoever first writes into a shared page gets a copy of it."""
        self._check_open(table)
        pages = table.pages[: self.pages_for(table.length)]
        for page in pages:
            self._refer(page)
        return BlockTable(pages, table.length, list(table.digests))

    def publish(self, table: BlockTable, tokens: Sequence[int]) -> None:
        """Let others find the full pages of a sequence whose tokens, from its first on, are these."""
        self._check_open(table)
        if not self.prefix_cache:
            return
        done, full = len(table.digests), min(len(tokens), table.length) // self.page_size
        digest = table.digests[-1] if done else b""
        for i in range(done, full):
            digest = self._digest(digest, tokens, i)
            table.digests.append(digest)
            if digest not in self._by_digest:
                self._by_digest[digest] = table.pages[i]
                self._digest_of[table.pages[i]] = digest

    def truncate(self, table: BlockTable, length: int) -> None:
        """Forget the positions from `length` on. The pages stay with the table.

        Raises:
            ValueError: a page that others can find would be written again.
        """
        self._check_open(table)
        if not len(table.digests) * self.page_size <= length <= table.length:
            raise ValueError(f"a table of {table.length} positions cannot be cut to {length}")
        table.length = length

    def release(self, table: BlockTable) -> None:
        """Give up a sequence's pages. Raises ValueError for a table that was released before."""
        self._check_open(table)
        table.closed = True
        for page in reversed(table.pages):  # the end of a prefix is of no use without its beginning: it goes first
            self._drop(page)
        table.pages.clear()

    def forget(self) -> None:
        """Empty every cached page, and let nobody find a used one."""
        for page in self._cached:
            self._give_back(page)
        self._cached.clear()
        self._by_digest.clear()
        self._digest_of.clear()

    def _digest(self, before: bytes, tokens: Sequence[int], page: int) -> bytes:
        """The hash of the prefix that ends with this page of the tokens; `before`: that of the page before."""
        first = page * self.page_size
        return sha256(before + self._pack(*tokens[first : first + self.page_size])).digest()

    def _take(self, before: int | None) -> int:
        """A free page: the one behind `before` if it is empty, so that a sequence's pages lie side by side.

        A first page begins the empty row that was given back last, whose memory is warm.
        """
        if not self._empty:
            self._evict()
        if before is None and self._empty_rows:
            page = next(reversed(self._empty_rows)) * self._row
        elif before is not None and before + 1 in self._empty:
            page = before + 1
        else:
            page = next(reversed(self._empty))
        del self._empty[page]
        if (row := page // self._row) < len(self._taken):
            self._taken[row] += 1
            self._empty_rows.pop(row, None)
        self.references[page] = 1
        if (used := self.pages - len(self._empty) - len(self._cached)) > self.peak:
            self.peak = used
        return page

    def _give_back(self, page: int) -> None:
        """Count a page as empty."""
        self._empty[page] = None
        if (row := page // self._row) < len(self._taken):
            self._taken[row] -= 1
            if not self._taken[row]:
                self._empty_rows[row] = None

    def _evict(self) -> None:
        """Empty the least recently used of the cached pages: in a large pool several, which often lie in a row."""
        count = min(self._evicted_at_once, len(self._cached))
        for page in sorted((self._cached.popitem(last=False)[0] for _ in range(count)), reverse=True):
            self._unpublish(page)
            self._give_back(page)

    def _unpublish(self, page: int) -> None:
        """Let nobody find a page any more, because it is about to be written."""
        if digest := self._digest_of.pop(page, None):
            del self._by_digest[digest]

    def _refer(self, page: int) -> None:
        self._cached.pop(page, None)
        self.references[page] += 1
        self.peak = max(self.peak, self.used)

    def _drop(self, page: int) -> None:
        self.references[page] -= 1
        if self.references[page] == 0:
            if page in self._digest_of:
                self._cached[page] = None
            else:
                self._give_back(page)

    def _check_open(self, table: BlockTable) -> None:
        if table.closed:
            raise ValueError("this block table was released before")
