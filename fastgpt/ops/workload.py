"""A model's calls of the table's operations, which `autotune` checks and times."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastgpt.config.model import ModelConfig
from fastgpt.config.training import TrainConfig
from fastgpt.system.device import autocast
from fastgpt.system.torch_private import compile_up_to
from fastgpt_kernels.quantization import quantize

PAGE = 16  # tokens; the default of `page_size`
# A longer context is checked at its length modulo TILE, the largest tile of a kernel, and two whole tiles.
TILE = 128
RECOMPILE_LIMIT = 256


@dataclass(frozen=True)
class Workload:
    """The shapes and the arithmetic of a model's calls, and whether they need gradients.

    Training has B sequences of T tokens, float32 weights and autocast to `dtype`. Generating decodes one token for each
    of B sequences whose context is T, with weights in `dtype`, or with matrices in int8.
    """

    training: bool
    B: int
    T: int
    H: int
    Hkv: int
    D: int
    V: int  # rows of the output layer, padding included
    valid_vocab: int
    dropout: float
    bias: bool
    dtype: torch.dtype
    int8: bool = False
    compile: bool = False

    @classmethod
    def of_training(cls, config: TrainConfig, dtype: torch.dtype) -> "Workload":
        """The micro-batches of a run; the vocabulary's size must be known."""
        rest = {"B": config.batch_size, "dropout": config.dropout, "compile": config.compile}
        return cls._of(config, dtype, training=True, **rest)

    @classmethod
    def of_generation(
        cls, config: ModelConfig, dtype: torch.dtype, B: int = 1, *, int8: bool = False, compile: bool = False
    ) -> "Workload":
        """Decoding B sequences at the end of the context; the vocabulary's size must be known."""
        return cls._of(config, dtype, training=False, B=B, dropout=0.0, int8=int8, compile=compile)

    @classmethod
    def _of(cls, config: ModelConfig, dtype: torch.dtype, **rest: Any) -> "Workload":
        return cls(
            T=config.block_size,
            H=config.n_head,
            Hkv=config.kv_heads,
            D=config.head_size,
            V=config.padded_vocab,
            valid_vocab=config.vocab_size or 0,
            bias=config.bias,
            dtype=dtype,
            **rest,
        )

    @property
    def C(self) -> int:
        return self.H * self.D

    @property
    def kept(self) -> torch.dtype:
        """The dtype of the weights, and of the residual stream."""
        return torch.float32 if self.training else self.dtype

    @property
    def ops(self) -> tuple[str, ...]:
        """The operations that it uses."""
        if self.training:
            return tuple(TRAINING)
        return tuple(op for op in GENERATING if op != "linear_int8" or self.int8)

    def smaller(self) -> "Workload":
        """The same calls, small enough for the reference in float64, through the same kinds of tiles."""
        return dataclasses.replace(self, B=min(self.B, 2), T=self.T if self.T <= 2 * TILE else 2 * TILE + self.T % TILE)

    def __str__(self) -> str:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        what, dtype = "training" if fields.pop("training") else "generating", fields.pop("dtype")
        words = {"int8": "matrices int8", "compile": "compiled"}
        said = [word for name, word in words.items() if fields.pop(name)]
        sizes = [f"{name} {value}" for name, value in fields.items()]
        return ", ".join([what, str(dtype).removeprefix("torch."), *said, *sizes])


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
        """What comes out, by name; the case itself stays as it is."""
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
    return next(_cases(op, workload, device))


def checked_cases(op: str, workload: Workload, device: torch.device) -> list[Case]:
    """Every kind of call that the workload makes, made `smaller`."""
    return list(_cases(op, workload.smaller(), device))


def _cases(op: str, workload: Workload, device: torch.device) -> Iterator[Case]:
    return (TRAINING if workload.training else GENERATING)[op](Draw(workload, device))


