"""The calls of the table's operations that `autotune` checks and times.

A `Workload` names some work and records the calls that it makes (`fastgpt.ops.recorder`). A `Call` describes one; a
`Case` is the call with its tensors drawn, on a device.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from fastgpt.ops.table import TABLE
from fastgpt.system.device import autocast
from fastgpt.system.torch_private import compile_up_to

# A longer context is checked at its length modulo TILE, the largest tile of a kernel, and two whole tiles.
TILE = 128
RECOMPILE_LIMIT = 256
WRITES = {"kv_write": (2, 3)}  # the positions of the inputs that an operation changes in place


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of a call.

    Attributes:
        storage, offset: views share the storage with the same number; the offset is the first element's place in it.
        content: the bytes, where the call depends on them; otherwise the numbers are drawn.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool
    storage: int
    offset: int
    content: bytes | None = None

    @property
    def end(self) -> int:
        """The elements that its storage needs."""
        return self.offset + 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))


@dataclass(frozen=True)
class Call:
    """One call of an operation.

    Attributes:
        inputs: the positional arguments.
        arguments: those by keyword, in order.
        outputs: the shape of each output and the dtype in which it is read; None: forward alone.
        autocast: what it runs under; float32 for none.
    """

    op: str
    inputs: tuple[TensorSpec | None, ...]
    arguments: tuple[tuple[str, Any], ...]
    outputs: tuple[tuple[tuple[int, ...], torch.dtype], ...] | None
    autocast: torch.dtype

    @property
    def tensors(self) -> list[tuple[str, TensorSpec]]:
        """Its tensors with their names in the operation's signature."""
        names = list(inspect.signature(TABLE[self.op].reference).parameters)
        given = [*zip(names, self.inputs, strict=False), *self.arguments]
        return [(name, value) for name, value in given if isinstance(value, TensorSpec)]

    def case(self, device: torch.device) -> "Case":
        """The call with its tensors drawn: the same ones each time, from random numbers of its own."""
        generator = torch.Generator(device).manual_seed(0)
        ends: dict[int, int] = {}
        for _, tensor in self.tensors:
            ends[tensor.storage] = max(tensor.end, ends.get(tensor.storage, 0))
        storages: dict[int, torch.Tensor] = {}
        for name, tensor in self.tensors:
            if tensor.storage not in storages:
                storages[tensor.storage] = _drawn(name, tensor, ends[tensor.storage], generator)

        def made(value: Any) -> Any:
            if not isinstance(value, TensorSpec):
                return value
            view = storages[value.storage].as_strided(value.shape, value.strides, value.offset)
            return view.requires_grad_(value.requires_grad)

        inputs, arguments = tuple(map(made, self.inputs)), {name: made(value) for name, value in self.arguments}
        grads = None
        if self.outputs is not None:  # that of a loss is 1
            grads = tuple(
                torch.randn(shape, generator=generator, device=device).to(dtype)
                if shape
                else torch.ones((), dtype=dtype, device=device)
                for shape, dtype in self.outputs
            )
        return Case(inputs, arguments, grads, WRITES.get(self.op, ()), self.autocast)


def _drawn(name: str, tensor: TensorSpec, count: int, generator: torch.Generator) -> torch.Tensor:
    """The elements of a storage, of which the argument of this name is a view."""
    device, dtype = generator.device, tensor.dtype
    if tensor.content is not None:
        return torch.frombuffer(bytearray(tensor.content), dtype=dtype).to(device)
    if dtype == torch.int8:  # a quantized weight
        return torch.randint(-127, 128, (count,), dtype=dtype, generator=generator, device=device)
    if not dtype.is_floating_point:  # such as a seed
        return torch.ones(count, dtype=dtype, device=device)
    t = torch.randn(count, generator=generator, device=device)
    if name == "scale":  # of a quantized weight: positive, for weights of about 1
        t = t.abs_().add_(1).div_(127)
    elif name == "weight" and len(tensor.shape) == 2:  # products a few units wide
        t *= 2 * tensor.shape[1] ** -0.5
    return t.to(dtype)


class Calls(NamedTuple):
    """By operation: the call that is timed, and every kind of call, made `smaller`, to be checked."""

    timed: Mapping[str, Call]
    checked: Mapping[str, Sequence[Call]]


@dataclass(frozen=True)
class Workload:
    """Some work of a model.

    Attributes:
        name: all that the calls depend on beside the dtype, for the file of choices.
        dtype: the narrowest that is computed in.
        record: makes the calls.
        compile: the operations run in compiled code.
    """

    name: str
    dtype: torch.dtype
    record: Callable[[], Calls] = dataclasses.field(compare=False, repr=False)
    compile: bool = False

    @functools.cached_property
    def calls(self) -> Calls:
        """Recorded once, when asked for: on the meta device PyTorch first imports its compiler, for seconds."""
        return self.record()

    @property
    def ops(self) -> tuple[str, ...]:
        """The operations that it uses."""
        return tuple(op for op in TABLE if op in self.calls.timed)

    def __str__(self) -> str:
        return f"{self.name}, {str(self.dtype).removeprefix('torch.')}{', compiled' if self.compile else ''}"


