"""The bytes that a model holds at one moment, by kind and by layer.

An estimate is counted with fake tensors: the work itself runs on a model of a few layers, and nothing is computed. All
layers but the first and the last are alike, so a deep model's bytes are those of a shallow one, with so many more of
the bytes of a layer in its middle.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from fastgpt.config.model import ModelConfig
from fastgpt.model.gpt import GPT
from fastgpt.system.live_bytes import LiveBytes

SHALLOW = 5  # layers
MIDDLE = 3  # the layer that stands for all that are left out: it is not the last, nor does the second read its outputs
EMBEDDING, HEAD = "embedding", "head"
BLOCKS = "blocks"  # all of them alike: what is held for every block at once
TEMPORARY = "temporary"


class Owner(NamedTuple):
    """The label of a tensor: its kind, and its place: a layer, counted from 0, `EMBEDDING`, `HEAD` or `BLOCKS`."""

    kind: str
    part: int | str = HEAD


@dataclass(frozen=True)
class Layers:
    """Bytes of one kind.

    Attributes:
        blocks: (number of layers, bytes of each), in order; neighbours that hold the same are one entry.
        head: of all that comes after the last block, or belongs to no layer.
    """

    embedding: int = 0
    blocks: tuple[tuple[int, int], ...] = ()
    head: int = 0

    @property
    def total(self) -> int:
        return self.embedding + sum(count * size for count, size in self.blocks) + self.head


Holding = Mapping[str, Layers]  # by kind


@dataclass(frozen=True)
class Footprint:
    """Bytes of some work in phases.

    Attributes:
        peaks: of each phase, what is held when it holds most. Empty where only the total is known, as on a GPU.
        bytes: of each phase, their sum.
    """

    peaks: Mapping[str, Holding]
    bytes: Mapping[str, int]

    @property
    def phase(self) -> str:
        """The one with the peak."""
        return max(self.bytes, key=self.bytes.__getitem__)

    @property
    def peak(self) -> int:
        return self.bytes[self.phase]


def shallow(config: ModelConfig) -> ModelConfig:
    """The model with at most `SHALLOW` layers, whose bytes tell those of all."""
    return dataclasses.replace(config, n_layer=min(config.n_layer, SHALLOW))


def holding(held: Mapping[Owner, int], counted: int, layers: int) -> Holding:
    """The bytes of a model of so many layers, from those of one with the layers that were counted."""
    kinds: dict[str, dict[int | str, int]] = {}
    for owner, size in held.items():
        if size:
            kinds.setdefault(owner.kind, {})[owner.part] = size
    return {kind: _layers(parts, counted, layers) for kind, parts in kinds.items()}


def _layers(parts: Mapping[int | str, int], counted: int, layers: int) -> Layers:
    blocks: list[tuple[int, int]] = []
    for layer in range(counted):
        times = 1 + layers - counted if layer == MIDDLE else 1
        size = parts.get(layer, 0) + parts.get(BLOCKS, 0) // counted
        before = blocks.pop()[0] if blocks and blocks[-1][1] == size else 0
        blocks.append((before + times, size))
    return Layers(parts.get(EMBEDDING, 0), tuple(blocks), parts.get(HEAD, 0))


def total(found: Holding) -> int:
    return sum(layers.total for layers in found.values())


def split_temporary(held: Mapping[Owner, int], kept: Mapping[Owner, int], *kinds: str) -> dict[Owner, int]:
    """The bytes that are held; those of these kinds that will not be kept count as temporary."""
    found = dict(held)
    for owner, size in held.items():
        if owner.kind in kinds and (beyond := size - kept.get(owner, 0)) > 0:
            found[owner] = size - beyond
            found[Owner(TEMPORARY)] = found.get(Owner(TEMPORARY), 0) + beyond
    return found


def hold_weights(memory: LiveBytes, model: GPT) -> None:
    """Count the model's weights, and its table of positions, by layer."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        memory.hold([tensor], Owner("weights", part_of(name)))


def part_of(name: str) -> int | str:
    """The layer of a parameter or a buffer, by its name in `GPT`."""
    first, *rest = name.split(".")
    return int(rest[0]) if first == "h" else HEAD if first in ("ln_f", "lm_head") else EMBEDDING
