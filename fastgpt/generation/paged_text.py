"""Runs one text at a time over pages, so that on a GPU each of its tokens is the replay of a CUDA graph."""

from collections.abc import Sequence

import torch

from fastgpt.config.generation import SamplingParams
from fastgpt.errors import UsageError
from fastgpt.generation.plan import Chunk, Plan, Sample
from fastgpt.generation.runner import Runner
from fastgpt.model.gpt import GPT
from fastgpt.model.kv_cache import PagedCache, page_bytes
from fastgpt.model.pages import BlockTable
from fastgpt.system.device import free_memory

PAGE_SIZE = 16


class PagedText:
    """The logits after a growing text, and then after another one. Its pages hold one context.

    No other sequence uses these pages, so they are reserved once.

    Raises:
        UsageError: the pages are larger than the free memory.
    """

    def __init__(self, model: GPT):
        config, device, dtype = model.config, model.device, model.dtype
        self.block_size, pages = config.block_size, -(-config.block_size // PAGE_SIZE)
        need, free = pages * page_bytes(config, PAGE_SIZE, dtype), free_memory(device)
        if need > free:
            raise UsageError(
                f"a context of {config.block_size:,} tokens takes {need:,} bytes of cache, and {free:,} are free; free "
                "memory, or use an engine with a smaller kv_memory"
            )
        self.cache = PagedCache(config, pages, PAGE_SIZE, device=device, dtype=dtype, prefix_cache=False)
        self.runner = Runner(model, self.cache, max_batch=1)
        self.table = BlockTable()
        self.sample = Sample((0, 0), [], 0, SamplingParams(), slot=0, table=self.table)

    def begin(self) -> None:
        """Forget the previous text."""
        self.table.length = 0

    def __call__(self, text: Sequence[int]) -> torch.Tensor:
        """The logits (1, V) of what follows the text: that of the last call, continued by one or more tokens.

        Of a text longer than block_size the last block_size tokens count, and all of them are computed again.
        """
        window = text[-self.block_size :]
        if len(window) < len(text):
            self.begin()
        first, tokens = self.table.length, list(window[self.table.length :])
        self.cache.reserve(self.table, len(window))
        self.table.length = len(window)
        chunk = Chunk(self.sample, first, tokens, [], False, 1)
        return self.runner(Plan([chunk], int(len(tokens) == 1), 1, len(tokens), changed=[self.sample]))
