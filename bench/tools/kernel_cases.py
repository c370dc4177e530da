"""The table of kernel benchmarks: operation x direction x backend x shape, in order of importance, and their inputs.

Shapes by their letters: B batch, T tokens of a sequence, N tokens in all, C channels, H heads, D head size,
V vocabulary, out the channels that a linear layer makes of C; context the tokens that a decoding sequence sees, and
shuffled whether its pages lie in no order.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from fastgpt.errors import UsageError
from fastgpt.ops import table

P = 16  # slots a page
WIDTHS = (768, 1024, 1280, 1600)  # GPT-2 small, medium, large, xl
TOKENS = 16384  # of a training batch
CONTEXTS = (128, 512, 2048, 8192, 32768)
BATCHES = (1, 2, 4, 8, 16, 32, 64)
V = 50304
GPT2_LINEAR = ((768, 2304), (768, 3072), (3072, 768), (768, V))  # from C channels to so many

Shape = Mapping[str, int]


@dataclass(frozen=True)
class Case:
    """One benchmark. `tier` 0 is measured first, and with every backend and peer."""

    op: str
    direction: str  # forward, backward, or both: of the loss, whose forward pass computes the gradients
    backend: str
    shape: Shape
    dtype: str
    tier: int

    @property
    def key(self) -> str:
        """The case in a test's name."""
        sizes = "-".join(f"{name}{size}" for name, size in self.shape.items())
        return f"{self.op}-{self.direction}-{self.backend}-{sizes}-{self.dtype}"


# The directions of each operation, in order of importance.
DIRECTIONS = {
    "causal_attention": ("forward", "backward"),
    "linear_cross_entropy": ("both", "forward"),
    "paged_attention": ("forward",),
    "linear_int8": ("forward",),
    "add_layer_norm": ("forward", "backward"),
    "layer_norm": ("forward", "backward"),
    "add_rms_norm": ("forward", "backward"),
    "rms_norm": ("forward", "backward"),
    "swiglu": ("forward", "backward"),
    "relu2": ("forward", "backward"),
    "kv_write": ("forward",),
}

