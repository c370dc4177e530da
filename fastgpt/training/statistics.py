"""Statistics of one training step by layer: gradients, weights, the update, activations, dead units.

    with statistics.watching():
        ...                                          # forward passes of the eager model
    statistics.before_update()                       # gradients are there, and not clipped yet
    ...                                              # the optimizer's step
    statistics.after_update()
    record = statistics.read()                       # waits for the device

Nothing here draws random numbers or changes a tensor of the step, so a run's weights do not depend on it. Hooks exist
only within `watching`. All values stay on the device until they are read.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch.nn.utils import get_total_norm
from torch.utils.hooks import RemovableHandle

from fastgpt.model.gpt import GPT, Block

DEAD = 1e-3  # a unit is dead if its size is below this on every token
DIGITS = 4  # significant ones, in records
KEYS = ("grad_norm", "weight_norm", "update_ratio", "activation_rms", "dead_units")


class Statistics:
    """The statistics of one step of a model. `fastgpt.loggers.jsonl` describes the record.

    The update is what the step changed, whatever the optimizer: between `before_update` and `after_update` a copy of
    the weights is kept, at a time when the step's activations are gone.
    """

    def __init__(self, model: GPT):
        self.model = model
        embeddings = [module for module in (model.wte, model.wpe) if module is not None]
        head = [model.ln_f] if model.lm_head is None else [model.ln_f, model.lm_head]
        groups = [embeddings, *([block] for block in model.h), head]
        self.layers = [[p for module in group for p in module.parameters()] for group in groups]
        self.squares: list[torch.Tensor] = []  # (2,) for each layer with an activation: sum of squares, count
        self.peaks: list[torch.Tensor] = []  # (inner,) for each block: a hidden unit's largest size so far
        self.copies: list[list[torch.Tensor]] = []
        self.norms: dict[str, torch.Tensor] = {}  # of the layers, (L + 2,) each

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Measure the activations of all forward passes in the block, from none on."""
        self.squares = [torch.zeros(2, device=self.model.device) for _ in self.layers[:-1]]
        self.peaks = [torch.zeros((), device=self.model.device) for _ in self.model.h]
        hooks = list(self._hooks())
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def before_update(self) -> None:
        """Measure the gradients, which float16's loss scale must have left, and keep the weights."""
        self.norms["grad_norm"] = _norms([[p.grad for p in layer if p.grad is not None] for layer in self.layers])
        weights = [[p.detach() for p in layer] for layer in self.layers]
        self.norms["weight_norm"] = _norms(weights)
        self.copies = [[weight.clone() for weight in layer] for layer in weights]

    def after_update(self) -> None:
        """Measure what the optimizer changed, and let go of the copy."""
        for layer, copies in zip(self.layers, self.copies, strict=True):
            for parameter, copy in zip(layer, copies, strict=True):
                copy.sub_(parameter.detach())
        self.norms["update_ratio"] = _norms(self.copies) / self.norms["weight_norm"]
        self.copies.clear()

    def read(self) -> dict[str, list[float | None]]:
        """The record of a step that was watched and taken: for each key one value a layer."""
        squares, counts = torch.stack(self.squares).unbind(1)
        dead = torch.stack([(peak < DEAD).float().mean() for peak in self.peaks])
        unknown = squares.new_full((1,), math.nan)
        values = {
            **self.norms,
            "activation_rms": torch.cat([(squares / counts).sqrt(), unknown]),
            "dead_units": torch.cat([unknown, dead, unknown]),
        }
        rows = torch.stack([values[key] for key in KEYS]).tolist()
        return {key: [_rounded(value) for value in row] for key, row in zip(KEYS, rows, strict=True)}

    def _hooks(self) -> Iterator[RemovableHandle]:
        """Hooks that see the residual stream before the first block and after each, and the MLPs' hidden units."""
        blocks = [module for module in self.model.h if isinstance(module, Block)]
        yield blocks[0].register_forward_pre_hook(lambda _, args: self._take_stream(0, args[0]))
        for layer, block in enumerate(blocks):
            yield block.register_forward_hook(partial(self._take_output, layer))
            yield block.mlp.c_proj.register_forward_pre_hook(partial(self._take_hidden, layer))

    @torch.no_grad()
    def _take_output(self, layer: int, block: Block, args: object, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Add what a block returns: the residual stream, and the branch still to be added to it."""
        self._take_stream(layer + 1, output[0] + output[1])

    @torch.no_grad()
    def _take_stream(self, place: int, x: torch.Tensor) -> None:
        """Add the residual stream (B, T, C) of a micro-batch."""
        square = torch.linalg.vector_norm(x, dtype=torch.float32) ** 2
        self.squares[place] += torch.stack((square, torch.full_like(square, x.numel())))

    @torch.no_grad()
    def _take_hidden(self, layer: int, module: object, args: tuple[torch.Tensor]) -> None:
        """Add the hidden units (B, T, inner) of a micro-batch."""
        self.peaks[layer] = torch.maximum(self.peaks[layer], args[0].flatten(0, 1).abs().amax(0))


def _norms(layers: list[list[torch.Tensor]]) -> torch.Tensor:
    """The norm of all tensors of each layer, (layers,); not a number for a layer without tensors."""
    unknown = layers[0][0].new_tensor(math.nan)  # the embeddings have some
    return torch.stack([get_total_norm(tensors) if tensors else unknown for tensors in layers])


def _rounded(value: float) -> float | None:
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
