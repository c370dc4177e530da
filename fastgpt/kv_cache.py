"""Keys and values of the tokens so far, so that a new token costs one step and not the whole context."""

import torch

from fastgpt.config import ModelConfig


class DenseCache:
    """One contiguous buffer a layer for B sequences of equal length.

    Stored as (B, Hkv, S, D), so that a head's keys are one matrix; handed out as (B, length, Hkv, D) views.
    """

    def __init__(
        self, config: ModelConfig, B: int = 1, *, device: torch.device | str = "cpu", dtype=torch.float32
    ):
        shape = (config.n_layer, 2, B, config.kv_heads, config.block_size, config.head_size)
        self.slots = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0

    @property
    def capacity(self) -> int:
        """S, the tokens that fit."""
        return self.slots.shape[4]

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the keys and values (B, T, Hkv, D) of the next T tokens; return all of them so far.

        Raises:
            ValueError: more tokens than slots.
        """
        end = self.length + k.shape[1]
        if end > self.capacity:
            raise ValueError(f"{end} tokens do not fit in a cache of {self.capacity}")
        keys, values = self.slots[layer]
        keys[:, :, self.length : end] = k.transpose(1, 2)
        values[:, :, self.length : end] = v.transpose(1, 2)
        return keys[:, :, :end].transpose(1, 2), values[:, :, :end].transpose(1, 2)

    def advance(self, tokens: int) -> None:
        """Count the tokens that every layer has now appended."""
        self.length += tokens

    def clear(self) -> None:
        """Forget everything; the memory is kept."""
        self.length = 0
