"""Chooses device and arithmetic, and measures the device: its peak FLOP/s and its memory."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from fastgpt.config.choices import DTYPES
from fastgpt.errors import UsageError, nearest, shown
from fastgpt.system import torch_private
from fastgpt.system.units import counted

NO_LIMIT = 1 << 60  # version 1 of cgroups writes a number above this
# Dense 16-bit tensor-core peaks in FLOP/s, by the name that the driver gives; from NVIDIA's data sheets.
PEAK_FLOPS = {
    "NVIDIA B200": 2250e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA GeForce RTX 4090": 165e12,
}


def resolve_device(name: str) -> torch.device:
    """The device that `device` names; auto takes CUDA, else mps, else the CPU.

    Raises:
        UsageError: an unknown name, or a device that this machine does not have.
    """
    if name == "auto":
        cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
        return torch.device("cuda" if cuda else "mps" if mps else "cpu")
    kind, _, index = name.partition(":")
    numbered = kind == "cuda" and re.fullmatch("[0-9]{1,9}", index)
    if kind not in ("cpu", "cuda", "mps") or (name != kind and not numbered):
        meant = nearest(name, ("auto", "cpu", "mps", "cuda"))
        raise UsageError(f"`device` {shown(name)} is not one of auto, cpu, mps, cuda, cuda:N{meant}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"`device` {name}: PyTorch finds no CUDA GPU here; use `device` auto or cpu")
    if kind == "cuda" and index and int(index) >= torch.cuda.device_count():
        last = torch.cuda.device_count() - 1
        raise UsageError(f"`device` {name}: the last GPU here is cuda:{last}")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise UsageError("`device` mps: PyTorch finds no Apple GPU here; use `device` auto or cpu")
    return torch.device(kind, int(index)) if kind == "cuda" and index else torch.device(kind)


def resolve_dtype(name: str, device: torch.device, *, interpreted: bool = False) -> torch.dtype:
    """The arithmetic that `dtype` names; auto takes bfloat16 where the chip multiplies it fast, else float32.

    In Triton's interpreter (`interpreted`), which computes bfloat16 wrongly, auto is float32.

    Raises:
        UsageError: an unknown name, or bfloat16 in the interpreter.
    """
    if name not in DTYPES:
        raise UsageError(f"`dtype` {name!r} is not one of {', '.join(DTYPES)}")
    if interpreted and name == "bfloat16":
        raise UsageError("`dtype` bfloat16: Triton's interpreter computes it wrongly; use `dtype` float32")
    if interpreted and name == "auto":
        return torch.float32
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and cpu_has_bfloat16()
    return torch.bfloat16 if fast else torch.float32


def resolve_weights_dtype(name: str, device: torch.device, *, interpreted: bool = False) -> torch.dtype:
    """The dtype of the weights for generation: as `resolve_dtype`, but auto is float32 on a CPU.

    With one row at a time, speed there is limited by memory, and float32 gives the same tokens with and without a
    cache.
    """
    return resolve_dtype(
        "float32" if name == "auto" and device.type == "cpu" else name, device, interpreted=interpreted
    )


def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (AVX512-BF16 or AMX)."""
    return torch_private.cpu_multiplies_bfloat16()


def matrix_dtype(device: torch.device) -> torch.dtype:
    """The dtype in which batches of small products are fast and 16 bits are enough.

    AVX512-BF16 does not count: there PyTorch's batched products of bfloat16 take twice as long as those of float32.
    """
    if device.type == "cuda":
        return resolve_dtype("auto", device)
    tiles = device.type == "cpu" and torch_private.cpu_has_bfloat16_tiles()
    return torch.bfloat16 if tiles else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """A context in which matrix products are in `dtype`; weights, the residual stream and the loss stay float32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def describe(device: torch.device) -> str:
    """A phrase for messages: the GPU's name, or the number of CPU threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {counted(torch.get_num_threads(), 'thread')}" if device.type == "cpu" else "Apple GPU"


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """The chip's dense peak in FLOP/s; None if it is unknown."""
    if device.type != "cuda" or dtype == torch.float32:
        return None
    return PEAK_FLOPS.get(torch.cuda.get_device_name(device))


