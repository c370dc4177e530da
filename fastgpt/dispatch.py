"""The table: each operation's implementations side by side, and the one place where a column is chosen.

    ops = dispatch.resolve("auto", torch.device("cpu"))
    model = GPT(config, ops)

Nothing else decides which code runs. A run saves `ops.columns`, and a resumed run passes them back.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from fastgpt.errors import UsageError
from fastgpt_kernels import reference, stock


class Row(NamedTuple):
    """One operation: readable math, PyTorch's best path, our Triton kernel (None where there is none)."""

    reference: Callable[..., Any]
    torch: Callable[..., Any]
    triton: Callable[..., Any] | None = None


TABLE: dict[str, Row] = {
    "layer_norm": Row(reference.layer_norm, stock.layer_norm),
    "add_layer_norm": Row(reference.add_layer_norm, stock.add_layer_norm),
    "causal_attention": Row(reference.causal_attention, stock.causal_attention),
    "linear_cross_entropy": Row(reference.linear_cross_entropy, stock.linear_cross_entropy),
}


@dataclass(frozen=True)
class Ops:
    """The chosen implementation of each operation; `columns` names them and `reason` says why."""

    layer_norm: Callable[..., torch.Tensor]
    add_layer_norm: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    causal_attention: Callable[..., torch.Tensor]
    linear_cross_entropy: Callable[..., torch.Tensor]
    columns: Mapping[str, str]
    reason: str

    def __str__(self) -> str:
        used = set(self.columns.values())
        named = used.pop() if len(used) == 1 else ", ".join(f"{op}={c}" for op, c in self.columns.items())
        return f"{named} ({self.reason})"


def resolve(
    kernels: str = "auto",
    device: torch.device | str = "cpu",
    *,
    recorded: Mapping[str, str] | None = None,
) -> Ops:
    """Choose a column for every operation.

    Args:
        kernels: "reference", "torch" or "triton" forces that column; "auto" picks the best for the device.
        device: where the model runs.
        recorded: the columns of an earlier part of this run, which "auto" then keeps.

    Raises:
        UsageError: the column does not exist, or cannot run on this device.
    """
    device = torch.device(device)
    if kernels == "auto" and recorded is not None:
        return _ops(dict.fromkeys(TABLE, "torch") | dict(recorded), "as this run began")
    if kernels == "auto":
        return _ops(dict.fromkeys(TABLE, "torch"), f"auto: the fast column of this version on {device.type}")
    if kernels not in Row._fields:
        raise UsageError(f"--kernels {kernels!r} is not one of auto, {', '.join(Row._fields)}")
    missing = [op for op, row in TABLE.items() if getattr(row, kernels) is None]
    if missing:
        raise UsageError(
            f"--kernels {kernels}: this version has no {kernels} kernel for {', '.join(missing)}; use --kernels auto"
        )
    return _ops(dict.fromkeys(TABLE, kernels), f"--kernels {kernels}")


def _ops(columns: Mapping[str, str], reason: str) -> Ops:
    for op, column in columns.items():
        if op not in TABLE or column not in Row._fields or getattr(TABLE[op], column) is None:
            raise UsageError(f"the run was made with {column} for {op}, which this version has not; pass --kernels")
    chosen = {op: getattr(TABLE[op], column) for op, column in columns.items()}
    return Ops(**chosen, columns=dict(columns), reason=reason)
