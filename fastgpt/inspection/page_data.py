"""The data of the page of attention maps, in plain JSON values, and as much of them as the page has room for.

A page has at most `PAGE_BYTES`, or `SLIDER_BYTES` with several checkpoints. What is too much is left out, and noted:
rows of the logit lens, then layers, evenly; where even one layer is too large, the text's end, without which the maps
of its beginning are the same.
"""

import base64
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from fastgpt.config.model import ModelConfig
from fastgpt.inspection import logit_lens
from fastgpt.inspection.attention import token_text
from fastgpt.inspection.heads import Head
from fastgpt.inspection.page import build
from fastgpt.inspection.selection import evenly
from fastgpt.inspection.snapshot import LEVELS, Snapshot
from fastgpt.tokenizer.base import Tokenizer

PAGE_BYTES, SLIDER_BYTES = 1_500_000, 5_000_000
LENS_SHARE = 0.4  # of a page, that the logit lens may take
SHORTER = 0.9  # the part of a text that is tried next where all of it is too long
MANTISSA = 14  # bits of a probability that are kept, of 23: an error of at most 2 ** -16, which deflates better


@dataclass(frozen=True)
class Content:
    """The material of a page.

    Attributes:
        title, source, model: lines for people.
        tokens: int64 (T,).
        snapshots: one, or those of the slider, the earliest first.
        picked: the layer and the head that are enlarged at first.
    """

    title: str
    source: str
    model: str
    tokenizer: Tokenizer
    config: ModelConfig
    tokens: torch.Tensor
    snapshots: Sequence[Snapshot]
    picked: tuple[int, int]

    @property
    def layers(self) -> list[int]:
        return sorted(self.snapshots[0].layers)

    @property
    def limit(self) -> int:
        return PAGE_BYTES if len(self.snapshots) == 1 else SLIDER_BYTES


class Part(NamedTuple):
    """The part of the content that is shown: the first T tokens, layers, and rows of the lens."""

    T: int
    layers: list[int]
    rows: list[int]


def fitted(content: Content) -> tuple[str, list[str]]:
    """The largest page within the limit, and notes on what it leaves out."""
    for part in _parts(content):
        notes = _notes(content, part)
        page = build(values(content, part, notes))
        if len(page.encode()) <= content.limit:
            break
    return page, notes


def values(content: Content, part: Part, notes: Sequence[str]) -> dict[str, Any]:
    """The data of a page."""
    shown = content.tokens[: part.T].tolist()
    mentioned = {id for one in content.snapshots for id in one.lens.ids[part.rows, : part.T].unique().tolist()}
    layer, head = content.picked
    return {
        "title": content.title,
        "source": content.source,
        "model": content.model,
        "notes": list(notes),
        "tokens": [token_values(content.tokenizer, token) for token in shown],
        "layers": part.layers,
        "H": content.config.n_head,
        "K": content.snapshots[0].lens.ids.shape[-1],
        "vocabulary": {str(id): token_text(content.tokenizer, id) for id in sorted(mentioned)},
        "shapes": [step._asdict() for step in content.snapshots[-1].steps],
        "picked": {"layer": part.layers.index(layer), "head": head},
        "checkpoints": [_snapshot_values(one, part, content.config.n_layer) for one in content.snapshots],
    }


def token_values(tokenizer: Tokenizer, token: int) -> dict[str, Any]:
    """A token; `bytes` are in hexadecimal, and given where they are no whole characters."""
    content = tokenizer.token_bytes(token)
    whole = content.decode("utf-8", "ignore").encode() == content
    return {"id": token, "text": token_text(tokenizer, token), "bytes": None if whole else content.hex()}


def head_values(head: Head) -> dict[str, Any]:
    """The measurements of a head."""
    labels = [{"name": name, "score": round(score, 4)} for name, score in head.labels]
    scores = {name: None if score is None else round(score, 4) for name, score in head.scores.items()}
    return {
        "entropy": round(head.entropy, 4),
        "distance": round(head.distance, 3),
        "labels": labels,
        "scores": scores,
    }


