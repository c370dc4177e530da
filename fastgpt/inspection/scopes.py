"""Names what runs within a model and a training step, and adds up the time that a profile gives to each name.

    scopes = Scopes()
    model = GPT(config, scopes.named_ops(ops))
    scopes.name_model(model)
    with profile() as found:
        scopes.on = True
        with profiled_range(STEP): ...
    steps = attribute(found.events())

A scope is a range of the profile: a phase ("forward"), a module ("h.0.attn") or an operation ("causal_attention"). Time
belongs to the innermost one; an operation within another counts as a part of that. A backward pass has no scopes, but
PyTorch numbers the forward pass's calls, and each gradient's computation carries the number of its call; its time goes
to that call's scopes. So every moment of a step is counted once.
"""

import dataclasses
import functools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch.autograd import DeviceType  # pyright: ignore[reportPrivateImportUsage]

from fastgpt.model.gpt import GPT
from fastgpt.ops.table import TABLE, Ops
from fastgpt.system.torch_private import profiled_range
from fastgpt.training.step import TrainStep

STEP, PHASE, MODULE, OP = "fastgpt step", "phase: ", "module: ", "op: "
FORWARD, BACKWARD, UPDATE = "forward", "backward", "update"
GRADIENT = "autograd::engine::evaluate_function: "  # begins the event in which PyTorch computes a gradient
ACCUMULATING = "AccumulateGrad"  # ends that event's name where a gradient goes to its parameter
COMPILED = "## Call CompiledFxGraph"  # begins the name of what torch.compile made, before a hash
# Operations without a function that could be named: they are known by PyTorch's own.
KNOWN = {"aten::dropout": "dropout"}
QK_NORM = "query and key norms"
HEADS, KEPT, OTHER, IDLE = "heads", "gradients kept", "other", "GPU idle"
NORMS, OUTPUT = (
    ("layer_norm", "add_layer_norm", "rms_norm", "add_rms_norm"),
    ("linear_cross_entropy", "logits", "sampling"),
)
LINEAR = {"attn.c_attn": "qkv", "attn.c_proj": "attention projection", "mlp.c_fc": "MLP up", "mlp.c_proj": "MLP down"}


class Place(NamedTuple):
    """The scopes around an event; "" for none."""

    direction: str = ""
    module: str = ""
    op: str = ""


class Scopes:
    """Names calls in profiles while `on`."""

    def __init__(self) -> None:
        self.on = False

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function within a scope."""

        @functools.wraps(function)
        def scoped(*inputs: Any, **arguments: Any) -> Any:
            if not self.on:
                return function(*inputs, **arguments)
            with profiled_range(name):
                return function(*inputs, **arguments)

        return scoped

    def named_ops(self, ops: Ops) -> Ops:
        """The same operations, each in a scope."""
        return dataclasses.replace(ops, **{op: self.around(OP + op, getattr(ops, op)) for op in TABLE})

    def name_model(self, model: GPT) -> None:
        """Put the modules of a model, made with `named_ops`, into scopes, and what they call beside the table."""
        for layer, block in enumerate(model.h):
            for name in ("attn", "mlp"):
                self._name(block.get_submodule(name), MODULE + f"h.{layer}.{name}")
            for name, op in LINEAR.items():
                self._name(block.get_submodule(name), OP + op)
            attention, mlp = (cast(Any, block.get_submodule(name)) for name in ("attn", "mlp"))
            attention.normalize_heads = self.around(OP + QK_NORM, attention.normalize_heads)
            mlp.activation = self.around(OP + "activation", mlp.activation)
            self._name(block, MODULE + f"h.{layer}")
        model.embed = self.around(OP + "embedding", model.embed)
        model.logits = self.around(OP + "logits", model.logits)

    def name_step(self, step: TrainStep) -> None:
        """Put the phases of a training step into scopes, and the parts of its update."""
        step.compiled = self.around(PHASE + FORWARD, step.compiled)
        if not step.config.compile:
            self._name(step.model, PHASE + FORWARD)
        step.update = self.around(PHASE + UPDATE, step.update)
        step.guard.judge = self.around(OP + "guard", step.guard.judge)
        step.optimizer.step = self.around(OP + "optimizer", step.optimizer.step)
        step.model.zero_grad = self.around(OP + "gradients freed", step.model.zero_grad)

    def _name(self, module: torch.nn.Module, name: str) -> None:
        module.forward = self.around(name, module.forward)


class Kernel(Protocol):
    """A kernel that a GPU ran; `duration` in microseconds."""

    name: str
    duration: float


class Event(Protocol):
    """A range of a profile: the part of `torch.autograd.profiler_util.FunctionEvent` that is read here."""

    name: str
    device_type: DeviceType
    sequence_nr: int
    time_range: Any
    cpu_parent: "Event | None"
    cpu_children: Sequence["Event"]
    kernels: Sequence[Kernel]


@dataclass
class StepTimes:
    """One step: seconds of the whole and by place, and calls by operation."""

    total: float
    seconds: defaultdict[Place, float]
    calls: Counter[str]


def attribute(events: Iterable[Event], *, on_gpu: bool = False, by_name: bool = False) -> list[StepTimes]:
    """The steps of a profile.

    Args:
        on_gpu: count the time of the kernels that a call launched, and not of the call.
        by_name: operations are PyTorch's, or kernels, by their own names: for compiled code, which has no scopes.
    """
    host = [event for event in events if event.device_type == DeviceType.CPU]
    roots = [event for event in host if event.cpu_parent is None]
    created = _created(roots)
    found = []
    for step in sorted((event for event in roots if event.name == STEP), key=_start):
        times = StepTimes(_length(step) * 1e-6, defaultdict(float), Counter())
        # On a GPU a thread of its own computes the gradients.
        others = [root for root in roots if root is not step and step.time_range.start <= _start(root) < _end(step)]
        for event, place, is_call in _places([step, *others], created):
            times.calls[place.op] += is_call
            for op, seconds in _own(event, place, on_gpu, by_name):
                times.seconds[place._replace(op=op)] += seconds
        times.seconds[Place(op=IDLE if on_gpu else OTHER)] += times.total - sum(times.seconds.values())
        found.append(times)
    return found


def module_of(place: Place) -> str:
    """The module that a place's time belongs to: "embedding", "h.0.attn", "h.0.norms", "h.0", "ln_f", "head", ..."""
    if place.direction == UPDATE:
        return "optimizer"
    if place.op in NORMS:
        return f"{place.module}.norms" if place.module else "ln_f"
    if place.op in OUTPUT:
        return "head"
    if place.module:
        return place.module
    return "embedding" if place.op in ("embedding", "dropout") else OTHER


