"""Estimates and measures the memory of a model's work on this machine, with some of its settings changed."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from fastgpt.checkpoint.source import Source
from fastgpt.config.inspection import MemoryConfig
from fastgpt.generation import footprint as generation_footprint
from fastgpt.model import workloads
from fastgpt.model.footprint import Footprint
from fastgpt.ops import autotune, table
from fastgpt.ops.table import Ops
from fastgpt.system.device import resolve_dtype, resolve_weights_dtype
from fastgpt.training import footprint
from fastgpt.training.setup import Machine, choose_machine


@dataclass(frozen=True)
class Work:
    """A model, and the machine that would train it and generate from it.

    Attributes:
        ops, generation_ops: of training and of generation.
        weights_dtype: of generation.
    """

    config: MemoryConfig
    machine: Machine
    ops: Ops
    weights_dtype: torch.dtype
    generation_ops: Ops

    @property
    def device(self) -> torch.device:
        return self.machine.device

    def step(self, **changes: Any) -> footprint.StepFootprint:
        """The estimate of a training step. Raises `UsageError` where a changed setting cannot be."""
        config = dataclasses.replace(self.config.training(), **changes)
        config.check()
        ops = table.resolve(changes["kernels"], self.device) if "kernels" in changes else self.ops
        return footprint.estimate(config, ops, self.device, self._dtype(changes))

    def generation(self, max_batch: int) -> Footprint:
        return generation_footprint.estimate(
            self.config, self.generation_ops, self.device, self.weights_dtype, max_batch
        )

    def measured_step(self) -> footprint.StepFootprint:
        return footprint.measure(self.config.training(), self.ops, self.device, self.machine.dtype)

    def measured_generation(self) -> int:
        config, ops, dtype = self.config, self.generation_ops, self.weights_dtype
        return generation_footprint.measure(config, ops, self.device, dtype, config.max_batch)

    def _dtype(self, changes: dict[str, Any]) -> torch.dtype:
        return resolve_dtype(changes["dtype"], self.device) if "dtype" in changes else self.machine.dtype


def prepared(config: MemoryConfig, source: Source | None) -> Work:
    """The work of these settings; a run keeps the choices that it recorded.

    Raises:
        UsageError: the settings are not those of the weights, or this machine lacks what they ask for.
    """
    if source is not None:
        source.weights(config)
    run, about = config.training(), source.about if source else {}
    recorded = {name: about[name] for name in ("device", "dtype", "columns") if name in about}
    machine = choose_machine(run, recorded)
    ops = machine.resolve(choose=autotune.chooser(workloads.training(run, machine.dtype), keep=False))
    dtype = resolve_weights_dtype(config.dtype, machine.device, interpreted=ops.interpreted)
    planned = workloads.generation(config, dtype, config.max_batch)
    generation_ops = table.resolve(config.kernels, machine.device, choose=autotune.chooser(planned, keep=False))
    return Work(config, machine, ops, dtype, generation_ops)