def peak_memory(device: torch.device) -> int | None:
    """The most memory used so far, in bytes: allocated on the GPU, resident on a CPU; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type != "cpu" or sys.platform == "win32":
        return None
    import resource

    # Linux counts in KiB, macOS in bytes.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def free_memory(device: torch.device) -> int:
    """Bytes that this process can still allocate: on the GPU, or on the machine within the limit of its cgroup.

    Memory that PyTorch's allocator keeps for later counts as free, and so do the system's copies of files. The meta
    device needs none.
    """
    if device.type == "meta":
        return sys.maxsize
    if device.type == "cuda":
        (free, total), used = torch.cuda.mem_get_info(device), torch.cuda.memory_allocated(device)
        allowed = int(total * torch.cuda.get_per_process_memory_fraction(device.index))
        return max(0, min(free + torch.cuda.memory_reserved(device), allowed) - used)
    if device.type == "mps":
        return max(0, torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory())
    return min(_machine_memory(), _cgroup_memory())


def total_memory(device: torch.device) -> int | None:
    """Bytes of the GPU's memory, or of the machine's; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # Windows has no sysconf
        return None


def memory_limit() -> int | None:
    """The bytes that this process's container may use; None without a limit."""
    return next((limit for limit, _ in _cgroup_limits()), None)


def parse_memory(text: str, device: torch.device, setting: str = "kv_memory") -> int:
    """Bytes from "2GiB", "500 MB", "1000000" or "30%" of the free memory; `setting` is for messages.

    Raises:
        UsageError: none of these.
    """
    match = re.fullmatch(r"(\d{1,18}(?:\.\d+)?)\s*((?:[kmgt]i?)?b|%)?", text.strip().lower())
    if match is None:
        raise UsageError(f"`{setting}` {shown(text)} is not an amount of memory such as 2GiB, 500MB or 30%")
    number, unit = float(match[1]), match[2] or "b"
    if unit == "%":
        if number > 100:
            raise UsageError(f"`{setting}` {text!r} is more than all of the free memory; pass at most 100%")
        return int(number / 100 * free_memory(device))
    return int(number * (1024 if "i" in unit else 1000) ** "bkmgt".index(unit[0]))


def _machine_memory() -> int:
    """Linux's available memory; elsewhere half of the machine's memory, or 4 GiB if that is unknown."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        sizes = dict(line.split(":") for line in meminfo.read_text().splitlines())
        return int(sizes["MemAvailable"].split()[0]) * 1024
    total = total_memory(torch.device("cpu"))
    return 4 << 30 if total is None else total // 2


def _cgroup_memory() -> int:
    """The bytes that a container's limit leaves; a very large number without a limit."""
    return next((left for _, left in _cgroup_limits()), sys.maxsize)


def _cgroup_limits() -> Iterator[tuple[int, int]]:
    """The limit of this process's container and the bytes that it leaves, from cgroup v2, else v1."""
    v2 = Path("/sys/fs/cgroup")
    for folder, limit, used, files in (
        (v2, "memory.max", "memory.current", "inactive_file"),
        (v2 / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            most = int((folder / limit).read_text())
            left = most - int((folder / used).read_text())
        except (OSError, ValueError):  # no such file, or "max"
            continue
        if most < NO_LIMIT:
            yield most, max(0, left + _count(folder / "memory.stat", files))


def _count(path: Path, name: str) -> int:
    """The number after a name, in a file with a name and a number in each line; 0 if there is none."""
    try:
        numbers = dict(line.split() for line in path.read_text().splitlines())
        return int(numbers.get(name, 0))
    except (OSError, ValueError):
        return 0


def seed(number: int, device: torch.device) -> None:
    """Seed PyTorch's generators of the host and of the device, with a number below 2**64.

    `torch.manual_seed` seeds every kind of device, and formats a stack trace for each that is not in use: up to 1 ms.
    """
    torch.default_generator.manual_seed(number)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(number)
    elif device.type == "mps":
        torch.mps.manual_seed(number)


@contextmanager
def ordered_sums() -> Iterator[None]:
    """Let compiled code add in a fixed order, so that its sums have the same bits in every run.

    Otherwise PyTorch's compiler adds the gradients of an embedding by atomic operations on a CPU, in whatever order the
    threads come. Code that is compiled within the block is for calls within it.
    """
    settings: Any = torch.utils.deterministic
    before = torch.get_deterministic_debug_mode(), settings.fill_uninitialized_memory
    settings.fill_uninitialized_memory = False  # nothing reads it
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before[0])
        settings.fill_uninitialized_memory = before[1]


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A host tensor on the device. The host does not wait for the copy."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)  # pinned memory stays until it is copied
    return tensor.to(device)
