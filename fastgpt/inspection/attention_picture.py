"""Draws attention maps: a grid of layers and heads, each titled with the patterns that it follows."""

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F

from fastgpt.inspection.snapshot import LEVELS, Layer
from fastgpt.loggers import drawing

MOST_DOTS = 256  # of a map's side; of a larger one, each dot shows the largest weight under it
CELL = 1.5  # inches
MOST_INCHES = 60  # of the longer side
GAMMA = 0.5  # of the colours: small weights, spread over many keys, stay visible


def draw(layers: Mapping[int, Layer], T: int, title: str) -> bytes:
    """The picture, as PNG, of a text of T tokens."""
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    H = len(next(iter(layers.values())).heads)
    width, height = H * CELL + 1.4, len(layers) * (CELL + 0.22) + 0.9
    figure = Figure(figsize=(max(width, 4.5), height), dpi=min(120, 120 * MOST_INCHES / max(width, height)))
    figure.set_layout_engine("constrained", h_pad=0.03, w_pad=0.03)
    grid = figure.subplots(len(layers), H, squeeze=False)
    norm, image = PowerNorm(GAMMA, 0, 1), None
    for axes_of_layer, (number, layer) in zip(grid, layers.items(), strict=True):
        for head, (axes, weights) in enumerate(zip(axes_of_layer, _maps(layer, T), strict=True)):
            image = axes.imshow(weights, cmap="magma_r", norm=norm, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set(color="0.75", linewidth=0.6)
            labels = layer.heads[head].labels
            axes.set_title(f"{labels[0][0]} {labels[0][1]:.2f}" if labels else " ", fontsize=7, pad=2, color="#b3261e")
            if number == next(iter(layers)):
                above = {"xytext": (0, 13), "textcoords": "offset points", "ha": "center", "fontsize": 9}
                axes.annotate(f"head {head}", (0.5, 1), xycoords="axes fraction", **above)
        axes_of_layer[0].set_ylabel(f"layer {number}", fontsize=9)
    figure.suptitle(drawing.literal(title), fontsize=11, family=drawing.fonts())
    figure.supxlabel("key: the token that is read", fontsize=9)
    figure.supylabel("query: the token that reads", fontsize=9)
    assert image is not None
    bar = figure.colorbar(image, ax=grid, shrink=min(1.0, 3 / height), aspect=25, ticks=[0, 0.05, 0.2, 0.5, 1])
    bar.set_label("weight", fontsize=9)
    return drawing.render(figure)


def _maps(layer: Layer, T: int) -> np.ndarray:
    """The weights of each head, (H, T, T) or smaller; NaN, which is not painted, for keys that come later."""
    H = len(layer.heads)
    lower = np.tril(np.ones((T, T), bool))
    maps = np.zeros((H, T, T), np.float32)
    maps[:, lower] = np.frombuffer(layer.triangles(T), np.uint8).reshape(H, -1) / np.float32(LEVELS)
    if T > MOST_DOTS:
        maps = F.adaptive_max_pool2d(torch.from_numpy(maps), MOST_DOTS).numpy()
        lower = np.tril(np.ones((MOST_DOTS, MOST_DOTS), bool))
    maps[:, ~lower] = np.nan
    return maps
