"""Records the calls of the table's operations that a model makes on the meta device, for a `Workload`."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from fastgpt.ops import table
from fastgpt.ops.table import TABLE
from fastgpt.ops.workload import Call, TensorSpec

# What autocast computes in its dtype: products, and the operations that begin with one of their first input.
PRODUCTS = (F.linear, torch.mm, torch.bmm, torch.matmul, torch.addmm, torch.baddbmm, torch.einsum)
PRODUCTS += (torch.Tensor.mm, torch.Tensor.bmm, torch.Tensor.matmul, torch.Tensor.__matmul__)
PRODUCT_OPS = ("linear_cross_entropy",)


def _like_first(x: torch.Tensor, *inputs: Any, **arguments: Any) -> torch.Tensor:
    return x.new_empty(x.shape)


# What an operation returns that does not return a tensor like its first input.
RESULTS: Mapping[str, Callable[..., Any]] = {
    "add_layer_norm": lambda x, *inputs, **arguments: (x.new_empty(x.shape), x.new_empty(x.shape)),
    "add_rms_norm": lambda x, *inputs, **arguments: (x.new_empty(x.shape), x.new_empty(x.shape)),
    "swiglu": lambda x: x.new_empty(*x.shape[:-1], x.shape[-1] // 2),
    "linear_cross_entropy": lambda *inputs, **arguments: torch.empty((), device="meta"),
    "kv_write": lambda *inputs, **arguments: None,
    "linear_int8": lambda x, weight, *inputs, out_dtype=None: x.new_empty(*x.shape[:-1], len(weight), dtype=out_dtype),
}


class _Made(NamedTuple):
    """A call as it was made."""

    op: str
    inputs: Sequence[Any]
    arguments: Mapping[str, Any]
    outputs: tuple[torch.Tensor, ...] | None


class Recorder(TorchFunctionMode):
    """Operations, `ops`, that compute nothing and note how they are called.

        recorder = Recorder(torch.bfloat16)
        with torch.device("meta"):
            model = GPT(config, recorder.ops)
        with recorder:
            model(tokens)
        recorder.calls()

    Within the block autocast is in `dtype`, as the meta device has none of its own; float32 is without. The content of
    tensors on the meta device is not known, so it is drawn later; that of others is recorded.
    """

    def __init__(self, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.dtype = dtype
        stand_ins = {op: functools.partial(self._call, op) for op in TABLE}
        self.ops = dataclasses.replace(table.resolve("torch"), **stand_ins)
        self.made: list[_Made] = []
        self.read: list[torch.UntypedStorage] = []  # by products

    def calls(self) -> list[Call]:
        """The calls so far, in order."""
        read = {id(storage) for storage in self.read}
        return [self._described(made, read) for made in self.made]

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in PRODUCTS:
            args, kwargs = [*map(self._cast, args)], {name: self._cast(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)

    def _cast(self, value: Any) -> Any:
        """An input of a product, as autocast converts it."""
        if self.dtype == torch.float32 or not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return value
        self.read.append(value.untyped_storage())
        return value.to(self.dtype)

    def _call(self, op: str, *inputs: Any, **arguments: Any) -> Any:
        if op in PRODUCT_OPS:
            inputs = (self._cast(inputs[0]), *inputs[1:])
        results = RESULTS.get(op, _like_first)(*inputs, **arguments)
        outputs = results if isinstance(results, tuple) else () if results is None else (results,)
        trained = torch.is_grad_enabled() and any(isinstance(t, torch.Tensor) and t.requires_grad for t in inputs)
        for output in outputs:
            output.requires_grad_(trained)
        self.made.append(_Made(op, inputs, arguments, outputs if trained else None))
        return results

    def _described(self, made: _Made, read: set[int]) -> Call:
        lowest: dict[int, int] = {}  # offset of the call's views, by storage
        for t in (*made.inputs, *made.arguments.values()):
            if isinstance(t, torch.Tensor):
                offset = int(t.storage_offset())
                lowest[_place(t)] = min(offset, lowest.get(_place(t), offset))
        places = list(lowest)

        def described(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            place = _place(value)
            t = value if value.is_meta else value.contiguous()
            return TensorSpec(
                tuple(t.shape),
                t.stride(),
                t.dtype,
                made.outputs is not None and t.requires_grad,
                places.index(place),
                int(value.storage_offset()) - lowest[place],
                None if t.is_meta else t.numpy().tobytes(),
            )

        outputs = None
        if made.outputs is not None:
            outputs = tuple(
                (tuple(t.shape), self.dtype if id(t.untyped_storage()) in read else t.dtype) for t in made.outputs
            )
        arguments = tuple((name, described(value)) for name, value in made.arguments.items())
        return Call(made.op, tuple(map(described, made.inputs)), arguments, outputs, self.dtype)


def _place(t: torch.Tensor) -> int:
    """Equal for views of one storage. A tensor whose content is recorded is one by itself."""
    return id(t.untyped_storage() if t.is_meta else t)
