"""Keys and values of the tokens so far, so that a new token costs one step and not the whole context."""

import torch

from fastgpt.config import ModelConfig


class DenseCache:
    """One contiguous buffer a layer, for keys and for values, of B sequences of equal length: (B, S, Hkv, D)."""

    def __init__(self, config: ModelConfig, B: int = 1, *, device: torch.device | str = "cpu", dtype=torch.float32):
        shape = (config.n_layer, B, config.block_size, config.kv_heads, config.head_size)
        self.keys = torch.empty(shape, device=device, dtype=dtype).unbind()
        self.values = torch.empty(shape, device=device, dtype=dtype).unbind()
        self.capacity = config.block_size  # S, the tokens that fit
        self.length = 0

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the keys and values (B, T, Hkv, D) of the next T tokens; return views of all of them so far.

        Raises:
            ValueError: more tokens than slots.
        """
        T = k.shape[1]
        end = self.length + T
        if end > self.capacity:
            raise ValueError(f"{end} tokens do not fit in a cache of {self.capacity}")
        keys, values = self.keys[layer], self.values[layer]
        keys.narrow(1, self.length, T).copy_(k)
        values.narrow(1, self.length, T).copy_(v)
        return keys.narrow(1, 0, end), values.narrow(1, 0, end)

    def advance(self, tokens: int) -> None:
        """Count the tokens that every layer has now appended."""
        self.length += tokens

    def clear(self) -> None:
        """Forget everything; the memory is kept."""
        self.length = 0
