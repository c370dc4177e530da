"""Other implementations of each operation: stock PyTorch, compiled math, FlexAttention, liger-kernel.

    here, left_out = contenders(case, device)      names -> Contender, names -> why not
    call = prepared(contender, args, direction)    timed; what a pass needs beforehand is done

A contender takes an operation's arguments and returns a call without arguments, so that what need not be done in each
call (a mask, a layout) is not timed.
"""

import importlib.util
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.tools.kernel_cases import Case
from fastgpt.ops import table

Contender = Callable[..., Callable[[], Any]]
HOST = "reads lengths and slots on the host, so that it cannot be compiled as one graph"
SLOW_TO_COMPILE = "compiled at the first shapes alone (on a CPU: forward, float32): it takes longer than the case"
COMPILED = "compiled reference"
CHUNKED = "F.linear_cross_entropy, chunked"


def contenders(case: Case, device: torch.device, main: str) -> tuple[dict[str, Contender], dict[str, str]]:
    """The peers of a case, and those that are left out with the reason.

    The backend that the claims are about (`main`) meets every peer; the others meet PyTorch's backend.
    """
    peers: dict[str, Contender] = {}
    left_out: dict[str, str] = {}
    if case.backend != "torch":
        peers["torch backend"] = backend(case.op, "torch")
    if case.backend != main:
        return peers, left_out
    peers |= PEERS[case.op](case, device)
    if case.op == "linear_cross_entropy" and CHUNKED not in peers:
        left_out[CHUNKED] = "PyTorch has it from 2.13 on"
    if case.op in ("paged_attention", "kv_write"):
        left_out[COMPILED] = HOST
    elif case.tier > 0 or (device.type == "cpu" and (case.direction, case.dtype) != ("forward", "float32")):
        left_out[COMPILED] = SLOW_TO_COMPILE
    else:
        peers[COMPILED] = compiled(case.op)
    if device.type == "cuda" and case.op in LIGER:
        if importlib.util.find_spec("liger_kernel") is None:
            left_out["liger-kernel"] = "not installed"
        else:
            peers["liger-kernel"] = LIGER[case.op]
    return peers, left_out


def as_contender(function: Callable[..., Any]) -> Contender:
    """A function that needs nothing done beforehand."""
    return partial(partial, function)


def backend(op: str, name: str) -> Contender:
    """An operation of our table."""
    return as_contender(table.implementation(op, name))


def compiled(op: str) -> Contender:
    """The readable math, compiled for the shapes at hand."""
    return as_contender(torch.compile(table.implementation(op, "reference"), dynamic=False, fullgraph=True))


def prepared(contender: Contender, args: Sequence[torch.Tensor], direction: str) -> Callable[[], Any]:
    """A call of one direction: forward returns the outputs; backward, and both, the gradients of the arguments.

    Call it, and what it returns, with gradients enabled unless the direction is forward.
    """
    forward = contender(*args)
    if direction == "forward":
        return forward
    trained = [t for t in args if t.requires_grad]
    if direction == "both":
        return lambda: _gradients(tensors(forward()), trained)
    outs = tensors(forward())
    random = torch.Generator(outs[0].device).manual_seed(0)  # the same for every contender, to compare them
    given = [torch.randn(t.shape, generator=random, dtype=t.dtype, device=t.device) for t in outs]
    return lambda: torch.autograd.grad(outs, trained, given, retain_graph=True)


