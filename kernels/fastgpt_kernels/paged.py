"""Attention over keys and values in pages, and the kernel that writes them there, for many sequences at once.

The pages are a pool that all sequences share, (pages, P, Hkv, D). A block table (B, M) gives the pages of each
sequence in order (Kwon et al., 2023, "PagedAttention"). `paged_decode` attends with one query a sequence,
`paged_prefill` with several. Lengths, tables and slots are read only on the device, and grids depend on shapes alone,
so a CUDA graph can be replayed with other lengths, tables and slots. No operation here has a backward pass.

Twins: `reference.paged_attention` and `reference.kv_write`. Offered here: `paged_attention`, `kv_write`.
"""

import math

import torch
import triton
import triton.language as tl

from fastgpt_kernels import paged_decode, paged_prefill  # noqa: F401 - they register the ops
from fastgpt_kernels.attention_tiles import WIDEST_HEAD
from fastgpt_kernels.launch import DEBUG, Launch, Tuning, check_tensors, tiles, tuning


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["slots_ptr"])
def _kv_write(
    k_pages_ptr, v_pages_ptr,  # (pages, P, Hkv, D)
    k_ptr, v_ptr,  # (N, Hkv, D)
    slots_ptr,  # (N,)
    k_t, k_h, v_t, v_h,
    rows,  # N * Hkv
    Hkv,
    D: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,  # at least D
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token = (row // Hkv)[:, None]
    head = (row % Hkv)[:, None]
    slot = tl.load(slots_ptr + token, mask=(row < rows)[:, None], other=-1)
    d = tl.arange(0, COLUMNS)[None, :]
    inside = (slot >= 0) & (d < D)
    k = tl.load(k_ptr + token * k_t + head * k_h + d, mask=inside)
    v = tl.load(v_ptr + token * v_t + head * v_h + d, mask=inside)
    place = (slot * Hkv + head) * D + d
    tl.store(k_pages_ptr + place, k, mask=inside)
    tl.store(v_pages_ptr + place, v, mask=inside)


def kv_write_launch(
    k: torch.Tensor, v: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, slots: torch.Tensor, tuning: Tuning
) -> Launch:
    N, Hkv, D = k.shape
    row = tuning.row("kv_write", D)
    return Launch(
        "kv_write",
        _kv_write,
        (tiles(N * Hkv, row.rows),),
        (k_pages, v_pages, k, v, slots, *k.stride()[:2], *v.stride()[:2], N * Hkv, Hkv),
        {"D": D} | row.constants(),
    )


@torch.library.custom_op("fastgpt::kv_write", mutates_args=("k_pages", "v_pages"))
def _write(k: torch.Tensor, v: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, slots: torch.Tensor) -> None:
    if slots.device.type == "cpu" or DEBUG:
        past = slots[slots >= k_pages.shape[0] * k_pages.shape[1]]
        if past.numel():
            raise ValueError(
                f"kv_write: slots {tuple(slots.shape)} holds {past[0].item()}; expected less than "
                f"{k_pages.shape[0] * k_pages.shape[1]}, the slots of k_pages {tuple(k_pages.shape)}"
            )
    if k.numel():
        k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (k, v))
        kv_write_launch(k, v, k_pages, v_pages, slots.contiguous(), tuning(k.device, k.dtype))()


@_write.register_fake
def _write_nothing(k, v, k_pages, v_pages, slots):
    return None


def paged_attention(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    block_table: torch.Tensor,
    lengths: torch.Tensor,
    *,
    starts: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Causal attention of each sequence's last tokens over pages, as `reference.paged_attention`.

    Args:
        q: (N, H, D), with D <= 256; a view will do, if its last dimension is contiguous.
        k_pages, v_pages: (pages, P, Hkv, D), contiguous, in q's dtype; H a multiple of Hkv. Slots that hold no token
            may hold anything.
        block_table: int32 (B, M). Entries past the length are never read.
        lengths: int32 (B,), any view, at most M * P; 0 marks an empty slot, whose output is 0.
        starts: int32 (B + 1,), from 0 to N. Default: one query a sequence, N = B.
        scale: of the scores; default D ** -0.5.

    Returns:
        (N, H, D), contiguous, in q's dtype: the same bits in every run. No gradients.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, named with what was expected. On a CPU also
            numbers in block_table, lengths and starts that point outside. On a GPU the caller must ensure these,
            because a check would wait for the GPU; FASTGPT_DEBUG=1 in the environment checks them there too.
    """
    _check_attention(q, k_pages, v_pages, block_table, lengths, starts)
    if scale is None:
        scale = 1.0 / math.sqrt(q.shape[-1])
    if scale <= 0:  # the kernels take the largest score before they scale it
        q, scale = (-q, -scale) if scale < 0 else (q * 0.0, 1.0)
    if starts is None:
        return torch.ops.fastgpt.paged_decode(q, k_pages, v_pages, block_table, lengths, scale, 0)
    return torch.ops.fastgpt.paged_prefill(q, k_pages, v_pages, block_table, lengths, starts, scale)


def kv_write(
    k: torch.Tensor, v: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, slots: torch.Tensor
) -> None:
    """Write the keys and values of N tokens to their slots in the pages, in place, as `reference.kv_write`.

    Args:
        k, v: (N, Hkv, D), with D <= 256; views will do, if their last dimension is contiguous.
        k_pages, v_pages: (pages, P, Hkv, D), contiguous, in k's dtype.
        slots: int64 (N,), page * P + the position in the page, each given once; -1 is padding and is not written.

    Raises:
        ValueError: as `paged_attention`, with slots past the last page among what is checked on a CPU.
    """
    op = "kv_write"
    check_tensors(op, {"k": 3, "v": 3, "k_pages": 4, "v_pages": 4}, k=k, v=v, k_pages=k_pages, v_pages=v_pages)
    _check_pages(op, "k", k, k_pages, v_pages)
    if v.dtype != k.dtype:
        raise ValueError(f"{op}: v {tuple(v.shape)} is {v.dtype}; expected {k.dtype}, as k")
    if v.shape != k.shape:
        raise ValueError(f"{op}: v has shape {tuple(v.shape)}; expected {tuple(k.shape)}, as k")
    if k.shape[1] != k_pages.shape[2]:
        raise ValueError(f"{op}: k has {k.shape[1]} heads {tuple(k.shape)}; expected k_pages' {k_pages.shape[2]}")
    _check_integers(op, "slots", slots, torch.int64, (k.shape[0],), k.device)
    torch.ops.fastgpt.kv_write(k, v, k_pages, v_pages, slots)


def _check_attention(
    q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor,
    block_table: torch.Tensor, lengths: torch.Tensor, starts: torch.Tensor | None,
) -> None:  # fmt: skip
    op = "paged_attention"
    check_tensors(op, {"q": 3, "k_pages": 4, "v_pages": 4}, q=q, k_pages=k_pages, v_pages=v_pages)
    _check_pages(op, "q", q, k_pages, v_pages)
    (N, H, _), Hkv = q.shape, k_pages.shape[2]
    if (H % Hkv if Hkv else H) != 0:
        raise ValueError(f"{op}: q has {H} heads {tuple(q.shape)}; expected a multiple of k_pages' {Hkv}")
    if block_table.dim() != 2:
        raise ValueError(f"{op}: block_table has shape {tuple(block_table.shape)}; expected (B, M)")
    B = block_table.shape[0]
    _check_integers(op, "block_table", block_table, torch.int32, tuple(block_table.shape), q.device)
    _check_integers(op, "lengths", lengths, torch.int32, (B,), q.device)
    if starts is not None:
        _check_integers(op, "starts", starts, torch.int32, (B + 1,), q.device)
    elif N != B:
        raise ValueError(
            f"{op}: q has shape {tuple(q.shape)}; expected ({B}, H, D), a query for each row of block_table, or starts"
        )


def _check_pages(op: str, name: str, x: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor) -> None:
    """Raises ValueError if the pages do not match each other or x (N, heads, D), the argument called `name`."""
    D = x.shape[-1]
    if not 1 <= D <= WIDEST_HEAD:
        raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}; expected a head size of 1 to {WIDEST_HEAD}")
    for of, pages in (("k_pages", k_pages), ("v_pages", v_pages)):
        if pages.dtype != x.dtype:
            raise ValueError(f"{op}: {of} {tuple(pages.shape)} is {pages.dtype}; expected {x.dtype}, as {name}")
        if pages.shape[1] == 0 or pages.shape[3] != D or pages.shape != k_pages.shape:
            expected = f"(pages, P, Hkv, {D}), as {name} {tuple(x.shape)}, with P of at least 1"
            expected = expected if of == "k_pages" else f"{tuple(k_pages.shape)}, as k_pages"
            raise ValueError(f"{op}: {of} has shape {tuple(pages.shape)}; expected {expected}")
        if not pages.is_contiguous():
            raise ValueError(f"{op}: {of} {tuple(pages.shape)} has strides {pages.stride()}; expected them contiguous")


def _check_integers(
    op: str, name: str, t: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device
) -> None:
    if t.dtype != dtype:
        raise ValueError(f"{op}: {name} {tuple(t.shape)} is {t.dtype}; expected {dtype}")
    if t.shape != shape or t.device != device:
        raise ValueError(f"{op}: {name} has shape {tuple(t.shape)} on {t.device}; expected {shape} on {device}")