# By device and operation: what is measured first, what then, and what if there is time; every shape in each dtype.
SHAPES: dict[str, dict[str, tuple[Sequence[Shape], ...]]] = {
    "cuda": {
        "causal_attention": (
            [{"B": 16, "T": 1024, "H": 12, "D": 64}],
            [{"B": TOKENS // T, "T": T, "H": 12, "D": 64} for T in (2048, 4096, 8192, 16384)]
            + [{"B": 16, "T": 1024, "H": 6, "D": 128}],
            [{"B": TOKENS // T, "T": T, "H": 6, "D": 128} for T in (2048, 4096, 8192, 16384)]
            + [{"B": 16, "T": 1024, "H": C // D, "D": D} for D in (64, 128) for C in WIDTHS[1:] if C % D == 0],
        ),
        "linear_cross_entropy": (
            [{"N": TOKENS, "C": 768, "V": V}],
            [{"N": TOKENS, "C": C, "V": V} for C in WIDTHS[1:]],
            [{"N": N, "C": C, "V": V} for N in (1024, 4096) for C in WIDTHS],
        ),
        "paged_attention": (
            [{"B": B, "context": 2048, "H": 12, "D": 64, "shuffled": 1} for B in (1, 64)],
            [{"B": B, "context": context, "H": 12, "D": 64, "shuffled": 1} for B in (1, 8, 64) for context in CONTEXTS],
            [{"B": B, "context": context, "H": 12, "D": 64, "shuffled": 1} for B in BATCHES for context in CONTEXTS]
            + [{"B": B, "context": context, "H": 6, "D": 128, "shuffled": 1} for B in (1, 64) for context in CONTEXTS],
        ),
        "linear_int8": (
            [{"N": 1, "C": 768, "out": V}, {"N": 1, "C": 768, "out": 3072}],
            [{"N": N, "C": C, "out": out} for N in (1, 8, 64) for C, out in GPT2_LINEAR],
            [{"N": N, "C": C, "out": 4 * C} for N in (1, 64) for C in WIDTHS],
        ),
        "add_layer_norm": (
            [{"N": TOKENS, "C": 768}],
            [{"N": TOKENS, "C": C} for C in WIDTHS[1:]],
            [{"N": N, "C": C} for N in (1024, 4096) for C in WIDTHS],
        ),
        "layer_norm": (
            [{"N": TOKENS, "C": 768}],
            [{"N": TOKENS, "C": C} for C in WIDTHS[1:]],
            [{"N": N, "C": C} for N in (1024, 4096) for C in WIDTHS],
        ),
        "add_rms_norm": (
            [{"N": TOKENS, "C": 768}],
            [{"N": TOKENS, "C": C} for C in WIDTHS[1:]],
        ),
        "rms_norm": (
            [{"N": TOKENS, "C": 768}],
            [{"N": TOKENS, "C": C} for C in WIDTHS[1:]] + [{"N": TOKENS * 12, "C": 64}],  # the heads of queries
        ),
        "swiglu": ([{"N": TOKENS, "C": 2048}], [{"N": TOKENS, "C": C} for C in (3072, 4096)]),
        "relu2": ([{"N": TOKENS, "C": 3072}], [{"N": TOKENS, "C": 4 * C} for C in WIDTHS[1:]]),
        "kv_write": (
            [{"N": 64, "H": 12, "D": 64}],
            [{"N": N, "H": 12, "D": 64} for N in (1, 8, 1024)],
            [{"N": N, "H": 6, "D": 128} for N in (1, 64, 1024)],
        ),
    },
    "cpu": {
        "causal_attention": (
            [{"B": 4, "T": 256, "H": 6, "D": 64}],
            [{"B": 1, "T": 1024, "H": 12, "D": 64}],
        ),
        "linear_cross_entropy": (
            [{"N": 1024, "C": 384, "V": 256}],
            [{"N": 64, "C": 768, "V": V}],
        ),
        "paged_attention": (
            [{"B": 1, "context": 128, "H": 12, "D": 64, "shuffled": 0}],
            [
                {"B": 1, "context": 1024, "H": 12, "D": 64, "shuffled": 0},
                {"B": 8, "context": 1024, "H": 12, "D": 64, "shuffled": 1},
            ],
        ),
        "linear_int8": (
            [{"N": 1, "C": 768, "out": 3072}],
            [{"N": 1, "C": 768, "out": V}, {"N": 8, "C": 768, "out": 3072}],
        ),
        "add_layer_norm": ([{"N": 1024, "C": 384}], [{"N": 1024, "C": 768}, {"N": 1, "C": 768}]),
        "layer_norm": ([{"N": 1024, "C": 384}], [{"N": 1024, "C": 768}, {"N": 1, "C": 768}]),
        "add_rms_norm": ([{"N": 1024, "C": 384}], [{"N": 768, "C": 128}, {"N": 1, "C": 768}]),
        "rms_norm": ([{"N": 1024, "C": 384}], [{"N": 768, "C": 128}, {"N": 3072, "C": 32}]),
        "swiglu": ([{"N": 1024, "C": 1024}], [{"N": 768, "C": 344}]),
        "relu2": ([{"N": 1024, "C": 1536}], [{"N": 768, "C": 512}]),
        "kv_write": ([{"N": 1, "H": 12, "D": 64}], [{"N": N, "H": 12, "D": 64} for N in (8, 256)]),
    },
}

DTYPES = {"cuda": ("bfloat16",), "cpu": ("float32",)}
MORE_DTYPES = {  # at the first shapes
    ("cuda", "layer_norm"): ("float32",),
    ("cuda", "add_layer_norm"): ("float32",),
    ("cuda", "rms_norm"): ("float32",),
    ("cuda", "add_rms_norm"): ("float32",),
    ("cpu", "swiglu"): ("bfloat16",),
    ("cpu", "relu2"): ("bfloat16",),
    ("cuda", "causal_attention"): ("float16", "float32"),
    ("cpu", "causal_attention"): ("bfloat16",),
    ("cpu", "linear_cross_entropy"): ("bfloat16",),
    ("cpu", "linear_int8"): ("bfloat16",),
}


def cases(device: torch.device) -> list[Case]:
    """Every benchmark of this device, the most important first; each shape once."""
    found: dict[str, Case] = {}
    for tier in range(3):
        for op, directions in DIRECTIONS.items():
            if op not in table.TABLE:
                continue
            for shape, dtype in _shapes(op, device.type, tier):
                for direction in directions:
                    for backend in backends(op, device):
                        case = Case(op, direction, backend, shape, dtype, tier)
                        if backend != "reference" or tier == 0:  # it is readable, not fast
                            found.setdefault(case.key, case)
    return list(found.values())


def _shapes(op: str, kind: str, tier: int) -> list[tuple[Shape, str]]:
    tiers = SHAPES[kind][op]
    dtypes = DTYPES[kind] + (MORE_DTYPES.get((kind, op), ()) if tier == 0 else ())
    return [(shape, dtype) for shape in (tiers[tier] if tier < len(tiers) else ()) for dtype in dtypes]


def backends(op: str, device: torch.device) -> list[str]:
    """The backends of an operation that can be measured here; the first is the one that the claims are about."""
    names = ["torch", "reference"]
    if device.type == "cuda" and table.TABLE[op].triton:
        try:
            table.resolve("triton", device)
        except UsageError:  # the GPU is too old; in the interpreter, on a CPU, speed means nothing
            return names
        names.insert(0, "triton")
    return names


def inputs(case: Case, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Fresh random arguments of the operation, positional; with gradients where the case goes backward."""
    args, trained = INPUTS[case.op](Random(getattr(torch, case.dtype), device), **case.shape)
    if case.direction != "forward":
        for t in args[:trained]:
            t.requires_grad_()
    return args


class Random:
    """Random tensors of one dtype on one device."""

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self.dtype, self.device = dtype, device

    def __call__(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=self.dtype, device=self.device)

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.randint(low, high, shape, dtype=dtype, device=self.device)

    def order(self, n: int) -> torch.Tensor:
        return torch.randperm(n, device=self.device)


# Each: the arguments, and how many of them, from the first on, have gradients.
Made = tuple[tuple[torch.Tensor, ...], int]


def layer_norm(random: Random, N: int, C: int) -> Made:
    return (random(N, C), random(C), random(C)), 3


def add_layer_norm(random: Random, N: int, C: int) -> Made:
    return (random(N, C), random(N, C), random(C), random(C)), 4


def rms_norm(random: Random, N: int, C: int) -> Made:
    return (random(N, C), random(C)), 2


def add_rms_norm(random: Random, N: int, C: int) -> Made:
    return (random(N, C), random(N, C), random(C)), 3


def swiglu(random: Random, N: int, C: int) -> Made:
    """To C columns, from two halves of C."""
    return (random(N, 2 * C),), 1


def relu2(random: Random, N: int, C: int) -> Made:
    return (random(N, C),), 1


def causal_attention(random: Random, B: int, T: int, H: int, D: int) -> Made:
    return (random(B, T, H, D), random(B, T, H, D), random(B, T, H, D)), 3


def linear_cross_entropy(random: Random, N: int, C: int, V: int) -> Made:
    return (random(N, C), random(V, C).mul_(0.02), random.integers(0, V, N)), 2


def paged_attention(random: Random, B: int, context: int, H: int, D: int, shuffled: int) -> Made:
    """Decoding: one query a sequence; the pages lie in order or in none."""
    M = context // P
    k, v = random(B * M, P, H, D), random(B * M, P, H, D)
    pages = random.order(B * M) if shuffled else torch.arange(B * M, device=random.device)
    lengths = torch.full((B,), context, dtype=torch.int32, device=random.device)
    return (random(B, H, D), k, v, pages.int().view(B, M), lengths), 0


def kv_write(random: Random, N: int, H: int, D: int) -> Made:
    pages = 2 * (N // P + 1)
    slots = random.order(pages * P)[:N]
    return (random(N, H, D), random(N, H, D), random(pages, P, H, D), random(pages, P, H, D), slots), 0


def linear_int8(random: Random, N: int, C: int, out: int) -> Made:
    scale = torch.rand(out, device=random.device) * 1e-3
    return (random(N, C), random.integers(-127, 128, out, C, dtype=torch.int8), scale), 0


INPUTS = {
    "layer_norm": layer_norm,
    "add_layer_norm": add_layer_norm,
    "rms_norm": rms_norm,
    "add_rms_norm": add_rms_norm,
    "swiglu": swiglu,
    "relu2": relu2,
    "causal_attention": causal_attention,
    "linear_cross_entropy": linear_cross_entropy,
    "paged_attention": paged_attention,
    "kv_write": kv_write,
    "linear_int8": linear_int8,
}
