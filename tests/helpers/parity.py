"""Holds a kernel against the reference in float64 and stock PyTorch at its own dtype, and guards its buffers.

`assert_op_agrees` runs an operation forward and backward, with its inputs in guarded buffers and every buffer that the
kernels allocate guarded and full of NaN, and compares all that comes out. Its parts serve alone too: `Guards`,
`poisoned`, `outputs_and_gradients`, `assert_parity`, `LAYOUTS`, `flash`.
"""

import contextlib
import math
import unittest.mock
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
import torch._dynamo  # the first call of a kernel would; but it notes torch's functions, while `poisoned` replaces them

from fastgpt_kernels import reference, torch_ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# How near float32 results are to float64, by either measure.
FLOAT32_LIMIT = 1e-5
# Standard deviations of attention's scores, for q and k that are the root of one times standard normal. Trained models
# have the wide ones, whose softmax shows every error of a score.
SPREADS = (1, 10, 40)
# Elements on either side of a guarded tensor: more than a tile of any kernel reaches past its last row.
MARGIN = 1 << 14
# Around inputs lies NaN, whatever the width, so that reading it shows in the results. Around outputs lies a small
# number, so that writing NaN there shows too.
AROUND_INPUTS, AROUND_OUTPUTS = 0xFF, 0xA5

Function = Callable[..., Any]
Tensors = Sequence[torch.Tensor | None]


def _swapped(shape: Sequence[int], make: Function) -> torch.Tensor:
    return make((shape[1], shape[0], *shape[2:])).transpose(0, 1) if len(shape) > 2 else make(shape)


# How a tensor lies in memory: each takes its shape, and a function that makes a dense tensor of a shape.
LAYOUTS: dict[str, Callable[[Sequence[int], Function], torch.Tensor]] = {
    "dense": lambda shape, make: make(shape),
    "gapped": lambda shape, make: make((*shape[:-1], shape[-1] + 3))[..., 1:-2],  # rows apart, and off the alignment
    "swapped": _swapped,  # the first two dimensions, which no single row stride describes
    "transposed": lambda shape, make: make(shape[::-1]).permute([*reversed(range(len(shape)))]),
    "expanded": lambda shape, make: make(shape[-1:]).expand(shape),
    "constant": lambda shape, make: make(()).expand(shape),  # what sum().backward() sends
}


class Guards:
    """Keeps tensors in larger buffers, and tells afterwards whether anything else was written."""

    def __init__(self) -> None:
        self._kept: list[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor | None]] = []

    def input(self, t: torch.Tensor, name: str = "an input") -> torch.Tensor:
        """The same numbers in the same strides, NaN before, behind and between them; nothing of it may be written."""
        buffer, inside = _surrounded(t, AROUND_INPUTS)
        _once(inside).copy_(_once(t))
        self._kept.append((name, buffer, buffer.clone(), None))
        return inside

    def output(self, t: torch.Tensor, name: str = "an output") -> torch.Tensor:
        """The same numbers in the same strides; only they may be written."""
        buffer, inside = _surrounded(t, AROUND_OUTPUTS)
        inside.copy_(t)
        self._kept.append((name, buffer, buffer.clone(), inside))
        return inside

    def check(self) -> None:
        """Raises AssertionError where an input was written, or memory around an output."""
        for name, buffer, before, inside in self._kept:
            after = buffer.clone()
            if inside is not None:  # may be written
                place = inside.shape, inside.stride(), inside.storage_offset()
                after.as_strided(*place).copy_(before.as_strided(*place))
            changed = (after.view(torch.uint8) != before.view(torch.uint8)).nonzero()
            if len(changed):
                first = int(changed[0]) // buffer.element_size() - MARGIN
                written = "was written to" if inside is None else "was written around"
                raise AssertionError(f"{name} {written}, first at element {first} counted from its own first")


