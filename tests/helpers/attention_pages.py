"""Data of an attention page, made from random numbers in the form that `fastgpt.inspection.page.build` takes."""

import base64
import zlib
from typing import Any, NamedTuple

import numpy as np

LIKELIEST = 10


class Made(NamedTuple):
    """The data of a page, and the arrays that are packed in them, one of each for a checkpoint."""

    data: dict[str, Any]
    maps: list[np.ndarray]  # uint8 (L, H, T, T), 0 above the diagonal
    ids: list[np.ndarray]  # int32 (rows, T, 10)
    probs: list[np.ndarray]  # float32 (rows, T, 10)


def packed(array: np.ndarray) -> str:
    return base64.b64encode(zlib.compress(array.tobytes(), 9)).decode()


def made(texts: list[str], *, layers: int = 2, heads: int = 3, checkpoints: int = 1, seed: int = 0) -> Made:
    """A page of so many layers, heads and checkpoints over tokens with these texts; equal texts have equal ids."""
    draw = np.random.default_rng(seed)
    vocabulary = sorted({*texts, *"abcdefghijklmno"})
    ids = [vocabulary.index(text) for text in texts]
    found = [_checkpoint(draw, ids, len(vocabulary), layers, heads, n) for n in range(checkpoints)]
    data = {
        "title": f"Attention in out, step {checkpoints * 500}",
        "source": f"out, step-{checkpoints * 500:06}",
        "model": f"{layers} layers, {heads} heads, width 48, context 64, 0.1M parameters",
        "notes": ["attention weights are rounded to 1/255"],
        "tokens": [{"id": id, "text": text, "bytes": None} for id, text in zip(ids, texts, strict=True)],
        "layers": list(range(layers)),
        "H": heads,
        "K": LIKELIEST,
        "vocabulary": {str(id): text for id, text in enumerate(vocabulary)},
        "shapes": [_step("embedding", "x = self.wte(tokens)", "(B, T, C)", f"(1, {len(ids)}, 48)")],
        "picked": {"layer": min(1, layers - 1), "head": min(2, heads - 1)},
        "checkpoints": [one for one, *_ in found],
    }
    return Made(data, *(list(part) for part in list(zip(*found, strict=True))[1:]))


def _step(name: str, code: str, letters: str, numbers: str) -> dict[str, str]:
    return {"name": name, "code": code, "letters": letters, "numbers": numbers}


def _checkpoint(draw: np.random.Generator, ids: list[int], V: int, layers: int, heads: int, number: int):
    T, rows = len(ids), ["embedding", *(f"layer {n}" for n in range(layers)), "output"]
    scores = np.where(np.tri(T, dtype=bool), draw.normal(size=(layers, heads, T, T)), -np.inf)
    weights = np.exp(2 * scores) / np.exp(2 * scores).sum(-1, keepdims=True)
    maps = np.rint(255 * weights).astype(np.uint8)
    logits = 2 * draw.normal(size=(len(rows), T, V)).astype(np.float32)
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    order = np.argsort(-probs, axis=-1)
    best = order[..., :LIKELIEST].astype(np.int32)
    top = np.take_along_axis(probs, best, -1)
    true = [probs[-1, t - 1, ids[t]] for t in range(1, T)]
    ranks = [int(np.flatnonzero(order[-1, t - 1] == ids[t])[0]) + 1 for t in range(1, T)]
    triangles = maps[:, :, *np.tril_indices(T)]
    one = {
        "name": f"step {500 * (number + 1)}",
        "step": 500 * (number + 1),
        "val_loss": 3.0 / (number + 1),
        "maps": packed(triangles),
        "heads": [[_head(weights[layer, head]) for head in range(heads)] for layer in range(layers)],
        "losses": [None, *(-float(np.log(p)) for p in true)],
        "ranks": [None, *ranks],
        "lens": {"rows": rows, "ids": packed(best), "probs": packed(top)},
    }
    return one, maps, best, top


def _head(weights: np.ndarray) -> dict[str, Any]:
    T = len(weights)
    previous = float(np.diag(weights, -1).mean()) if T > 1 else 0.0
    entropy = float(-(weights * np.log(weights, where=weights > 0, out=np.zeros_like(weights))).sum(-1).mean())
    distance = float((weights * (np.arange(T)[:, None] - np.arange(T))).sum(-1).mean())
    return {
        "entropy": entropy,
        "distance": distance,
        "labels": [{"name": "previous token", "score": previous}],
        "scores": {"previous": previous, "first": float(weights[:, 0].mean()), "induction": None},
    }
