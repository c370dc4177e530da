"""Reads the data of an attention page back, as its scripts do."""

import base64
import json
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np


def data_of(page: Path) -> dict[str, Any]:
    """The JSON in a page."""
    (text,) = re.findall(r'<script[^>]*type="application/json"[^>]*>(.*?)</script>', page.read_text("utf-8"), re.DOTALL)
    return json.loads(text)


def maps_of(data: dict[str, Any], checkpoint: int = -1) -> np.ndarray:
    """The maps of a checkpoint: uint8 (shown layers, H, T, T), 0 above the diagonal."""
    T = len(data["tokens"])
    maps = np.zeros((len(data["layers"]), data["H"], T, T), np.uint8)
    packed = _inflated(data["checkpoints"][checkpoint]["maps"], np.uint8)
    maps[:, :, *np.tril_indices(T)] = packed.reshape(*maps.shape[:2], -1)
    return maps


def lens_of(data: dict[str, Any], checkpoint: int = -1) -> tuple[np.ndarray, np.ndarray]:
    """The ids and the probabilities of the logit lens: each (rows, T, K)."""
    lens = data["checkpoints"][checkpoint]["lens"]
    size = len(lens["rows"]), len(data["tokens"]), data["K"]
    return _inflated(lens["ids"], np.int32).reshape(size), _inflated(lens["probs"], np.float32).reshape(size)


def _inflated(text: str, dtype: type) -> np.ndarray:
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype)
