"""Measures the limits of this machine: memory bandwidth and matrix products, and the limit they set to a call.

measure(device) -> Ceilings       a few seconds
ceilings.limit(bytes=..., flops=..., arithmetic=torch.bfloat16) -> Limit
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from fastgpt.ops.gpu_clock import GpuClock
from fastgpt.system.device import free_memory, synchronize

ROUNDS = 3
SHORTEST_SECONDS = 0.05  # of all calls together: a machine that is shared may halt for milliseconds
PRODUCT_SECONDS = 0.03  # a matrix product that takes longer is the last to be timed
SIDES = {"cpu": (256, 512, 1024, 2048), "mps": (1024, 2048, 4096), "cuda": (2048, 4096, 8192)}
BUFFER_BYTES = {"cuda": 4 << 30}  # which a GPU goes over in a millisecond
BUFFER_BYTES_ELSEWHERE = 256 << 20
CACHE_UNKNOWN = 32 << 20  # bytes assumed where the system does not say how large its caches are


@dataclass(frozen=True)
class Limit:
    """The least time that a call can take, and which of the two sets it."""

    by: Literal["memory", "arithmetic"]
    seconds: float


@dataclass(frozen=True)
class Ceilings:
    """The measured ceilings of one machine.

    Attributes:
        copy_bandwidth: bytes a second, read and written ones together, of copying a buffer far larger than the caches.
        read_bandwidth: bytes a second of reading such a buffer.
        matmul: operations a second (2 n^3 of an n x n product) by the arithmetic's name: "float32", "bfloat16", ...
    """

    copy_bandwidth: float
    read_bandwidth: float
    matmul: dict[str, float]

    @property
    def bandwidth(self) -> float:
        """The faster of copying and reading, which a call's bytes are held against: no mix is known to be faster."""
        return max(self.copy_bandwidth, self.read_bandwidth)

    def limit(self, *, bytes: float = 0, flops: float = 0, arithmetic: torch.dtype | str = torch.float32) -> Limit:
        """The limit of a call that moves `bytes` and computes `flops` in this arithmetic.

        Raises:
            ValueError: neither bytes nor operations, or an arithmetic that was not measured.
        """
        if not bytes and not flops:
            raise ValueError("a call that moves and computes nothing has no limit; count its bytes or operations")
        name = dtype_name(arithmetic)
        if flops and name not in self.matmul:
            raise ValueError(f"matrix products in {name} were not measured, only in {', '.join(self.matmul)}")
        moving = bytes / self.bandwidth
        computing = flops / self.matmul[name] if flops else 0.0
        return Limit("arithmetic", computing) if computing > moving else Limit("memory", moving)


def dtype_name(dtype: torch.dtype | str) -> str:
    """ "bfloat16" for torch.bfloat16; a name stays one."""
    return str(dtype).removeprefix("torch.")


def measure(device: torch.device) -> Ceilings:
    """The ceilings of a device: each is the best of several rounds, as noise only ever slows down."""
    size = buffer_bytes(device)
    buffer = torch.rand(size // 4, device=device)
    source, target = buffer.chunk(2)
    reading = min(best_seconds(read, device) for read in (buffer.sum, partial(buffer.dot, buffer)))
    copying = best_seconds(partial(target.copy_, source), device)
    del buffer, source, target
    names = ["float32", "bfloat16", "float16"] + ["tf32"] * (device.type == "cuda")
    return Ceilings(size / copying, size / reading, {name: matmul_rate(device, name) for name in names})


def matmul_rate(device: torch.device, arithmetic: str) -> float:
    """Operations a second of a square product: the most of growing sides, up to one that takes PRODUCT_SECONDS."""
    dtype = torch.float32 if arithmetic == "tf32" else getattr(torch, arithmetic)
    with float32_products("high" if arithmetic == "tf32" else "highest"):
        rate, seconds = 0.0, 0.0
        for n in SIDES[device.type]:
            # The time that was measured, not one that it foretells: on a busy machine a small product waits for a core.
            if seconds > PRODUCT_SECONDS:
                break
            a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
            out = torch.empty_like(a)
            seconds = best_seconds(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), device)
            rate = max(rate, 2 * n**3 / seconds)
        return rate


@contextmanager
def float32_products(precision: Literal["highest", "high"]) -> Iterator[None]:
    """Within the block float32 matrices are multiplied as such, or ("high", on CUDA) in TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def best_seconds(call: Callable[[], object], device: torch.device) -> float:
    """The least time of a call, after one to warm up: of a few calls, and of short ones of many.

    On a GPU by its own events, as the clock would count the launch and the wait for the end too.
    """
    clock = GpuClock().seconds if device.type == "cuda" else partial(_wall_seconds, device=device)
    times: list[float] = []
    while len(times) < 1 + ROUNDS or sum(times) < SHORTEST_SECONDS:
        times.append(clock(call))
    return min(times[1:])


def _wall_seconds(call: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    began = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - began


def buffer_bytes(device: torch.device) -> int:
    """Twice the caches and at least BUFFER_BYTES, but at most an eighth of the memory that is free."""
    wanted = max(2 * cache_bytes(device), BUFFER_BYTES.get(device.type, BUFFER_BYTES_ELSEWHERE))
    return min(wanted, free_memory(device) // 8) // 4096 * 4096


def cache_bytes(device: torch.device) -> int:
    """The size of the last level of cache."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")  # "480K" each
    units = {"K": 1 << 10, "M": 1 << 20}
    return max(
        (int(text[:-1]) * units[text[-1]] for text in (size.read_text().strip() for size in sizes)),
        default=CACHE_UNKNOWN,
    )
