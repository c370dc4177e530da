"""Real calls of each kernel of the launch table at the shapes of the benchmarks, for bench/tune.py.

    workloads(kernel, tuning, width, device) -> list[Workload]      for the widths that this row serves

Inputs are random but valid, outputs are allocated once, and `launches` puts back what an earlier run has overwritten.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fastgpt_kernels import (
    activation,
    attention,
    attention_backward,
    cross_entropy,
    int8,
    norm,
    norm_backward,
    paged,
    paged_decode,
    paged_prefill,
)
from fastgpt_kernels.launch import TABLE, Launch, Tuning

ROWS = 8192  # tokens of a training step: 8 sequences of 1024
CHANNELS = (128, 384, 768, 1600, 4096, 16384)
HEADS = (32, 64, 128, 256)
HALVES = (128, 512, 2048, 3072)  # columns of a gate
VOCABULARIES = (256, 50304)
TRAINING = ((16, 1024), (4, 4096))  # sequences x tokens
DECODING = ((1, 8192), (64, 1024), (8, 4096))  # sequences x context
PREFILLING = ((16, 256, 1024), (4, 1024, 1024))  # sequences x new tokens x context
OUTPUTS = (768, 3072, 50304)  # channels of GPT-2's layers
BATCHES = (8, 64, ROWS)  # rows of a linear layer
PAGE = 16


Pages = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Workload:
    """A chain of launches in which a kernel is used, and everything that the chain computes."""

    label: str
    launches: Callable[[Tuning], list[Launch]]
    outputs: Sequence[torch.Tensor]


def workloads(kernel: str, tuning: Tuning, width: int, device: torch.device) -> list[Workload]:
    """The kernel's uses at the benchmarks' shapes for which the row of this width is taken.

    Raises:
        LookupError: a kernel that is not known here.
    """
    for prefix, (sizes, make) in MAKERS.items():
        if kernel.startswith(prefix):
            served = _served(kernel, tuning, width, sizes)
            made = [case for size in served for case in make(kernel, tuning, size, device)]
            return [case for case in made if any(launch.name == kernel for launch in case.launches(tuning))]
    raise LookupError(f"bench/tools/tune_cases.py holds no workload for {kernel}; add one to MAKERS")


def _served(kernel: str, tuning: Tuning, width: int, sizes: Sequence[int]) -> list[int]:
    """Those of the benchmarks' sizes whose row this is, or else the row's own width."""
    ceilings = TABLE[kernel][tuning]
    served = [size for size in sizes if min((c for c in ceilings if c >= size), default=None) == width]
    return served or [width]


def _dtype(tuning: Tuning) -> torch.dtype:
    return torch.bfloat16 if tuning.kind == "16-bit" else torch.float32


def _norm(kernel: str, tuning: Tuning, C: int, device: torch.device) -> list[Workload]:
    dtype = _dtype(tuning)
    x, dy = (torch.randn(ROWS, C, device=device).to(dtype) for _ in range(2))
    weight = torch.randn(C, device=device).to(dtype)
    y, dx, dweight = torch.empty_like(x), torch.empty_like(x), torch.empty_like(weight)
    rstd = torch.empty(ROWS, device=device)
    mean = None if kernel.startswith("rms_") else torch.empty_like(rstd)

    def launches(tuning: Tuning) -> list[Launch]:
        return [
            norm.forward_launch(None, y, mean, rstd, x, None, weight, None, 1e-5, tuning),
            *norm_backward.backward_launches(dx, None, dweight, None, None, dy, x, mean, rstd, weight, tuning),
        ]

    outputs = [t for t in (y, mean, rstd, dx, dweight) if t is not None]
    return [Workload(f"{ROWS} x {C}", launches, outputs)]


def _swiglu(kernel: str, tuning: Tuning, width: int, device: torch.device) -> list[Workload]:
    width = min(width, HALVES[-1])
    x, dy = (torch.randn(ROWS, n * width, device=device).to(_dtype(tuning)) for n in (2, 1))
    y, dx = torch.empty_like(dy), torch.empty_like(x)

    def launches(tuning: Tuning) -> list[Launch]:
        return [activation.swiglu_forward_launch(y, x, tuning), activation.swiglu_backward_launch(dx, dy, x, tuning)]

    return [Workload(f"{ROWS} x {width}", launches, (y, dx))]


def _relu2(kernel: str, tuning: Tuning, N: int, device: torch.device) -> list[Workload]:
    x, dy = (torch.randn(N, device=device).to(_dtype(tuning)) for _ in range(2))
    y, dx = torch.empty_like(x), torch.empty_like(x)

    def launches(tuning: Tuning) -> list[Launch]:
        return [activation.relu2_launch(y, None, x, tuning), activation.relu2_launch(dx, dy, x, tuning)]

    return [Workload(f"{N}", launches, (y, dx))]


def _attention(kernel: str, tuning: Tuning, D: int, device: torch.device) -> list[Workload]:
    return [_attention_of(kernel, tuning, B, T, D, device) for B, T in TRAINING]


def _attention_of(kernel: str, tuning: Tuning, B: int, T: int, D: int, device: torch.device) -> Workload:
    H = max(1, 768 // D)
    q, k, v = torch.randn(B, T, 3, H, D, device=device).to(_dtype(tuning)).unbind(2)
    dout = torch.randn(B, T, H, D, device=device).to(q.dtype)
    out, dq, dk, dv = (torch.empty_like(dout) for _ in range(4))
    lse, delta = (torch.empty(B, H, T, device=device) for _ in range(2))
    dropout_p = 0.1 if kernel.endswith("_dropout") else 0.0
    seed = torch.tensor(1, device=device) if dropout_p else None
    rest = (seed, None, dropout_p, 1 / math.sqrt(D))

    def launches(tuning: Tuning) -> list[Launch]:
        return [
            attention.forward_launch(out, lse, q, k, v, *rest, tuning),
            *attention_backward.backward_launches(dq, dk, dv, delta, dout, out, lse, q, k, v, *rest, tuning),
        ]

    return Workload(f"{B} x {T}, {H} heads of {D}", launches, (out, lse, dq, dk, dv))


def _cross_entropy(kernel: str, tuning: Tuning, V: int, device: torch.device) -> list[Workload]:
    V = min(V, VOCABULARIES[-1])
    given = torch.randn(ROWS, V, device=device)
    logits = torch.empty_like(given)
    gradient = logits if _dtype(tuning) == torch.float32 else torch.empty_like(given, dtype=_dtype(tuning))
    targets = torch.randint(V, (ROWS,), device=device)
    loss, lse = torch.empty(ROWS, device=device), torch.empty(ROWS, 2, device=device)

    def launches(tuning: Tuning) -> list[Launch]:
        logits.copy_(given)  # in float32 the kernel puts the gradient in their place
        return [cross_entropy.gradient_launch(logits, gradient, loss, lse, targets, None, V, -100, 0.0, tuning)]

    return [Workload(f"{ROWS} x {V}", launches, (gradient, loss, lse))]


def _scale(kernel: str, tuning: Tuning, N: int, device: torch.device) -> list[Workload]:
    N = min(N, VOCABULARIES[-1] * 768)
    x, factor = torch.randn(N, device=device), torch.tensor(0.5, device=device)
    out = torch.empty(N, device=device, dtype=_dtype(tuning))
    return [Workload(f"{N}", lambda tuning: [cross_entropy.scale_launch(out, x, factor, tuning)], (out,))]


def _pages(B: int, context: int, Hkv: int, D: int, dtype: torch.dtype, device: torch.device) -> Pages:
    """(k_pages, v_pages, block_table, lengths): full sequences, their pages mixed."""
    M = context // PAGE
    k, v = (torch.randn(B * M, PAGE, Hkv, D, device=device).to(dtype) for _ in range(2))
    table = torch.randperm(B * M, device=device).int().view(B, M)
    return k, v, table, torch.full((B,), context, dtype=torch.int32, device=device)


def _decode(kernel: str, tuning: Tuning, D: int, device: torch.device) -> list[Workload]:
    group = 4 if kernel.endswith("_grouped") else 1
    return [_decode_of(tuning, B, context, D, group, device) for B, context in DECODING]


def _decode_of(tuning: Tuning, B: int, context: int, D: int, group: int, device: torch.device) -> Workload:
    Hkv = max(1, 768 // D)
    pages = _pages(B, context, Hkv, D, _dtype(tuning), device)
    q = torch.randn(B, Hkv * group, D, device=device).to(_dtype(tuning))
    out = torch.empty_like(q)

    def launches(tuning: Tuning) -> list[Launch]:
        return paged_decode.decode_launches(out, q, *pages, 1 / math.sqrt(D), 0, tuning)

    return Workload(f"{B} x {context}, {Hkv} key heads of {D}", launches, (out,))


def _prefill(kernel: str, tuning: Tuning, D: int, device: torch.device) -> list[Workload]:
    return [_prefill_of(tuning, B, new, context, D, device) for B, new, context in PREFILLING]


def _prefill_of(tuning: Tuning, B: int, new: int, context: int, D: int, device: torch.device) -> Workload:
    H = max(1, 768 // D)
    pages = _pages(B, context, H, D, _dtype(tuning), device)
    q = torch.randn(B * new, H, D, device=device).to(_dtype(tuning))
    starts, out = torch.arange(0, B * new + 1, new, dtype=torch.int32, device=device), torch.empty_like(q)

    def launches(tuning: Tuning) -> list[Launch]:
        return [paged_prefill.prefill_launch(out, q, *pages, starts, 1 / math.sqrt(D), tuning)]

    return Workload(f"{B} x {new} of {context}, {H} heads of {D}", launches, (out,))


def _kv_write(kernel: str, tuning: Tuning, D: int, device: torch.device) -> list[Workload]:
    return [_kv_write_of(tuning, N, D, device) for N in (64, ROWS)]


def _kv_write_of(tuning: Tuning, N: int, D: int, device: torch.device) -> Workload:
    H, dtype = max(1, 768 // D), _dtype(tuning)
    _, k, v = torch.randn(N, 3, H, D, device=device).to(dtype).unbind(1)
    k_pages, v_pages = torch.zeros(2, 2 * math.ceil(N / PAGE), PAGE, H, D, device=device, dtype=dtype)
    slots = torch.randperm(len(k_pages) * PAGE, device=device)[:N]

    def launches(tuning: Tuning) -> list[Launch]:
        return [paged.kv_write_launch(k, v, k_pages, v_pages, slots, tuning)]

    return Workload(f"{N} tokens, {H} heads of {D}", launches, (k_pages, v_pages))


def _int8_rows(kernel: str, tuning: Tuning, outputs: int, device: torch.device) -> list[Workload]:
    return [_int8_of(tuning, 1, outputs, device)]


def _int8_product(kernel: str, tuning: Tuning, R: int, device: torch.device) -> list[Workload]:
    return [_int8_of(tuning, R, 3072, device)]


def _int8_of(tuning: Tuning, R: int, outputs: int, device: torch.device) -> Workload:
    x = torch.randn(R, 768, device=device).to(_dtype(tuning))
    weight = torch.randint(-127, 128, (outputs, 768), dtype=torch.int8, device=device)
    scale, y = torch.rand(outputs, device=device), torch.empty(R, outputs, device=device, dtype=x.dtype)

    def launches(tuning: Tuning) -> list[Launch]:
        return [int8.linear_launch(y, x, weight, scale, None, tuning)]

    return Workload(f"{R} x 768 -> {outputs}", launches, (y,))


Maker = Callable[[str, Tuning, int, torch.device], list[Workload]]
# By the start of a kernel's name: the benchmarks' widths, and what uses the kernel at one of them.
MAKERS: dict[str, tuple[Sequence[int], Maker]] = {
    "norm_": (CHANNELS, _norm),
    "rms_norm_": ((64, *CHANNELS), _norm),
    "swiglu_": (HALVES, _swiglu),
    "relu2_": ((ROWS * 3072,), _relu2),
    "sum_partials": (CHANNELS, _norm),
    "attention_": (HEADS, _attention),
    "cross_entropy": (VOCABULARIES, _cross_entropy),
    "scale": ((VOCABULARIES[-1] * 768,), _scale),
    "paged_prefill": (HEADS, _prefill),
    "paged_decode": (HEADS, _decode),
    "paged_merge": (HEADS, _decode),
    "kv_write": (HEADS, _kv_write),
    "int8_rows": (OUTPUTS, _int8_rows),
    "int8_product": (BATCHES, _int8_product),
}