def _gradients(outs: list[torch.Tensor], trained: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Of the sum of all outputs."""
    return torch.autograd.grad(outs, trained, [torch.ones_like(t) for t in outs])


def tensors(result: Any) -> list[torch.Tensor]:
    """The results of a call, as a list."""
    if result is None:
        return []
    return [result] if isinstance(result, torch.Tensor) else list(result)


def distance(ours: Any, theirs: Any) -> float:
    """The distance of two results: the largest, over the tensors, of the difference's norm by the other's norm."""
    pairs = zip(tensors(ours), tensors(theirs), strict=True)
    return max((_relative(a.double(), b.double()) for a, b in pairs), default=0.0)


def _relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm().clamp(min=1e-30)).item()


def layer_norm(case: Case, device: torch.device) -> dict[str, Contender]:
    return {"F.layer_norm": lambda x, weight, bias: lambda: F.layer_norm(x, weight.shape, weight, bias)}


def add_layer_norm(case: Case, device: torch.device) -> dict[str, Contender]:
    def add_then_norm(x, residual, weight, bias):
        total = x + residual
        return total, F.layer_norm(total, weight.shape, weight, bias)

    return {"add, F.layer_norm": as_contender(add_then_norm)}


def rms_norm(case: Case, device: torch.device) -> dict[str, Contender]:
    return {"F.rms_norm": lambda x, weight: lambda: F.rms_norm(x, weight.shape, weight, 1e-5)}


def add_rms_norm(case: Case, device: torch.device) -> dict[str, Contender]:
    def add_then_norm(x, residual, weight):
        total = x + residual
        return total, F.rms_norm(total, weight.shape, weight, 1e-5)

    return {"add, F.rms_norm": as_contender(add_then_norm)}


def swiglu(case: Case, device: torch.device) -> dict[str, Contender]:
    def silu_then_product(x):
        a, b = x.chunk(2, -1)
        return F.silu(a) * b

    return {"F.silu(a) * b": as_contender(silu_then_product)}


def relu2(case: Case, device: torch.device) -> dict[str, Contender]:
    return {"F.relu(x).square()": as_contender(lambda x: F.relu(x).square())}


def causal_attention(case: Case, device: torch.device) -> dict[str, Contender]:
    if device.type == "cpu":
        return {"SDPA": sdpa(None)}
    return {
        "SDPA flash": sdpa(SDPBackend.FLASH_ATTENTION),
        "SDPA cuDNN": sdpa(SDPBackend.CUDNN_ATTENTION),
        "FlexAttention": flex_attention,
    }


def sdpa(backend: SDPBackend | None) -> Contender:
    """SDPA by one of its kernels, or by the one that it chooses."""

    def contender(q, k, v):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # each (B, H, T, D)

        def call() -> torch.Tensor:
            if backend is None:
                return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

        return call

    return contender


def flex_attention(q, k, v):
    """FlexAttention, compiled, with a block mask that skips what is hidden."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    attend, T = torch.compile(flex_attention, dynamic=False), q.shape[1]
    mask = create_block_mask(_causal, B=None, H=None, Q_LEN=T, KV_LEN=T, device=q.device.type)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return lambda: attend(q, k, v, block_mask=mask).transpose(1, 2)


def _causal(b, h, query, key):
    return query >= key


def linear_cross_entropy(case: Case, device: torch.device) -> dict[str, Contender]:
    def linear_then_loss(x, weight, targets):
        return F.cross_entropy(F.linear(x, weight).float(), targets)

    return {"F.linear, F.cross_entropy": as_contender(linear_then_loss)} | chunked()


def chunked() -> dict[str, Contender]:
    """PyTorch's own loss that works by chunks of rows, from PyTorch 2.13 on; before, none."""
    if not hasattr(F, "linear_cross_entropy"):
        return {}
    return {CHUNKED: as_contender(partial(F.linear_cross_entropy, options=torch.nn.LinearCrossEntropyOptions()))}


def paged_attention(case: Case, device: torch.device) -> dict[str, Contender]:
    def dense(q, k_pages, v_pages, block_table, lengths):
        """The same keys and values, side by side."""
        q = q[:, :, None]  # (B, H, 1, D)
        k, v = (t[block_table.long()].flatten(1, 2).transpose(1, 2).contiguous() for t in (k_pages, v_pages))
        return lambda: F.scaled_dot_product_attention(q, k, v)[:, :, 0]

    return {"SDPA, dense cache": dense}


def kv_write(case: Case, device: torch.device) -> dict[str, Contender]:
    def by_index(k, v, k_pages, v_pages, slots):
        flat_k, flat_v = (t.view(-1, *t.shape[2:]) for t in (k_pages, v_pages))

        def call() -> None:
            flat_k[slots], flat_v[slots] = k, v

        return call

    return {"pages[slots] = k": by_index}


def linear_int8(case: Case, device: torch.device) -> dict[str, Contender]:
    """The same layer in float32 and bfloat16, and PyTorch's own product with 8-bit weights."""

    def dense(dtype: torch.dtype) -> Contender:
        def contender(x, weight_int8, scale):
            weight = (weight_int8 * scale[:, None]).to(dtype)
            return partial(F.linear, x.to(dtype), weight)

        return contender

    def packed(x, weight_int8, scale):
        return partial(torch.ops.aten._weight_int8pack_mm, x, weight_int8, scale.to(x.dtype))

    return {
        "F.linear, float32": dense(torch.float32),
        "F.linear, bfloat16": dense(torch.bfloat16),
        "_weight_int8pack_mm": packed,
    }


PEERS = {
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


def liger_layer_norm(x, weight, bias):
    from liger_kernel.transformers.functional import liger_layer_norm  # pyright: ignore[reportMissingImports]

    return lambda: liger_layer_norm(x, weight, bias, 1e-5)


def liger_rms_norm(x, weight):
    from liger_kernel.transformers.functional import liger_rms_norm  # pyright: ignore[reportMissingImports]

    return lambda: liger_rms_norm(x, weight, 1e-5, in_place=False)  # else its backward overwrites its gradient


def liger_linear_cross_entropy(x, weight, targets):
    from liger_kernel.transformers.functional import (  # pyright: ignore[reportMissingImports]
        liger_fused_linear_cross_entropy,
    )

    return lambda: liger_fused_linear_cross_entropy(x, weight, targets)


LIGER: dict[str, Contender] = {
    "layer_norm": liger_layer_norm,
    "rms_norm": liger_rms_norm,
    "linear_cross_entropy": liger_linear_cross_entropy,
}
