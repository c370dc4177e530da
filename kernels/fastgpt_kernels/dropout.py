"""Attention dropout whose mask is a pure function of a seed and a position, the same in every backend.

The bits come from Philox 4x32 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) with 7
rounds, the fewest that pass BigCrush there. One call gives eight 16-bit numbers, four calls serve 32 columns:

    counter = (column // 32 * 4 + column % 8 // 2, row, batch * H + head, 0)
    key     = (seed's low word, seed's high word)
    number  = half (column % 2, low half first) of word column % 32 // 8
    kept    = number >= round(p * 65536)

Tile sizes do not appear in it, so every kernel computes the same mask with its own tiles. A call's columns, two in
each group of 8, are those of a row that one thread holds in the tensor cores' accumulators. So each thread of a kernel
uses the numbers that it computes.
Offered here: `dropout_mask`, `weights_kept`, `apply_dropout`.
"""

import torch

ROUNDS = 7
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF
COLUMNS_PER_BLOCK = 32
CALLS_PER_BLOCK = 4
# Counters handled at once on a CPU: a few int64 temporaries of this length stay in its L2 cache.
CHUNK = 1 << 15


def dropout_mask(seed: torch.Tensor, B: int, H: int, Tq: int, Tk: int, p: float) -> torch.Tensor:
    """The attention weights that are kept: bool (B, H, Tq, Tk), each True with probability 1 - p (to 2**-16).

    Args:
        seed: int64 scalar tensor; the mask is on its device.
        Tq, Tk: the queries are the last Tq of Tk positions, so row i is position Tk - Tq + i.
        p: dropout rate, 0 <= p < 1.
    """
    threshold = round(p * 65536)
    if seed.device.type == "cpu":
        keep = torch.ops.fastgpt.dropout_mask(seed, B * H, Tq, Tk, threshold)
    else:
        keep = _keep(seed, *_counters(seed, B * H, Tq, Tk), threshold)
    return keep.flatten(2)[..., :Tk].view(B, H, Tq, Tk)


def weights_kept(shape: tuple[int, ...], seed: torch.Tensor | None, p: float) -> torch.Tensor | None:
    """`dropout_mask` for attention weights of a shape (B, H, Tq, Tk); None if p is 0, because all are kept.

    Raises:
        ValueError: dropout without a seed.
    """
    if p == 0.0:
        return None
    if seed is None:
        raise ValueError(f"causal_attention: dropout_p={p} needs a seed, an int64 scalar tensor")
    B, H, Tq, Tk = shape
    return dropout_mask(seed, B, H, Tq, Tk, p)


def apply_dropout(weights: torch.Tensor, seed: torch.Tensor | None, p: float) -> torch.Tensor:
    """Drop and rescale attention weights (B, H, Tq, Tk) by the mask of `seed`."""
    keep = weights_kept(weights.shape, seed, p)
    return weights if keep is None else weights * keep * (1.0 / (1.0 - p))


torch.library.define(
    "fastgpt::dropout_mask", "(Tensor seed, SymInt heads, SymInt Tq, SymInt Tk, SymInt threshold) -> Tensor"
)


@torch.library.impl("fastgpt::dropout_mask", "CompositeExplicitAutograd")
def _mask_by_chunks(seed: torch.Tensor, heads: int, Tq: int, Tk: int, threshold: int) -> torch.Tensor:
    """Kept or not, (heads, Tq, blocks, 32), a few heads at a time so that intermediate results stay in the cache.

    One opaque operation, because torch.compile makes it twice as slow. `torch.library.custom_op` would import the
    compiler in the first step of every run with dropout.
    """
    column, row, head = _counters(seed, heads, Tq, Tk)
    size = max(1, CHUNK // max(1, Tq * len(column)))
    parts = [_keep(seed, column, row, part, threshold) for part in head.split(size)]
    return torch.cat(parts) if heads else _mask_shape(seed, heads, Tq, Tk, threshold)


@torch.library.register_fake("fastgpt::dropout_mask")
def _mask_shape(seed: torch.Tensor, heads: int, Tq: int, Tk: int, threshold: int) -> torch.Tensor:
    return seed.new_empty(heads, Tq, _blocks(Tk), COLUMNS_PER_BLOCK, dtype=torch.bool)


def _blocks(Tk: int) -> int:
    return -(-Tk // COLUMNS_PER_BLOCK)


def _counters(seed: torch.Tensor, heads: int, Tq: int, Tk: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The parts of the counters: of the column (calls), row (Tq, 1) and head (heads, 1, 1)."""
    column = torch.arange(_blocks(Tk) * CALLS_PER_BLOCK, device=seed.device)
    row = torch.arange(Tk - Tq, Tk, device=seed.device)[:, None]
    return column, row, torch.arange(heads, device=seed.device)[:, None, None]


def _keep(seed: torch.Tensor, column: torch.Tensor, row: torch.Tensor, head: torch.Tensor, threshold: int):
    """Kept or not, (heads, Tq, blocks, 32), for counters that broadcast to (heads, Tq, calls)."""
    words = [word.unflatten(-1, (-1, CALLS_PER_BLOCK)) for word in _philox(seed, column, row, head)]
    pairs = [torch.stack([(word & 0xFFFF) >= threshold, (word >> 16) >= threshold], dim=-1) for word in words]
    return torch.stack(pairs, dim=-3).flatten(-3)  # (heads, Tq, blocks, 4 words, 4 calls, 2 halves) before


def _philox(seed: torch.Tensor, c0: torch.Tensor, c1: torch.Tensor, c2: torch.Tensor) -> list[torch.Tensor]:
    """Four 32-bit words, in int64 tensors, for each counter (c0, c1, c2, 0)."""
    k0, k1 = seed & WORD, (seed >> 32) & WORD
    c3 = torch.zeros_like(seed)
    for _ in range(ROUNDS):
        # An int64 product wraps, and its 64 bits are still those of the unsigned one.
        left, right = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1 = ((right >> 32) & WORD) ^ c1 ^ k0, right & WORD
        c2, c3 = ((left >> 32) & WORD) ^ c3 ^ k1, left & WORD
        k0, k1 = (k0 + KEY_STEPS[0]) & WORD, (k1 + KEY_STEPS[1]) & WORD
    return list(torch.broadcast_tensors(c0, c1, c2, c3))
