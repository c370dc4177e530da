"""The table: each operation's implementations side by side, and the one place where a backend is chosen.

    ops = resolve("auto", device, choose=autotune.chooser(workloads.training(config, dtype)))
    model = GPT(config, ops)

Nothing else decides which code runs. A run saves `ops.backends`, and a resumed run passes them back. Triton is imported
when its backend is chosen, so that everything else works where it is not installed.
"""

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from fastgpt.errors import UsageError
from fastgpt_kernels import reference, torch_ops


class Row(NamedTuple):
    """One operation: readable math, PyTorch's best path, and the module of `fastgpt_kernels` with our Triton kernel."""

    reference: Callable[..., Any]
    torch: Callable[..., Any]
    triton: str


TABLE: dict[str, Row] = {
    "layer_norm": Row(reference.layer_norm, torch_ops.layer_norm, "norm"),
    "add_layer_norm": Row(reference.add_layer_norm, torch_ops.add_layer_norm, "norm"),
    "rms_norm": Row(reference.rms_norm, torch_ops.rms_norm, "norm"),
    "add_rms_norm": Row(reference.add_rms_norm, torch_ops.add_rms_norm, "norm"),
    "swiglu": Row(reference.swiglu, torch_ops.swiglu, "activation"),
    "relu2": Row(reference.relu2, torch_ops.relu2, "activation"),
    "causal_attention": Row(reference.causal_attention, torch_ops.causal_attention, "attention"),
    "linear_cross_entropy": Row(reference.linear_cross_entropy, torch_ops.linear_cross_entropy, "cross_entropy"),
    "paged_attention": Row(reference.paged_attention, torch_ops.paged_attention, "paged"),
    "kv_write": Row(reference.kv_write, torch_ops.kv_write, "paged"),
    "linear_int8": Row(reference.linear_int8, torch_ops.linear_int8, "int8"),
}


class Chosen(Protocol):
    """Backends that somebody chose for some operations, and why these."""

    @property
    def backends(self) -> Mapping[str, str]: ...

    @property
    def reason(self) -> str: ...


Chooser = Callable[[torch.device], Chosen]


def implementation(op: str, backend: str) -> Callable[..., Any]:
    """The function in a backend of an operation's row."""
    cell = getattr(TABLE[op], backend)
    return getattr(importlib.import_module(f"fastgpt_kernels.{cell}"), op) if backend == "triton" else cell


@dataclass(frozen=True)
class Ops:
    """The chosen implementation of each operation; `backends` names them and `reason` says why.

    `interpreted` says that Triton's kernels run in its interpreter, on the CPU: for tests and toy sizes.
    """

    layer_norm: Callable[..., torch.Tensor]
    add_layer_norm: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    rms_norm: Callable[..., torch.Tensor]
    add_rms_norm: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    swiglu: Callable[..., torch.Tensor]
    relu2: Callable[..., torch.Tensor]
    causal_attention: Callable[..., torch.Tensor]
    linear_cross_entropy: Callable[..., torch.Tensor]
    paged_attention: Callable[..., torch.Tensor]
    kv_write: Callable[..., None]
    linear_int8: Callable[..., torch.Tensor]
    backends: Mapping[str, str]
    reason: str
    interpreted: bool = False

    def __str__(self) -> str:
        used = set(self.backends.values())
        named = used.pop() if len(used) == 1 else ", ".join(f"{op}={c}" for op, c in self.backends.items())
        return f"{named} ({self.reason})"


def resolve(
    kernels: str = "auto",
    device: torch.device | str = "cpu",
    *,
    recorded: Mapping[str, str] | None = None,
    choose: Chooser | None = None,
) -> Ops:
    """Choose a backend for every operation.

    Args:
        kernels: "reference", "torch" or "triton" forces that backend; "auto" asks `choose` on CUDA, and takes torch
            elsewhere, for operations that were not chosen, and without `choose`.
        device: where the model runs.
        recorded: the backends of an earlier part of this run, which "auto" then keeps.
        choose: finds the fastest backends on a GPU, such as `fastgpt.ops.autotune.chooser`.

    Raises:
        UsageError: the backend does not exist, or cannot run on this device.
    """
    device = torch.device(device)
    if kernels not in ("auto", *Row._fields):
        raise UsageError(f"`kernels` {kernels!r} is not one of auto, {', '.join(Row._fields)}")
    backends = dict.fromkeys(TABLE, "torch" if kernels == "auto" else kernels)
    reason, asked, instead = f"`kernels` {kernels}", "`kernels` triton", "use `kernels` auto"
    if kernels == "auto" and recorded is not None:
        backends |= recorded
        reason, asked, instead = "as this run began", "this run, made with `kernels` triton,", "pass `kernels` torch"
    elif kernels == "auto":
        timed, reason = _fastest(device, choose)
        backends |= timed
    for op, backend in backends.items():
        if op not in TABLE or backend not in Row._fields:
            raise UsageError(f"the run was made with {backend} for {op}, which this version has not; pass `kernels`")
    interpreted = False
    if "triton" in backends.values():
        if lacking := _triton_lacks(device):
            raise UsageError(f"{asked} needs {lacking}; {instead}")
        if interpreted := _interpreting():
            reason += ", in Triton's interpreter"
    chosen = {op: implementation(op, backend) for op, backend in backends.items()}
    return Ops(**chosen, backends=backends, reason=reason, interpreted=interpreted)


def _fastest(device: torch.device, choose: Chooser | None) -> tuple[Mapping[str, str], str]:
    """The backends that are faster on this device than another that can run there, and why these."""
    if device.type != "cuda":
        return {}, f"auto: the fast backend of this version on {device.type}"
    if choose is None:
        return {}, "auto: without a workload to time"
    if lacking := _triton_lacks(device):
        return {}, f"auto: triton needs {lacking}"
    if _interpreting():
        return {}, "auto: Triton's interpreter is slow"
    chosen = choose(device)
    return chosen.backends, f"auto: {chosen.reason}"


def _triton_lacks(device: torch.device) -> str | None:
    """The reason why Triton's kernels cannot run; None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton, found none"
    if _interpreting():
        import numpy
        import triton

        # Triton 3.6's interpreter takes an array of one number for a number, which numpy has since given up.
        old, new = triton.__version__.startswith("3.6."), tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4)
        return f"numpy before 2.4 in Triton 3.6's interpreter, found {numpy.__version__}" if old and new else None
    if device.type != "cuda":
        return f"a CUDA GPU, found {device}"
    major, minor = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and major < 8:
        return f"compute capability 8.0 or newer, found {major}.{minor}"
    return None


def _interpreting() -> bool:
    from fastgpt_kernels import launch  # imports triton

    return launch.INTERPRETED
