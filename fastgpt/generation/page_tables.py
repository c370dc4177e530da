"""Keeps the block tables of running sequences on the device."""

from collections.abc import Iterable

import numpy as np
import torch

from fastgpt.generation.plan import Sample
from fastgpt.model.pages import BlockTable
from fastgpt.system.device import send


class PageTables:
    """A row of pages for each slot of the scheduler, int32 (slots, M).

    A sequence keeps its row as long as it runs. So a forward pass sends only entries that have changed: all pages of a
    new sequence, a page that was added, the copy of a shared page. Each block table counts how many of its entries were
    sent, so it may belong to one slot of one `PageTables` only.

    Attributes:
        pages: the rows on the device; entries behind a sequence's pages have no meaning.
        host: the same on the host.
    """

    def __init__(self, slots: int, M: int, device: torch.device):
        self.pages = torch.zeros(slots, M, dtype=torch.int32, device=device)
        self.host = np.zeros((slots, M), dtype=np.int32)
        self._entries = self.host.reshape(-1)

    def update(self, samples: Iterable[Sample]) -> None:
        """Bring the rows of these sequences up to date."""
        places: list[int] = []
        pages: list[int] = []
        changed: list[BlockTable] = []
        for sample in samples:
            table = sample.table
            assert table is not None
            first, last = table.copied, len(table.pages)
            if first < last:
                row = sample.slot * self.host.shape[1]
                places += range(row + first, row + last)
                pages += table.pages[first:]
                changed.append(table)
        if not changed:
            return
        entries = np.array([places, pages])
        self._entries[entries[0]] = entries[1]
        self.launch(entries)
        for table in changed:  # last, because sending may fail
            table.copied = len(table.pages)

    def launch(self, entries: np.ndarray) -> None:
        """Write pages to their places on the device: (2, n), places and pages."""
        places, pages = send(torch.from_numpy(entries), self.pages.device)
        self.pages.view(-1).index_copy_(0, places, pages.int())
