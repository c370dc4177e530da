"""`fastgpt inspect machine`: what runs on this machine, and why; the first thing to paste into a bug report."""

import dataclasses
import json
import sys
from collections.abc import Mapping

import torch

from fastgpt.checkpoint.source import Source
from fastgpt.config.inspection import MachineConfig
from fastgpt.config.training import PRESETS
from fastgpt.inspection import machine_arithmetic, machine_facts
from fastgpt.inspection.attention_backends import attention
from fastgpt.inspection.facts import Fact, Section, hider, report, values, without_names
from fastgpt.model import workloads
from fastgpt.model.facts import describe_shape
from fastgpt.ops import autotune
from fastgpt.ops.table import TABLE, Ops
from fastgpt.ops.timed_choices import Choice
from fastgpt.ops.workload import Workload
from fastgpt.system import threads
from fastgpt.system.device import resolve_weights_dtype
from fastgpt.system.units import format_duration
from fastgpt.training.setup import Machine, choose_machine

FORMATS = {
    "fastgpt": "a run of fastgpt",
    "huggingface": "a Hugging Face folder",
    "gguf": "a GGUF file",
    "nanogpt": "nanoGPT's checkpoint",
}


def show(config: MachineConfig, source: Source | None, why: str) -> int:
    """Print the report, or its JSON object; the exit code. `why` is a line on how the settings were chosen.

    Raises:
        UsageError: the device, the arithmetic or the backends that the settings name are not there.
    """
    with threads.restored():
        sections = gather(config, source)
    print(why if config.paths else hider()(why), file=sys.stderr)
    sections = sections if config.paths else without_names(sections)
    print(json.dumps(values(sections), ensure_ascii=False) if config.json else report(sections))
    return 0


def gather(config: MachineConfig, source: Source | None) -> dict[str, Section]:
    """All facts, by the titles of their sections."""
    machine = choose_machine(config.training())
    device = machine.device
    ops = {work: _choose(machine, planned) for work, planned in _workloads(config, machine).items()}
    first = next(iter(ops.values()))[0]
    tried = attention(config, device, machine.dtype)
    return {
        "Versions": machine_facts.versions(device),
        "Device": machine_facts.processor(device, config.device, machine.threads),
        "Arithmetic": machine_arithmetic.arithmetic(device, config.dtype, first.interpreted),
        "Compilers": machine_facts.compilers(device),
        "Model": _model(config, source),
        "Attention (SDPA)": tried,
        "Operations": _operations(ops),
        "Cache": machine_facts.cache(config.paths),
    }


def _model(config: MachineConfig, source: Source | None) -> Section:
    name = _preset(config) if source is None else FORMATS[source.format]
    where = f": {source.path}" if config.paths and source else ""
    shape = (
        f"{describe_shape(config)}, vocabulary {config.vocab_size:,}, position {config.position}, "
        f"batch {config.batch_size}"
    )
    return {"source": name + where, "shape": Fact(shape, vars(config.architecture()))}


def _preset(config: MachineConfig) -> str:
    """The preset that has this shape, if one has."""
    shape = config.architecture()
    names = (
        name
        for name, preset in PRESETS.items()
        if dataclasses.replace(preset.architecture(), vocab_size=shape.vocab_size) == shape
    )
    return f"preset {found}" if (found := next(names, None)) else "as given"


def _workloads(config: MachineConfig, machine: Machine) -> dict[str, Workload]:
    weights = resolve_weights_dtype(config.dtype, machine.device, interpreted=machine.resolve().interpreted)
    return {
        "training": workloads.training(config.training(), machine.dtype),
        "generation": workloads.generation(config, weights, compile=config.compile),
    }


Choices = tuple[Ops, Mapping[str, Choice]]


def _choose(machine: Machine, planned: Workload) -> Choices:
    """The operations of a workload, and the timing behind them; nothing is kept that is timed here."""
    timed: dict[str, Choice] = {}

    def choose(device: torch.device) -> autotune.Chosen:
        chosen = autotune.choose(planned, device, keep=False)
        timed.update(chosen.choices)
        return chosen

    return machine.resolve(choose=choose), timed


def _operations(ops: Mapping[str, Choices]) -> Section:
    """The backend of each operation in each kind of work, and why."""
    facts: dict[str, str | Fact] = {}
    reasons = {work: chosen.reason.replace("`", "") for work, (chosen, _) in ops.items()}
    same = len({*reasons.values()}) == 1
    facts["reason"] = Fact(
        next(iter(reasons.values())) if same else "; ".join(f"{work}: {why}" for work, why in reasons.items()), reasons
    )
    for op in TABLE:
        told = {work: _told(op, *choices) for work, choices in ops.items()}
        alike = len({*told.values()}) == 1
        text = next(iter(told.values())) if alike else "; ".join(f"{work} {one}" for work, one in told.items())
        facts[op] = Fact(text, {work: chosen.backends[op] for work, (chosen, _) in ops.items()})
    return facts


def _told(op: str, ops: Ops, timed: Mapping[str, Choice]) -> str:
    """The backend of one operation, with the times of the contest where there was one."""
    choice = timed.get(op)
    if choice is None:
        return ops.backends[op]
    times = [f"{backend} {format_duration(seconds)}" for backend, seconds in choice.seconds.items()]
    left_out = [f"{backend} left out: {why}" for backend, why in choice.left_out.items()]
    return f"{choice.backend} ({', '.join([*times, *left_out])})"