def smaller(B: int, T: int) -> tuple[int, int]:
    """Sequences and tokens few enough for the reference in float64, which go through the same kinds of tiles."""
    return min(B, 2), T if T <= 2 * TILE else 2 * TILE + T % TILE


@dataclass(frozen=True)
class Case:
    """One call of an operation.

    Attributes:
        inputs: the positional arguments; those that require gradients get them.
        arguments: by keyword.
        grads: the gradient of each output, in the dtype in which the model reads that output; None: forward alone.
        writes: the positions in `inputs` of what the operation changes in place.
        autocast: what it runs under; float32 for none.
    """

    inputs: tuple[torch.Tensor | None, ...]
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    grads: tuple[torch.Tensor, ...] | None = None
    writes: tuple[int, ...] = ()
    autocast: torch.dtype = torch.float32

    def call(self, function: Callable[..., Any]) -> Sequence[torch.Tensor]:
        """The outputs, then the gradients, as the model would have them computed."""
        device = next(t.device for t in self.inputs if t is not None)
        with autocast(device, self.autocast):
            if self.grads is None:
                with torch.inference_mode():
                    return _tuple(function(*self.inputs, **self.arguments))
            # What reads an output casts it, and that is part of the price.
            read = self._cast(_tuple(function(*self.inputs, **self.arguments)))
            leaves = [t for t in self.inputs if t is not None and t.requires_grad]
            return [*read, *torch.autograd.grad(read, leaves, self.grads)]

    def compiled(self, function: Callable[..., Any]) -> Callable[..., tuple[torch.Tensor, ...]]:
        """The function and the casts of its outputs as torch.compile makes them, for this case's shapes alone."""

        def read(*inputs: torch.Tensor | None, **arguments: Any) -> tuple[torch.Tensor, ...]:
            return self._cast(_tuple(function(*inputs, **arguments)))

        code = torch.compile(read, dynamic=False)

        def run(*inputs: torch.Tensor | None, **arguments: Any) -> tuple[torch.Tensor, ...]:
            # Every function is compiled as `read`, of which torch.compile would make a few versions and then give up.
            with compile_up_to(RECOMPILE_LIMIT):
                return code(*inputs, **arguments)

        return run

    def _cast(self, outs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """The outputs in the dtypes in which the model reads them."""
        if self.grads is None:
            return outs
        return tuple(out.to(grad.dtype) for out, grad in zip(outs, self.grads, strict=True))

    def results(self, function: Callable[..., Any]) -> dict[str, torch.Tensor]:
        """The results by name; the case itself stays as it is."""
        if self.writes:
            copies = tuple(t if t is None or i not in self.writes else t.clone() for i, t in enumerate(self.inputs))
            dataclasses.replace(self, inputs=copies).call(function)
            return {f"input {i}": t for i in self.writes if (t := copies[i]) is not None}
        found = [t.detach() for t in self.call(function)]
        if self.grads is None:
            return {f"output {i}": t for i, t in enumerate(found)}
        trained = [i for i, t in enumerate(self.inputs) if t is not None and t.requires_grad]
        names = [f"output {i}" for i in range(len(self.grads))] + [f"gradient of input {i}" for i in trained]
        return dict(zip(names, found, strict=True))

    def in_float64(self) -> "Case":
        """The same numbers, and arithmetic in float64."""
        return dataclasses.replace(
            self,
            inputs=tuple(_wide(t) for t in self.inputs),
            arguments={name: _wide(value) for name, value in self.arguments.items()},
            grads=None if self.grads is None else tuple(_wide(t) for t in self.grads),
            autocast=torch.float32,
        )


def _tuple(out: Any) -> tuple[torch.Tensor, ...]:
    return out if isinstance(out, tuple) else () if out is None else (out,)


def _wide(value: Any) -> Any:
    """A tensor of floats in float64, and float64 for a dtype of floats."""
    if isinstance(value, torch.dtype) and value.is_floating_point:
        return torch.float64
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    return value.detach().double().requires_grad_(value.requires_grad)


def timed_case(op: str, workload: Workload, device: torch.device) -> Case:
    """The call that the workload makes most often, at its own shapes."""
    return workload.calls.timed[op].case(device)


def checked_cases(op: str, workload: Workload, device: torch.device) -> list[Case]:
    """Every kind of call that the workload makes, made `smaller`."""
    cases = [call.case(device) for call in workload.calls.checked[op]]
    if "reduction" in inspect.signature(TABLE[op].reference).parameters:
        # The rows' own losses too, because a mean may be right by luck.
        cases += [
            dataclasses.replace(case, arguments={**case.arguments, "reduction": "none"}, grads=None) for case in cases
        ]
    return cases
