"""The memory of tensors, operation by operation, and the picture of it.

    with LiveBytes(device) as memory:
        memory.hold(model.parameters())
        memory.phase = "forward"
        ...
    memory.peak, memory.series

On CUDA the numbers are the allocator's own. On a CPU, where PyTorch keeps no count, the storages of all results are
added up while anything refers to them: what an operation allocates and frees within itself is not seen there.
"""

import itertools
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Point = tuple[int, int]  # event, bytes
MIB = 1 << 20


class LiveBytes(TorchDispatchMode):
    """Counts while it is entered.

    Attributes:
        phase: what the step is doing, for the series; set it as the step goes on.
        live: bytes of tensors now, beginning at 0 on a CPU (see `hold`) and at what is allocated on CUDA.
        peak: the most so far.
        series: (event, live bytes) after each operation.
        phases: (name, its first event), in order.
    """

    def __init__(self, device: torch.device):
        super().__init__()
        self.device = device
        self.series: list[Point] = []
        self.phases: list[tuple[str, int]] = []
        self._known: dict[int, weakref.ref] = {}
        self._counted = 0
        self.peak = self.live

    @property
    def live(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else self._counted

    @property
    def phase(self) -> str | None:
        return self.phases[-1][0] if self.phases else None

    @phase.setter
    def phase(self, name: str) -> None:
        self.phases.append((name, len(self.series)))

    def __enter__(self) -> "LiveBytes":
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        return super().__enter__()

    def hold(self, tensors: Iterable[torch.Tensor]) -> None:
        """Count tensors that were there before."""
        for t in tensors:
            self._count(t)
        self.peak = max(self.peak, self.live)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor):
                self._count(t)
        self.series.append((len(self.series), self.live))
        most = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else self.live
        self.peak = max(self.peak, most)
        return result

    def _count(self, t: torch.Tensor) -> None:
        """Add a tensor's storage until nothing refers to it any more; views share one."""
        if self.device.type == "cuda" or t.device.type != "cpu":
            return
        storage = t.untyped_storage()
        key, size = storage._cdata, storage.nbytes()  # its address in C++
        if key in self._known:
            return

        def forget(_: weakref.ref) -> None:
            del self._known[key]
            self._counted -= size

        self._known[key] = weakref.ref(storage, forget)
        self._counted += size


def thinned(series: Sequence[Point], most: int = 400) -> list[Point]:
    """At most so many points, each the highest of its stretch, so that no peak is lost."""
    if len(series) <= most:
        return list(series)
    bounds = [len(series) * i // most for i in range(most + 1)]
    return [max(series[begin:end], key=lambda point: point[1]) for begin, end in itertools.pairwise(bounds)]


def draw_allocation(allocation: dict[str, list[Point]], phases: dict[str, list[tuple[str, int]]], path: Path) -> None:
    """Write a PNG: for each backend, live bytes along one training step, its phases shaded."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 2.6 * len(allocation)), dpi=120, layout="constrained")
    rows = figure.subplots(len(allocation), squeeze=False, sharey=True)[:, 0]
    for axes, (backend, points) in zip(rows, allocation.items(), strict=True):
        events, sizes = zip(*points, strict=True)
        axes.fill_between(events, [size / MIB for size in sizes], step="post", color="#1f5fa8", alpha=0.8)
        starts = [*phases[backend], ("", events[-1])]
        for shade, ((name, begin), (_, end)) in enumerate(itertools.pairwise(starts)):
            axes.axvspan(begin, end, color="black", alpha=0.06 * (shade % 2), linewidth=0, zorder=0)
            axes.text((begin + end) / 2, 1.0, name, ha="center", va="bottom", transform=axes.get_xaxis_transform())
        axes.set_xlim(0, events[-1])
        axes.set_ylim(bottom=0)
        axes.set_ylabel(f"{backend} (MiB)")
        axes.grid(alpha=0.25)
    rows[0].set_title("Memory over one training step", pad=18)
    rows[-1].set_xlabel("operation")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
