"""Positions that are not learned, sinusoidal and rotary, and positions that restart at each document."""

import math

import torch
import torch.nn.functional as F

from fastgpt.config.model import ModelConfig


def position_table(config: ModelConfig) -> torch.Tensor | None:
    """The fixed positions, float32; None where positions are learned or left out.

    sinusoidal: (block_size, C), to be added: sines in the even channels, cosines in the odd ones (Vaswani et al., 2017,
        3.5).
    rotary: (block_size, D / 2, 2), to turn pairs by: the cosine and sine of each pair's angle (Su et al., 2021, 3.4.2).
    """
    if config.position not in ("sinusoidal", "rotary"):
        return None
    device = torch.get_default_device()
    # On the meta device PyTorch's arange would first import its compiler, for seconds.
    with torch.device("cpu" if device.type == "meta" else device):
        return _computed_table(config).to(device)


def _computed_table(config: ModelConfig) -> torch.Tensor:
    rotary = config.position == "rotary"
    width, base = (config.head_dim, config.rope_theta) if rotary else (config.n_embd, 10_000.0)
    frequency = base ** (-torch.arange(0, width, 2) / width)  # radians a token
    if rotary and config.rope_factor is not None:
        frequency = _stretched(frequency, config.rope_factor, config)
    angle = torch.arange(config.block_size)[:, None] * frequency
    if rotary:
        return torch.stack([angle.cos(), angle.sin()], dim=-1)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)


def _stretched(frequency: torch.Tensor, factor: float, config: ModelConfig) -> torch.Tensor:
    """Frequencies for a longer context, as Llama 3.1 has them (Llama team, 2024; rope_type llama3 in transformers).

    Pairs that turn fewer than `rope_low_freq_factor` times in the original context turn `factor` times slower, those
    that turn more than `rope_high_freq_factor` times stay, and between the two it is a line in the number of turns.
    """
    turns = config.rope_original_context * frequency / (2 * math.pi)
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequency * (kept + (1 - kept) / factor)


def positions_in_documents(doc_ids: torch.Tensor) -> torch.Tensor:
    """Each token's position in its document, or after the window's start: integer (B, T) -> int64 (B, T)."""
    documents = F.pad((doc_ids[:, 1:] != doc_ids[:, :-1]).cumsum(1), (1, 0))  # counted from 0, whatever their ids
    first = torch.searchsorted(documents, documents)  # the position in the window where each begins
    return torch.arange(doc_ids.shape[1], device=doc_ids.device) - first


def rotate(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Turn the two halves of each head, channel i with channel i + D/2: (B, T, heads, D) -> the same.

    rotation: (T, D / 2, 2), or (B, T, D / 2, 2) where the sequences differ in their positions.
    """
    cos, sin = rotation.unsqueeze(-3).unbind(-1)  # each (T, 1, D / 2) or (B, T, 1, D / 2)
    left, right = x.float().chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1).to(x.dtype)