def _surrounded(t: torch.Tensor, byte: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A buffer full of a byte, and the part of it that has t's shape and strides."""
    size = 1 + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
    memory = torch.full(((size + 2 * MARGIN) * t.element_size(),), byte, dtype=torch.uint8, device=t.device)
    buffer = memory.view(t.dtype)
    return buffer, buffer.as_strided(t.shape, t.stride(), MARGIN)


def _once(t: torch.Tensor) -> torch.Tensor:
    """The elements that an expanded tensor repeats, once each."""
    for dim, stride in enumerate(t.stride()):
        if stride == 0:
            t = t.narrow(dim, 0, min(1, t.shape[dim]))
    return t


@contextlib.contextmanager
def poisoned(guards: Guards | None = None) -> Iterator[Guards]:
    """Meanwhile each new tensor of Python code is guarded, and an empty one is full of NaN (integers: of -1).

    That is so for new_empty, new_zeros and torch's empty, empty_like, zeros and zeros_like. The guards are checked on
    the way out.
    """
    guards = Guards() if guards is None else guards

    def guarded(name: str, make: Function) -> Function:
        def replacement(*args: Any, **kwargs: Any) -> torch.Tensor:
            t = make(*args, **kwargs)
            fake = type(t) is not torch.Tensor or t.device.type != DEVICE
            if fake or not t.numel():  # nothing to write; Triton's interpreter gives an empty one another storage
                return t
            if "empty" in name:
                t.fill_(math.nan if t.is_floating_point() else -1)
            return guards.output(t, f"{tuple(t.shape)} from {name}")

        return replacement

    methods = [(torch.Tensor, name) for name in ("new_empty", "new_zeros")]
    functions = [(torch, name) for name in ("empty", "empty_like", "zeros", "zeros_like")]
    with contextlib.ExitStack() as patches:
        for owner, name in methods + functions:
            replacement = guarded(name, getattr(owner, name))
            patches.enter_context(unittest.mock.patch.object(owner, name, replacement))
        yield guards
    guards.check()


def outputs_and_gradients(
    function: Function,
    inputs: Tensors,
    grad_outs: Tensors,
    *,
    trained: Collection[int] | None = None,
    **arguments: Any,
) -> list[torch.Tensor | None]:
    """Every output of an operation, then each input's gradient (None where it has none).

    Args:
        function: an operation; it gives a tensor or a tuple of them.
        inputs: its positional arguments, None for one that is absent.
        grad_outs: the gradient of each output, None for an output that is not used.
        trained: the positions in `inputs` that require a gradient; default all.
        arguments: passed on by keyword.
    """
    places = [i for i, t in enumerate(inputs) if t is not None and (trained is None or i in trained)]
    leaves = [t if t is None else t.detach().requires_grad_(i in places) for i, t in enumerate(inputs)]
    out = function(*leaves, **arguments)
    out = out if isinstance(out, tuple) else (out,)
    used, grads = zip(*((o, g) for o, g in zip(out, grad_outs, strict=True) if g is not None), strict=True)
    found = torch.autograd.grad(used, [leaves[i] for i in places], grads, allow_unused=True)
    gradients = dict(zip(places, found, strict=True))
    return [*(o.detach() for o in out), *(gradients.get(i) for i in range(len(inputs)))]


def zeros(*shape: int, dtype: torch.dtype = torch.float32, device: str = DEVICE) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def relative_errors(a: torch.Tensor, truth: torch.Tensor) -> tuple[float, float]:
    """||a - truth|| / ||truth|| and max|a - truth| / max|truth|, for a truth that is not all zero."""
    difference = a.double() - truth
    return (
        (difference.norm() / truth.norm()).item(),
        (difference.abs().max() / truth.abs().max()).item(),
    )


def half_an_ulp(dtype: torch.dtype, value: float) -> float:
    """Half the distance between the numbers of a dtype around a positive value."""
    info = torch.finfo(dtype)
    return info.eps / 2 * 2.0 ** math.floor(math.log2(max(value, info.smallest_normal)))


def limit(dtype: torch.dtype, truth: torch.Tensor, stock_error: float, narrow: bool, spread: float = 1) -> float:
    """How large the relative error of a result in this dtype may be, by either measure.

    float32: 1e-5; where `narrow`, so where something on the way to it is in 16 bits, twice stock PyTorch's error if
    that is more. 16 bits: twice stock PyTorch's error, or half an ulp at the truth's largest number if that is more,
    because stock is exact by luck now and then in a tensor of few numbers.

    `spread`: of attention's scores, of which the largest are four times that. Such a score, and the log-sum-exp that
    the backward pass takes from the forward pass in one float32, are each off by half an ulp, for 160 (231 in base 2)
    by 5e-6, and a weight is off by as much relatively.
    """
    if dtype == torch.float32:
        exact = FLOAT32_LIMIT * max(1, spread / 10)
        return max(exact, 2 * stock_error) if narrow else exact
    largest = truth.abs().max().item()
    return max(2 * stock_error, half_an_ulp(dtype, largest) / largest)


def assert_parity(
    ours: Tensors,
    plain: Tensors,
    truth: Tensors,
    names: Sequence[str] | None = None,
    *,
    other: Tensors | None = None,
    spread: float = 1,
) -> None:
    """Hold results against float64, by both measures and within `limit`.

    Where the truth is zero throughout, so is the result; where there is no gradient, there is none.

    Args:
        ours, plain: what our kernels and stock PyTorch give.
        truth: the reference's results in float64.
        other: what stock PyTorch gives by another path; of the two errors the larger counts, as either may be luck.
        spread: the standard deviation of attention's scores, as in `limit`.
    """
    narrow = any(t is not None and t.element_size() == 2 for t in ours)
    names = names or [f"result {i}" for i in range(len(truth))]
    for name, a, b, other_b, c in zip(names, ours, plain, other or plain, truth, strict=True):
        if c is None:
            assert a is None, name
            continue
        assert a is not None, f"{name} has no gradient"
        assert (a.shape, a.dtype) == (c.shape, b.dtype), name
        assert a.isfinite().all(), f"{name} is not finite"
        if not c.any():
            assert not a.any(), f"{name} should be zero"
            continue
        stock_errors = map(max, relative_errors(b, c), relative_errors(other_b, c))
        for measure, error, stock_error in zip(("norm", "maximum"), relative_errors(a, c), stock_errors, strict=True):
            most = limit(a.dtype, c, stock_error, narrow, spread)
            assert error <= most, f"{name}: {measure} off by {error:.2e}, not {most:.2e} (stock: {stock_error:.2e})"


def assert_op_agrees(
    ours: Function,
    op: str,
    inputs: Tensors,
    *,
    layout: str = "dense",
    used: Collection[int] | None = None,
    plain: Function | None = None,
    other: Function | None = None,
    spread: float = 1,
    **arguments: Any,
) -> None:
    """Hold an operation against its twins, forward and every gradient, guarded and poisoned.

    Args:
        ours: our operation, with the signature of reference's.
        op: the twins' name.
        inputs: the positional arguments, all of which require gradients; None for one that is absent.
        layout: of the gradients of the outputs, from `LAYOUTS`.
        used: the outputs that get a gradient; default all.
        plain: what stands for stock PyTorch; default `torch_ops`'s operation.
        other: another path of stock PyTorch, as in `assert_parity`.
        spread: the standard deviation of attention's scores, as in `limit`.
        arguments: passed on by keyword; tensors among them are guarded too.
    """
    plain = plain or getattr(torch_ops, op)
    with torch.no_grad():
        out = plain(*inputs, **arguments)
    grad_outs = [
        LAYOUTS[layout](o.shape, lambda shape, o=o: torch.randn(shape, device=DEVICE).to(o.dtype))
        if used is None or i in used
        else None
        for i, o in enumerate(out if isinstance(out, tuple) else (out,))
    ]

    def wide(t: Any) -> Any:
        return t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t

    truth = outputs_and_gradients(
        getattr(reference, op),
        [*map(wide, inputs)],
        [*map(wide, grad_outs)],
        **{k: wide(v) for k, v in arguments.items()},
    )
    expected = outputs_and_gradients(plain, inputs, grad_outs, **arguments)
    others = outputs_and_gradients(other, inputs, grad_outs, **arguments) if other else None
    guards = Guards()

    def guarded(t: Any, name: str) -> Any:
        return guards.input(t, name) if isinstance(t, torch.Tensor) else t

    placed = [guarded(t, f"input {i}") for i, t in enumerate(inputs)]
    placed_grads = [guarded(t, f"grad_out {i}") for i, t in enumerate(grad_outs)]
    placed_arguments = {name: guarded(value, name) for name, value in arguments.items()}
    with poisoned(guards):
        got = outputs_and_gradients(ours, placed, placed_grads, **placed_arguments)
    names = [f"output {i}" for i in range(len(grad_outs))] + [f"gradient of input {i}" for i in range(len(inputs))]
    assert_parity(got, expected, truth, names, other=others, spread=spread)


def flash_with_mask(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grad: torch.Tensor,
    keep: torch.Tensor | float,
    p: float,
    scale: float,
    doc_ids: torch.Tensor | None,
) -> list[torch.Tensor]:
    """(out, dq, dk, dv) by the kernels' formulas, with every factor of a product rounded to q's dtype."""
    dtype, group = q.dtype, q.shape[2] // k.shape[2]

    def rounded(t: torch.Tensor) -> torch.Tensor:
        return t.to(dtype).float()

    q, k, v, grad = (t.float() for t in (q, k.repeat_interleave(group, 2), v.repeat_interleave(group, 2), grad))
    kept = keep / (1 - p)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * scale
    P = scores.masked_fill(~reference.visible(q.shape[1], k.shape[1], doc_ids, q.device), float("-inf")).softmax(-1)
    out = rounded(torch.einsum("bhij,bjhd->bihd", rounded(P * kept), v))
    delta = (grad * out).sum(-1).mT[..., None]
    dS = rounded(P * (torch.einsum("bihd,bjhd->bhij", grad, v) * kept - delta)) * scale
    dq = torch.einsum("bhij,bjhd->bihd", dS, k)
    dk, dv = (torch.einsum("bhij,bihd->bjhd", a, b) for a, b in ((dS, q), (rounded(P * kept), grad)))
    return [t.to(dtype) for t in (out, dq, *(t.unflatten(2, (-1, group)).sum(3) for t in (dk, dv)))]


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, scale, doc_ids):
        ctx.save_for_backward(q, k, v)
        ctx.rest = (1.0, 0.0, scale, doc_ids)
        return flash_with_mask(q, k, v, torch.zeros_like(q), *ctx.rest)[0]

    @staticmethod
    def backward(ctx, *grads):
        return *flash_with_mask(*ctx.saved_tensors, *grads, *ctx.rest)[1:], None, None


def flash(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None = None,
    doc_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """`reference.causal_attention` by the kernels' formulas, whose backward pass takes delta from the rounded output.

    That is most of the error of wide scores. Stock PyTorch takes a path without it for inputs that its fused kernels
    refuse: other shapes on each device.
    """
    return _Flash.apply(q, k, v, 1 / math.sqrt(q.shape[-1]) if scale is None else scale, doc_ids)


def same_bits(first: Tensors, second: Tensors) -> bool:
    """Whether two lists hold equal tensors, and None at the same places."""
    return all(a is b if a is None or b is None else torch.equal(a, b) for a, b in zip(first, second, strict=True))
