"""Allocates the pages of a paged cache: reference counts, copy-on-write, and reuse of shared prefixes.

This module keeps the books, without a tensor; `kv_cache.PagedCache` holds the pages themselves. Paging and sharing are
those of Kwon et al. (2023), "Efficient Memory Management for Large Language Model Serving with PagedAttention",
section 4. A page is in one of three states: used (some table refers to it), cached (no table does, but it holds the
end of a known prefix and may be used again) or empty. Cached and empty pages together are free.
"""

import struct
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256


class OutOfPages(Exception):
    """Too few pages are free. Nothing has changed."""


@dataclass(eq=False, slots=True)
class BlockTable:
    """A sequence's pages in order; position t lies in `pages[t // P]`, at place t % P.

    Attributes:
        length: positions that are written, or will be by the next forward pass.
        digests: for each full page that other sequences can find, the hash of all tokens up to its end.
        closed: the table was released, and must not be used again.
        copied: the number of first entries of `pages` that a `PageTables` has copied.
    """

    pages: list[int] = field(default_factory=list)
    length: int = 0
    digests: list[bytes] = field(default_factory=list)
    closed: bool = False
    copied: int = 0


class BlockAllocator:
    """Allocates `pages` pages of `page_size` positions each.

    Full pages are found by a chain of SHA-256 hashes, each over the hash before it and the page's tokens. So equal
    hashes mean equal prefixes, and not only equal pages. The least recently used of the cached pages are evicted first.

    Attributes:
        peak: the most pages that were in use at once.
    """

    def __init__(self, pages: int, page_size: int, *, row: int = 1, prefix_cache: bool = True):
        """`row`: the most pages of a sequence; where possible, they are neighbours."""
        if pages < 1 or page_size < 1:
            raise ValueError(f"a cache needs at least 1 page of 1 position, not {pages} of {page_size}")
        self.pages, self.page_size, self.prefix_cache = pages, page_size, prefix_cache
        self.references = [0] * pages
        self.peak = 0
        self._empty: OrderedDict[int, None] = OrderedDict.fromkeys(reversed(range(pages)))  # the last one goes first
        # For each row of pages, how many are not empty; and the rows whose pages are all empty, the last one first.
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
        """Pages that can be allocated: the empty ones, and the cached ones, which are then evicted."""
        return len(self._empty) + len(self._cached)

    @property
    def used(self) -> int:
        """Pages that some table refers to."""
        return self.pages - self.free

    def pages_for(self, length: int) -> int:
        """The number of pages for this many positions."""
        return -(-length // self.page_size)

    def open(self, tokens: Sequence[int] = ()) -> BlockTable:
        """A table for a new sequence, which begins with the cached pages of these tokens.

        Only full pages are shared. The last token is never shared: it must be computed to predict the next.
        """
        table = BlockTable()
        if self.prefix_cache:
            digest = b""
            for i in range((len(tokens) - 1) // self.page_size):
                digest = self._digest(digest, tokens, i)
                page = self._by_digest.get(digest)
                if page is None:
                    break
                self._add_reference(page)
                table.pages.append(page)
                table.digests.append(digest)
        table.length = len(table.pages) * self.page_size
        return table

    def reserve(self, table: BlockTable, length: int) -> list[tuple[int, int]]:
        """Give this table alone the pages of the positions `table.length` to `length` - 1, so that it can write them.

        Returns:
            Pairs of pages (source, target) that the caller must copy before it writes (copy-on-write).

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
            self._drop_reference(source)
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
        """A second table over the same positions. The first to write to a shared page gets a copy of it."""
        self._check_open(table)
        pages = table.pages[: self.pages_for(table.length)]
        for page in pages:
            self._add_reference(page)
        return BlockTable(pages, table.length, list(table.digests))

    def publish(self, table: BlockTable, tokens: Sequence[int]) -> None:
        """Let other sequences find the full pages of this one; `tokens`: all of its tokens, from the first on."""
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
            ValueError: a page that other sequences can find would be written again.
        """
        self._check_open(table)
        if not len(table.digests) * self.page_size <= length <= table.length:
            raise ValueError(f"a table of {table.length} positions cannot be cut to {length}")
        table.length = length

    def release(self, table: BlockTable) -> None:
        """Give up a sequence's pages. Raises ValueError for a table that was released before."""
        self._check_open(table)
        table.closed = True
        for page in reversed(table.pages):  # the end of a prefix is evicted first: it is useless without its beginning
            self._drop_reference(page)
        table.pages.clear()

    def forget(self) -> None:
        """Empty every cached page, and forget the prefixes of the used ones."""
        for page in self._cached:
            self._free_page(page)
        self._cached.clear()
        self._by_digest.clear()
        self._digest_of.clear()

    def _digest(self, before: bytes, tokens: Sequence[int], page: int) -> bytes:
        """The hash of the prefix that ends with this page; `before`: the hash of the prefix before this page."""
        first = page * self.page_size
        return sha256(before + self._pack(*tokens[first : first + self.page_size])).digest()

    def _take(self, before: int | None) -> int:
        """Allocate a page: the one after `before` if it is empty, so that a sequence's pages are neighbours.

        A first page begins the empty row that was freed last, whose memory is warm.
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

    def _free_page(self, page: int) -> None:
        """Make a page empty."""
        self._empty[page] = None
        if (row := page // self._row) < len(self._taken):
            self._taken[row] -= 1
            if not self._taken[row]:
                self._empty_rows[row] = None

    def _evict(self) -> None:
        """Empty the least recently used cached pages: several in a large pool, as they are often neighbours."""
        count = min(self._evicted_at_once, len(self._cached))
        for page in sorted((self._cached.popitem(last=False)[0] for _ in range(count)), reverse=True):
            self._unpublish(page)
            self._free_page(page)

    def _unpublish(self, page: int) -> None:
        """Forget the prefix that a page holds, because the page is about to be written."""
        if digest := self._digest_of.pop(page, None):
            del self._by_digest[digest]

    def _add_reference(self, page: int) -> None:
        self._cached.pop(page, None)
        self.references[page] += 1
        self.peak = max(self.peak, self.used)

    def _drop_reference(self, page: int) -> None:
        self.references[page] -= 1
        if self.references[page] == 0:
            if page in self._digest_of:
                self._cached[page] = None
            else:
                self._free_page(page)

    def _check_open(self, table: BlockTable) -> None:
        if table.closed:
            raise ValueError("this block table was released before")
