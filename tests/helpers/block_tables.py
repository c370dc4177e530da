"""The state of a block allocator, and every use of a table that a released one refuses."""

import copy
import dataclasses
from collections.abc import Callable

from fastgpt.model.pages import BlockAllocator, BlockTable


def state(allocator: BlockAllocator, *tables: BlockTable) -> list[dict]:
    return copy.deepcopy([vars(allocator), *map(dataclasses.asdict, tables)])


def uses(allocator: BlockAllocator, table: BlockTable) -> list[Callable[[], object]]:
    return [
        lambda: allocator.release(table),
        lambda: allocator.reserve(table, 1),
        lambda: allocator.fork(table),
        lambda: allocator.publish(table, [0] * 8),
        lambda: allocator.truncate(table, 0),
    ]