class Draw:
    """Draws a workload's tensors, the same ones each time, from random numbers of its own."""

    def __init__(self, workload: Workload, device: torch.device):
        self.w, self.device = workload, device
        self.generator = torch.Generator(device).manual_seed(0)

    def __call__(self, *shape: int, dtype: torch.dtype, scale: float = 1.0, trained: bool = False) -> torch.Tensor:
        t = torch.randn(shape, generator=self.generator, device=self.device).mul_(scale).to(dtype)
        return t.requires_grad_(trained)

    def parameter(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        return self(*shape, dtype=self.w.kept, scale=scale, trained=self.w.training)

    def heads(self, *lead: int) -> tuple[torch.Tensor, ...]:
        """q (*lead, H, D), k and v (*lead, Hkv, D): views of one packed projection, as the model has them."""
        w = self.w
        packed = self(*lead, w.H + 2 * w.Hkv, w.D, dtype=w.dtype)
        return tuple(t.requires_grad_(w.training) for t in packed.split([w.H, w.Hkv, w.Hkv], dim=-2))

    def pages(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keys and values (B * M, P, Hkv, D), and int32 (B, M): each sequence's pages, which lie in any order."""
        w = self.w
        M = math.ceil(w.T / PAGE)
        keys, values = (self(w.B * M, PAGE, w.Hkv, w.D, dtype=w.dtype) for _ in range(2))
        order = torch.randperm(w.B * M, generator=self.generator, device=self.device)
        return keys, values, order.view(w.B, M).int()

    def integers(self, values: Any, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)


# What follows yields the call that is timed first, and others of its operation after it.


def _layer_norm(draw: Draw, *, add: bool = False) -> Iterator[Case]:
    w = draw.w
    shape = (w.B, w.T if w.training else 1, w.C)
    x = draw(*shape, dtype=w.kept, trained=w.training)
    branch = [draw(*shape, dtype=w.dtype, trained=w.training)] if add else []
    inputs = (x, *branch, draw.parameter(w.C), draw.parameter(w.C) if w.bias else None)
    if not w.training:
        yield Case(inputs)
        return
    total = [draw(*shape, dtype=w.kept)] if add else []
    yield Case(inputs, grads=(*total, draw(*shape, dtype=w.dtype)), autocast=w.dtype)


def _add_layer_norm(draw: Draw) -> Iterator[Case]:
    return _layer_norm(draw, add=True)


def _attention_with_gradients(draw: Draw) -> Iterator[Case]:
    w = draw.w
    arguments = {"dropout_p": w.dropout, "seed": draw.integers(1, torch.int64)} if w.dropout else {}
    grads = (draw(w.B, w.T, w.H, w.D, dtype=w.dtype),)
    yield Case(draw.heads(w.B, w.T), arguments, grads, autocast=w.dtype)


def _loss(draw: Draw) -> Iterator[Case]:
    """The mean, then each row's loss, because a mean may be right by luck."""
    w = draw.w
    x = draw(w.B, w.T, w.C, dtype=w.dtype, trained=True)
    weight = draw.parameter(w.V, w.C, scale=2 * w.C**-0.5)  # logits a few units wide
    targets = torch.randint(w.valid_vocab, (w.B, w.T), generator=draw.generator, device=draw.device)
    arguments = {"targets": targets, "valid_vocab": w.valid_vocab}
    yield Case((x, weight), arguments, (torch.ones((), device=draw.device),), autocast=w.dtype)
    yield Case((x, weight), arguments | {"reduction": "none"}, autocast=w.dtype)


def _attention(draw: Draw) -> Iterator[Case]:
    """A token after a context, then the whole context."""
    q, k, v = draw.heads(draw.w.B, draw.w.T)
    yield Case((q[:, -1:], k, v))
    yield Case((q, k, v))


def _paged_attention(draw: Draw) -> Iterator[Case]:
    """A token for each sequence, then every other one's whole prompt instead."""
    w = draw.w
    keys, values, table = draw.pages()
    lengths = draw.integers([w.T] * w.B, torch.int32)
    yield Case((draw.heads(w.B)[0], keys, values, table, lengths))
    ends = itertools.accumulate((1 if b % 2 else w.T for b in range(w.B)), initial=0)
    starts = draw.integers([*ends], torch.int32)
    yield Case((draw.heads(int(starts[-1]))[0], keys, values, table, lengths), {"starts": starts})


def _kv_write(draw: Draw) -> Iterator[Case]:
    w = draw.w
    keys, values, table = draw.pages()
    slots = table[:, -1].long() * PAGE + (w.T - 1) % PAGE
    yield Case((*draw.heads(w.B)[1:], keys, values, slots), writes=(2, 3))


def _linear_int8(draw: Draw) -> Iterator[Case]:
    """The widening product of the MLP for a token of each sequence; then the narrowing one, the output layer's, and
    the first for whole prompts.
    """
    w = draw.w

    def case(T: int, outputs: int, inputs: int, bias: bool, **arguments: torch.dtype) -> Case:
        weight, scale = quantize(draw(outputs, inputs, dtype=torch.float32))
        x, bias_of_each = draw(w.B, T, inputs, dtype=w.dtype), draw(outputs, dtype=w.dtype) if bias else None
        return Case((x, weight, scale, bias_of_each), arguments)

    yield case(1, 4 * w.C, w.C, w.bias)
    yield case(1, w.C, 4 * w.C, w.bias)
    yield case(1, w.V, w.C, False, out_dtype=torch.promote_types(w.dtype, torch.float32))  # logits
    yield case(w.T, 4 * w.C, w.C, w.bias)


TRAINING: Mapping[str, Callable[[Draw], Iterator[Case]]] = {
    "layer_norm": _layer_norm,
    "add_layer_norm": _add_layer_norm,
    "causal_attention": _attention_with_gradients,
    "linear_cross_entropy": _loss,
}
GENERATING: Mapping[str, Callable[[Draw], Iterator[Case]]] = {
    "layer_norm": _layer_norm,
    "add_layer_norm": _add_layer_norm,
    "causal_attention": _attention,
    "paged_attention": _paged_attention,
    "kv_write": _kv_write,
    "linear_int8": _linear_int8,
}
