"""Tensors of a file by name, each read when it is asked for."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Self

import torch


class LazyTensors(Mapping[str, torch.Tensor]):
    """Reads a tensor at each look-up and keeps none, so that one at a time is in memory.

    Attributes:
        shapes: of each tensor, by name; known without reading any.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], torch.Tensor]):
        self.shapes, self._read = dict(shapes), read

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor]) -> Self:
        """Those of a mapping, which is asked for each."""
        known = tensors.shapes if isinstance(tensors, LazyTensors) else {n: tuple(t.shape) for n, t in tensors.items()}
        return cls(known, tensors.__getitem__)

    def changed(self, change: Callable[[str, torch.Tensor], torch.Tensor]) -> Self:
        """The same tensors, each changed by a function of its name and itself that keeps its shape."""
        return type(self)(self.shapes, lambda name: change(name, self[name]))

    def only(self, names: Iterable[str]) -> Self:
        """The tensors of these names, in their order."""
        return type(self)({name: self.shapes[name] for name in names}, self._read)

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self.shapes:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __contains__(self, name: object) -> bool:
        return name in self.shapes  # Mapping's own would read it
