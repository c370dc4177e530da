"""One checkpoint of a model on a text: heads, predictions, and the maps in the form that they are shown in.

The maps of a large model are gigabytes, so each layer is measured and compressed as soon as it is computed.
"""

import zlib
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from fastgpt.generation.generator import TextGenerator
from fastgpt.inspection import logit_lens
from fastgpt.inspection.attention import document_ids, observe
from fastgpt.inspection.heads import Head, Patterns, measure
from fastgpt.inspection.logit_lens import Outcome, Predictions
from fastgpt.inspection.shapes import Step

LEVELS = 255  # in the compressed maps, a weight of 1


@dataclass
class Layer:
    """A layer's heads.

    Attributes:
        packed: of the weights in steps of 1 / `LEVELS`, the bytes of each head's lower triangle, row by row, deflated.
        maps: the weights themselves, float32 (H, T, T) on the host; None if they were not to be kept.
    """

    heads: list[Head]
    packed: bytes
    maps: torch.Tensor | None

    def triangles(self, T: int) -> bytes:
        """The lower triangles of the first T queries of each head, one head after another."""
        content = zlib.decompress(self.packed)
        each = len(content) // len(self.heads)
        return b"".join(content[at : at + T * (T + 1) // 2] for at in range(0, len(content), each))


class Origin(NamedTuple):
    """The name of a checkpoint or of a model; of a run's checkpoint its step, and its val loss if it is known."""

    name: str
    step: int | None = None
    val_loss: float | None = None


@dataclass
class Snapshot:
    """A model on a text.

    Attributes:
        layers: those that were asked for, by number.
        lens: (L + 1, T, K), with the rows of `logit_lens.row_names`.
        steps: the shapes of tensors.
    """

    origin: Origin
    lens: Predictions
    outcome: Outcome
    steps: list[Step]
    layers: dict[int, Layer] = field(default_factory=dict)


def take(
    generator: TextGenerator,
    tokens: torch.Tensor,
    layers: Collection[int],
    origin: Origin,
    *,
    keep_maps: bool = False,
) -> Snapshot:
    """Read a text, int64 (T,), and keep what is shown of these layers."""
    documents, T = document_ids(generator, tokens), len(tokens)
    patterns, lower = Patterns(tokens, documents), torch.ones(T, T, dtype=torch.bool).tril()
    found: dict[int, Layer] = {}

    def see(layer: int, weights: torch.Tensor) -> None:
        if layer in layers:
            maps = weights.cpu()
            packed = zlib.compress((maps * LEVELS).round().byte()[:, lower].numpy().tobytes())
            found[layer] = Layer(measure(maps, patterns), packed, maps if keep_maps else None)

    seen = observe(generator.model, tokens, documents, see)
    return Snapshot(
        origin,
        logit_lens.lens(seen.model, seen.streams),
        logit_lens.outcome(seen.model, seen.hidden, tokens),
        seen.shapes.steps(generator.model.config),
        found,
    )
