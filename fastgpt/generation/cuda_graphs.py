"""Captures calls as CUDA graphs that share their memory."""

import contextlib
from collections.abc import Callable

import torch

from fastgpt.system.torch_private import leave_pool

WARM_UP = 3  # runs before a capture: they compile kernels and let libraries allocate


class GraphPool:
    """Captures calls of which only one runs at a time, and whose result is read before the next one runs.

    The graphs share one memory pool and one stream. A shared pool is not enough: PyTorch's allocator gives a free block
    of a pool only to the stream that it was allocated for (`get_free_block` in CUDACachingAllocator.cpp). So graphs
    that were captured on different streams would share no memory.
    """

    def __init__(self, device: torch.device):
        self.device = device
        with torch.cuda.device(device):
            self.stream = torch.cuda.Stream()
        self.pool = torch.cuda.graph_pool_handle()
        self._abandoned: list[torch.cuda.CUDAGraph] = []

    def capture(self, run: Callable[[], torch.Tensor]) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        """A graph of what `run` launches, and its result, which each replay overwrites.

        `run` is first called a few times to warm up. It must never wait for the device.

        Raises:
            whatever `run` raises, also out of memory inside the capture: the current stream is as before then, and
            the allocator has left the pool. This pool must not capture again.
        """
        with torch.cuda.device(self.device):
            current = torch.cuda.current_stream()
            self.stream.wait_stream(current)
            with torch.cuda.stream(self.stream):  # torch.cuda.graph does not put it back where capture_end fails
                for _ in range(WARM_UP):
                    run()
                torch.cuda.synchronize()
                torch.cuda.empty_cache()  # the pool takes memory from the driver only
                graph = torch.cuda.CUDAGraph()
                # Other threads may allocate meanwhile.
                graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
                try:
                    result = run()
                    graph.capture_end()
                except BaseException:
                    self._abandon(graph)
                    raise
            current.wait_stream(self.stream)
        return graph, result

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """End a capture that failed, without raising an error that would hide the first one."""
        with contextlib.suppress(RuntimeError):
            graph.capture_end()
        graph.reset()
        leave_pool(self.pool)
        self._abandoned.append(graph)  # the allocator of pinned memory may still ask it whether it captures
