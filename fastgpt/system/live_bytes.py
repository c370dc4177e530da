"""The memory of tensors, operation by operation, and what each tensor is for.

    with LiveBytes(device) as memory:
        memory.hold(model.parameters(), "weights")
        memory.phase, memory.label = "forward", "activations"
        ...
    memory.peak, memory.series, memory.peaks["forward"]

On CUDA the numbers are the allocator's own. On a CPU, where PyTorch keeps no count, the storages of all results are
added up while anything refers to them: what an operation allocates and frees within itself is not seen there. Fake
tensors (`fastgpt.system.torch_private.fake_tensors`), which take no memory, are added up in the same way on any device.
"""

import weakref
from collections import Counter
from collections.abc import Hashable, Iterable
from typing import Any, NamedTuple

import torch

from fastgpt.system.torch_private import OperationsMode, storage_address, tensors_in

Point = tuple[int, int]  # event, bytes


class Peak(NamedTuple):
    """The most bytes of a phase, and those of each label then; on CUDA the allocator tells no labels."""

    bytes: int
    held: Counter[Hashable]


class LiveBytes(OperationsMode):
    """Counts while it is entered.

    Attributes:
        phase: what the step is doing; set it as the step goes on.
        label: what the tensors are for that are made from now on.
        live: bytes of tensors now, beginning at 0 on a CPU (see `hold`) and at what is allocated on CUDA.
        held: the same by label.
        peak: the most so far.
        peaks: of each phase.
        series: (event, live bytes) after each operation.
        phases: (name, its first event), in order.

    Args:
        fake: the tensors are fake ones.
    """

    def __init__(self, device: torch.device, *, fake: bool = False):
        super().__init__()
        self.device = device
        self.allocator = device.type == "cuda" and not fake
        self.label: Hashable = None
        self.held: Counter[Hashable] = Counter()
        self.peaks: dict[Hashable, Peak] = {}
        self.series: list[Point] = []
        self.phases: list[tuple[Any, int]] = []
        self._known: dict[int, tuple[weakref.ref, int, Hashable]] = {}  # storages with their sizes and labels
        self._counted = 0
        self.peak = self.live

    @property
    def live(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.allocator else self._counted

    @property
    def phase(self) -> Any:
        return self.phases[-1][0] if self.phases else None

    @phase.setter
    def phase(self, name: Hashable) -> None:
        self.phases.append((name, len(self.series)))
        if self.allocator:
            torch.cuda.reset_peak_memory_stats(self.device)

    def __enter__(self) -> "LiveBytes":
        if self.allocator:
            torch.cuda.reset_peak_memory_stats(self.device)
        return super().__enter__()

    def hold(self, tensors: Iterable[torch.Tensor], label: Hashable = None) -> None:
        """Count tensors that were there before."""
        for t in tensors:
            self._count(t, label)
            self.relabel(t, label)
        self.peak = max(self.peak, self.live)

    def relabel(self, t: torch.Tensor, label: Hashable) -> None:
        """Count a tensor's storage for another purpose."""
        address = storage_address(t.untyped_storage())
        if address in self._known:
            reference, size, before = self._known[address]
            self._known[address] = reference, size, label
            self.held[before] -= size
            self.held[label] += size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in tensors_in(result):
            self._count(t, self.label)
        self.series.append((len(self.series), self.live))
        most = torch.cuda.max_memory_allocated(self.device) if self.allocator else self.live
        self.peak = max(self.peak, most)
        if self.phase not in self.peaks or most > self.peaks[self.phase].bytes:
            self.peaks[self.phase] = Peak(most, self.held.copy())
        return result

    def _count(self, t: torch.Tensor, label: Hashable) -> None:
        """Add a tensor's storage until nothing refers to it any more; views share one."""
        if self.allocator or t.device.type != self.device.type:
            return
        storage = t.untyped_storage()
        address, size = storage_address(storage), storage.nbytes()
        if address in self._known:
            return

        def forget(_: weakref.ref) -> None:
            label = self._known.pop(address)[2]
            self._counted -= size
            self.held[label] -= size

        self._known[address] = weakref.ref(storage, forget), size, label
        self._counted += size
        self.held[label] += size