def _snapshot_values(one: Snapshot, part: Part, n_layer: int) -> dict[str, Any]:
    names, T = logit_lens.row_names(n_layer), part.T
    return {
        **one.origin._asdict(),
        "maps": _deflated(b"".join(one.layers[layer].triangles(T) for layer in part.layers)),
        "heads": [[head_values(head) for head in one.layers[layer].heads] for layer in part.layers],
        "losses": [None, *(round(loss, 4) for loss in one.outcome.losses[: T - 1].tolist())],
        "ranks": [None, *one.outcome.ranks[: T - 1].tolist()],
        "lens": {"rows": [names[row] for row in part.rows], **_lens_values(one, part.rows, T)},
    }


def _lens_values(one: Snapshot, rows: Sequence[int], T: int) -> dict[str, str]:
    ids, probabilities = (values[rows, :T].numpy() for values in one.lens)
    bits = probabilities.view(np.uint32)
    dropped = 23 - MANTISSA
    rounded = ((bits + np.uint32(1 << (dropped - 1))) >> np.uint32(dropped)) << np.uint32(dropped)
    return {"ids": _deflated(ids.astype("<i4").tobytes()), "probs": _deflated(rounded.astype("<u4").tobytes())}


def _deflated(content: bytes) -> str:
    return base64.b64encode(zlib.compress(content)).decode()


def _parts(content: Content) -> Iterator[Part]:
    """The parts that may fit, the largest first; the last one is what is shown in any case."""
    T, layers, picked = len(content.tokens), content.layers, content.picked[0]
    rows = _rows(content, T)
    room = content.limit - _size_without_maps(content, Part(T, [picked], rows))
    for count in range(len(layers), 0, -1):
        chosen = _with(evenly(layers, count), picked)
        if sum(4 * len(one.layers[layer].packed) // 3 for one in content.snapshots for layer in chosen) <= room:
            yield Part(T, chosen, rows)
    while T > 1:
        T = max(1, int(T * SHORTER))
        yield Part(T, [picked], _rows(content, T))


def _rows(content: Content, T: int) -> list[int]:
    """Rows of the lens, evenly, whose first T tokens take at most their share of the page; at least first and last."""
    names = range(content.config.n_layer + 1)
    for count in range(len(names), 2, -1):
        rows = evenly(names, count)
        size = sum(len(text) for one in content.snapshots for text in _lens_values(one, rows, T).values())
        if size <= LENS_SHARE * content.limit:
            return rows
    return [names[0], names[-1]]


def _size_without_maps(content: Content, part: Part) -> int:
    data = values(content, part, [])
    return len(build(data).encode()) - sum(len(one["maps"]) for one in data["checkpoints"])


def _with(layers: list[int], wanted: int) -> list[int]:
    """The layers, the nearest of which gives way to the one that is wanted."""
    nearest = min(layers, key=lambda layer: abs(layer - wanted))
    return sorted(wanted if layer == nearest else layer for layer in layers)


def _notes(content: Content, part: Part) -> list[str]:
    notes, layers, T = [f"attention weights are rounded to 1/{LEVELS}"], len(content.layers), len(content.tokens)
    why = f"as a page has at most {content.limit / 1e6:.1f} MB"
    if (count := len(part.layers)) < layers:
        listed = ", ".join(map(str, part.layers[:-1])) + " and " * (count > 1) + str(part.layers[-1])
        of = f"the {layers} that were chosen" if layers < content.config.n_layer else f"{layers}"
        notes.append(f"layer{'s' * (count > 1)} {listed} of {of} {'are' if count > 1 else 'is'} shown, {why}")
    if len(part.rows) < content.config.n_layer + 1:
        notes.append(f"{len(part.rows)} of {content.config.n_layer + 1} rows of the logit lens are shown, {why}")
    if part.T < T:
        notes.append(f"the first {part.T:,} of {T:,} tokens are shown, {why}; heads are measured on all")
    return notes