def _own(event: Event, place: Place, on_gpu: bool, by_name: bool) -> Iterator[tuple[str, float]]:
    """Operations and seconds of an event alone, without the events within it."""
    named = by_name and place.direction in (FORWARD, BACKWARD)
    if on_gpu:
        for kernel in event.kernels:
            yield kernel.name if named else _op(place), kernel.duration * 1e-6
        return
    own = max(0.0, _length(event) - sum(map(_length, event.cpu_children))) * 1e-6
    yield _own_name(event) if named and not event.name.startswith(PHASE) else _op(place), own


def _own_name(event: Event) -> str:
    return "compiled graph" if event.name.startswith(COMPILED) else event.name.removeprefix(GRADIENT)


def _op(place: Place) -> str:
    """The operation of a place; what attention does beside its operations divides the heads and joins them."""
    if place.op:
        return place.op
    if place.direction == UPDATE:
        return "clip"
    return HEADS if place.module.endswith(".attn") else OTHER


def _places(roots: Iterable[Event], created: dict[int, Place]) -> Iterator[tuple[Event, Place, bool]]:
    """Each event below the roots with its place, and whether it is the call of an operation."""
    open_events = [(root, Place()) for root in roots]
    while open_events:
        event, around = open_events.pop()
        place = _entered(event, around, created)
        yield event, place, not around.op and (event.name.startswith(OP) or event.name in KNOWN)
        open_events += [(child, place) for child in event.cpu_children]


def _entered(event: Event, around: Place, created: dict[int, Place]) -> Place:
    """The place of an event, from that around it."""
    name = event.name
    if name.startswith(GRADIENT):
        if name.endswith(ACCUMULATING):
            return Place(BACKWARD, "", KEPT)
        return created.get(event.sequence_nr, Place())._replace(direction=BACKWARD)
    if name.startswith(PHASE):
        return around._replace(direction=name.removeprefix(PHASE))
    if name.startswith(MODULE):
        return around._replace(module=name.removeprefix(MODULE))
    if around.op:
        return around
    if name.startswith(OP):
        return around._replace(op=name.removeprefix(OP))
    return around._replace(op=KNOWN[name]) if name in KNOWN else around


def _created(roots: Iterable[Event]) -> dict[int, Place]:
    """The places in which the forward pass made what computes its gradients, by its number.

    Calls that make nothing have the number of the next that does, so the last call with a number counts.
    """
    last: dict[int, tuple[float, Place]] = {}
    for event, place, _ in _places(roots, {}):
        number = event.sequence_nr
        if number >= 0 and place.direction == FORWARD and (number not in last or last[number][0] <= _start(event)):
            last[number] = _start(event), place
    return {number: place for number, (_, place) in last.items()}


def _start(event: Event) -> float:
    return event.time_range.start


def _end(event: Event) -> float:
    return event.time_range.end


def _length(event: Event) -> float:
    return _end(event) - _start(event)
