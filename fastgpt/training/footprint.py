"""The memory that an optimizer step holds, by kind, by layer and by phase: estimated, or measured in a real step.

The estimate runs the step itself on fake tensors (`fastgpt.model.footprint`), which takes a second and no memory. On a
CPU a real step holds the same bytes. On a GPU its kernels may take workspaces for a moment, and it rounds sizes up.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from fastgpt.config.training import TrainConfig
from fastgpt.data.loader import Batch
from fastgpt.model.footprint import (
    BLOCKS,
    EMBEDDING,
    HEAD,
    MIDDLE,
    TEMPORARY,
    Footprint,
    Holding,
    Owner,
    hold_weights,
    holding,
    part_of,
    shallow,
    split_temporary,
    total,
)
from fastgpt.model.gpt import GPT
from fastgpt.ops.table import Ops
from fastgpt.system.live_bytes import LiveBytes, Peak
from fastgpt.system.torch_private import fake_tensors
from fastgpt.training.statistics import Statistics
from fastgpt.training.step import TrainStep

PHASES = ("forward", "backward", "update")
KEPT = ("activations", "logits")  # for the backward pass
END_TOKEN = 0  # of packed tokens; memory does not depend on where documents end


class Segment(NamedTuple):
    """A part of a phase: that of one layer, `EMBEDDING` or `HEAD`."""

    phase: str
    part: int | str = HEAD


@dataclass(frozen=True)
class StepFootprint(Footprint):
    """Bytes of a step, by the kinds weights, gradients, moments, activations, logits, tokens, temporary.

    Attributes:
        kept: between the forward and the backward pass.
    """

    kept: Holding

    @property
    def when(self) -> str:
        """The phase with the peak, in words."""
        return "in the update" if self.phase == "update" else f"in the {self.phase} pass"

    @property
    def whole(self) -> Mapping[str, int]:
        """The bytes of weights, gradients and moments, which are all there in the update."""
        return {kind: self.peaks["update"][kind].total for kind in ("weights", "gradients", "moments")}

    @property
    def activations(self) -> int:
        """Bytes that the forward pass keeps for the backward pass, with the logits."""
        return sum(self.kept[kind].total for kind in KEPT if kind in self.kept)


def estimate(config: TrainConfig, ops: Ops, device: torch.device, dtype: torch.dtype) -> StepFootprint:
    """The memory of a step of these settings, without `compile`, on a device of this machine."""
    small = dataclasses.replace(config, n_layer=shallow(config).n_layer)
    with fake_tensors():
        watched = _Watched(small, ops, device, dtype, fake=True)
        watched.step()
    return watched.footprint(config)


def measure(config: TrainConfig, ops: Ops, device: torch.device, dtype: torch.dtype) -> StepFootprint:
    """The memory of the second step of a model with random weights; the first may fill caches."""
    watched = _Watched(config, ops, device, dtype)
    watched.step()
    watched.step()
    return watched.footprint(config)


class _Tokens(Sequence[Batch]):
    """Micro-batches of a step, each of which is made when it is asked for, as those of a run."""

    def __init__(self, config: TrainConfig, device: torch.device):
        self.shape, self.device = (config.batch_size, config.block_size), device
        # After the second, all micro-batches find what that one finds: the gradients of those before.
        self.micro_batches = min(2, config.gradient_accumulation_steps)

    def __len__(self) -> int:
        return self.micro_batches

    def __getitem__(self, index: Any) -> Any:
        if index >= self.micro_batches:
            raise IndexError(index)
        return tuple(torch.zeros(self.shape, dtype=torch.int64, device=self.device) for _ in range(2))


class _Watched:
    """A training step whose tensors are counted: hooks say to which layer each belongs, and which phase begins."""

    def __init__(self, config: TrainConfig, ops: Ops, device: torch.device, dtype: torch.dtype, fake: bool = False):
        config = dataclasses.replace(config, compile=False)
        self.config, self.device, self.fake = config, device, fake
        self.memory = LiveBytes(device, fake=fake)
        self.kept: dict[Any, int] = {}
        with device:
            self.model = GPT(config, dataclasses.replace(ops, linear_cross_entropy=self._loss(ops)))
        self.train = TrainStep(self.model, config, device, dtype, END_TOKEN if config.pack else None)
        self._follow()

    def step(self) -> None:
        """Take a step, counted anew; where `log_stats` measures some, it is one of those, which hold most."""
        number = self.config.log_interval - 1
        self.memory = LiveBytes(self.device, fake=self.fake)
        tokens = _Tokens(self.config, self.device)
        with self.memory as memory:
            hold_weights(memory, self.model)
            for name, parameter in self.model.named_parameters():
                moments = self.train.optimizer.state[parameter].values()
                memory.hold(moments, Owner("moments", part_of(name)))
            self._begin_micro_batch()
            loss = self.train.accumulate(number, tokens, lambda done: self._begin_micro_batch())
            assert loss is not None  # nothing stops it
            if self.train.statistics:
                self._follow_statistics(self.train.statistics)
            self._begin("update", HEAD, Owner(TEMPORARY, BLOCKS))  # the optimizer treats all blocks at once
            self.train.update(number, loss)

    def footprint(self, config: TrainConfig) -> StepFootprint:
        """That of the last step, for the model of this configuration, of which this may be the `shallow` one."""
        best: dict[str, tuple[int, Holding]] = {}
        for segment, found in self.memory.peaks.items():
            assert isinstance(segment, Segment)
            if segment.part in (MIDDLE - 1, MIDDLE) and config.n_layer > self.config.n_layer:
                continue  # layer by layer memory grows or shrinks evenly: the most is at the second or the last
            peak = self._peak(segment, found, config)
            if segment.phase not in best or peak[0] > best[segment.phase][0]:
                best[segment.phase] = peak
        return StepFootprint(
            {phase: best[phase][1] for phase in PHASES if best[phase][1]},
            {phase: best[phase][0] for phase in PHASES},
            holding(self.kept, self.config.n_layer, config.n_layer),
        )

    def _peak(self, segment: Segment, found: Peak, config: TrainConfig) -> tuple[int, Holding]:
        if self.memory.allocator:
            return found.bytes, {}
        held = split_temporary(found.held, self.kept, *KEPT)  # pyright: ignore[reportArgumentType]
        whole = holding(held, self.config.n_layer, config.n_layer)
        return total(whole), whole

    def _begin(self, phase: str, part: int | str, label: Owner) -> None:
        self.memory.phase, self.memory.label = Segment(phase, part), label

    def _begin_micro_batch(self) -> bool:
        self._begin("forward", EMBEDDING, Owner("tokens"))
        return False

    def _loss(self, ops: Ops) -> Any:
        """The operation of the loss, which makes the logits."""

        def linear_cross_entropy(*args: Any, **named: Any) -> torch.Tensor:
            self.memory.label = Owner("logits")
            return ops.linear_cross_entropy(*args, **named)

        return linear_cross_entropy

    def _follow_statistics(self, statistics: Statistics) -> None:
        """Count the copies of weights that statistics keep, by layer."""
        measure, parts = statistics.before_update, (EMBEDDING, *range(len(self.model.h)), HEAD)

        def before_update() -> None:
            measure()
            for part, copies in zip(parts, statistics.copies, strict=True):
                for copy in copies:
                    self.memory.relabel(copy, Owner(TEMPORARY, part))

        statistics.before_update = before_update

    def _follow(self) -> None:
        def embed(*_: Any) -> None:
            self._begin("forward", EMBEDDING, Owner("activations", EMBEDDING))

        def end(*_: Any) -> None:
            self.kept = dict(self.memory.held)
            self._begin("backward", HEAD, Owner(TEMPORARY))

        def accumulated(parameter: torch.Tensor, owner: Owner) -> None:
            if parameter.grad is not None:
                self.memory.relabel(parameter.grad, owner)

        self.model.register_forward_pre_hook(embed)
        for layer, block in enumerate(self.model.h):
            self._follow_block(layer, block)
        self.model.register_forward_hook(end)
        for name, parameter in self.model.named_parameters():
            owner = Owner("gradients", part_of(name))
            parameter.register_post_accumulate_grad_hook(lambda parameter, owner=owner: accumulated(parameter, owner))

    def _follow_block(self, layer: int, block: torch.nn.Module) -> None:
        after = layer + 1 if layer + 1 < len(self.model.h) else HEAD
        before = layer - 1 if layer else EMBEDDING

        def begin(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
            self._begin("forward", layer, Owner("activations", layer))
            if layer == 0:
                inputs[0].register_hook(lambda _: self._begin("backward", before, Owner(TEMPORARY)))

        def end(module: torch.nn.Module, inputs: tuple[Any, ...], outputs: tuple[Any, ...]) -> None:
            if after == HEAD:
                self._begin("forward", HEAD, Owner("activations", HEAD))
            # The gradient of the branch arrives before the block's backward pass begins.
            outputs[1].register_hook(lambda _: self._begin("backward", layer, Owner(TEMPORARY, layer)))

        block.register_forward_pre_hook(begin)
        block.register_forward_hook(end)
