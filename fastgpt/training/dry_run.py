"""Prints what a run takes, without starting it: parameters, memory by kind, tokens, steps, and the time.

The time follows from a throughput that is measured in three micro-batches and one optimizer step. Nothing is written:
no run's folder, no prepared corpus, no timing choice. Only compilers, Triton's and that of `compile`, fill their own
caches.
"""

import functools
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

from fastgpt.checkpoint import run_folder
from fastgpt.checkpoint.source import Source
from fastgpt.config.training import TrainConfig
from fastgpt.data import corpus, packing
from fastgpt.data.corpus import Corpus, Unprepared
from fastgpt.errors import UsageError
from fastgpt.model import memory, workloads
from fastgpt.model.facts import describe_shape
from fastgpt.model.gpt import GPT
from fastgpt.ops import autotune
from fastgpt.system import out_of_memory, threads
from fastgpt.system.device import describe, free_memory, peak_flops
from fastgpt.system.tables import print_rows
from fastgpt.system.units import counted, format_bytes, format_duration
from fastgpt.training.measurement import Measurement, Stand
from fastgpt.training.setup import Machine, choose_machine, data_settings, fitted, open_source
from fastgpt.training.speed import flops_per_token
from fastgpt.training.state import make_model
from fastgpt.training.step import TrainStep


def dry_run(config: TrainConfig, source: Source | None = None) -> None:
    """Print on stdout what the run takes, and on stderr what would refuse it.

    Args:
        source: the model that `init_from` names, if it is open already.

    Raises:
        UsageError: the settings, the data or the machine make the run impossible.
    """
    with threads.restored():
        machine = choose_machine(config)
        source = open_source(config, source)
        vocabulary = source.tokenizer if source else None
        _, found = corpus.find(**data_settings(config), vocabulary=vocabulary, download=False)
        config = fitted(config, found, source)
        memory.check_training(config, machine.device)
        free = free_memory(machine.device)
        with out_of_memory.caught() as shortage:
            step = _step(config, machine, packing.end_token(config, found), source)
            measured = Stand(step, functools.partial(print, file=sys.stderr), machine.threads).measure()
            print_rows(_rows(config, machine, step.model, found, measured, free))
    if shortage.reason is not None:
        raise UsageError(_too_large(config, shortage.reason))
    try:
        run_folder.claim(Path(config.out_dir), config.overwrite)
    except UsageError as error:
        print(f"the run itself would be refused: {error}", file=sys.stderr)


def _step(config: TrainConfig, machine: Machine, end_token: int | None, source: Source | None) -> TrainStep:
    """The model and its training step, as a new run has them."""
    choose = autotune.chooser(workloads.training(config, machine.dtype), keep=False)
    ops = machine.resolve(choose=choose)
    model = make_model(config, ops, machine.device, source)
    return TrainStep(model, config, machine.device, machine.dtype, end_token)


def _too_large(config: TrainConfig, reason: str) -> str:
    """The message for a micro-batch that does not fit into the memory."""
    size, count = config.batch_size, config.gradient_accumulation_steps
    if size == 1:
        return memory.lacking("with one sequence at a time", config, reason)
    factor = next(n for n in range(2, size + 1) if size % n == 0)
    return (
        f"`batch_size` {size} does not fit into the memory, and a run would divide its micro-batches; measure them "
        f"with `batch_size` {size // factor} `gradient_accumulation_steps` {count * factor}"
    )


def _rows(
    config: TrainConfig,
    machine: Machine,
    model: GPT,
    found: Corpus | Unprepared,
    measured: Measurement,
    free: int,
) -> Mapping[str, str]:
    """Names and values of the table, in its order."""
    return {
        "model": describe_shape(config),
        "parameters": _parameters(model),
        "machine": _machine(config, machine),
        "kernels": str(model.ops),
        **_memory_rows(config, measured, machine.device, free),
        "checkpoint": _checkpoint(config, model.num_parameters()),
        "data": _described(found),
        "tokens a step": f"{config.tokens_per_step:,} = {config.batch_size} sequences x {config.block_size:,} tokens x "
        f"{counted(config.gradient_accumulation_steps, 'micro-batch')}",
        "steps": _steps(config, found),
        **_time_rows(config, machine, model, measured),
    }


def _parameters(model: GPT) -> str:
    embedding = model.num_parameters() - sum(p.numel() for p in (*model.h.parameters(), *model.ln_f.parameters()))
    return (
        f"{model.num_parameters():,}: {embedding:,} in embeddings, {model.num_parameters() - embedding:,} in the rest"
    )


def _machine(config: TrainConfig, machine: Machine) -> str:
    arithmetic = str(machine.dtype).removeprefix("torch.")
    return f"{describe(machine.device)}, {arithmetic}" + (", compiled" if config.compile else "")


def _memory_rows(config: TrainConfig, measured: Measurement, device: torch.device, free: int) -> dict[str, str]:
    """Memory by kind, each when it holds most, and the peak of the whole step."""
    memory = measured.memory
    sequences = counted(config.batch_size, "sequence")
    compiled = ", before compiling" if config.compile else ""
    peak = f"{format_bytes(memory.peak)} at the peak, {memory.when}"
    divided = "; a run divides micro-batches that do not fit" if memory.peak > free else ""
    rows = {
        "weights": format_bytes(memory.whole["weights"]),
        "gradients": format_bytes(memory.whole["gradients"]),
        "moments": f"{format_bytes(memory.whole['moments'])}, {_kept(config)}",
        "activations": f"{format_bytes(memory.activations)}, kept for the backward pass of {sequences}{compiled}",
        "memory": f"{peak}; {device} has {format_bytes(free)} free{divided}",
    }
    if measured.peak is not None:
        rows["peak"] = f"{format_bytes(measured.peak)} allocated in the measurement"
    return rows


def _kept(config: TrainConfig) -> str:
    """The numbers that the optimizer keeps, in words."""
    if config.optimizer == "muon":
        return "1 number for each weight of Muon's matrices, 2 for the others"
    return "2 numbers for each weight"


def _checkpoint(config: TrainConfig, parameters: int) -> str:
    size, count = run_folder.checkpoint_bytes(config, parameters), run_folder.most_checkpoints(config)
    folder = Path(config.out_dir).absolute()
    existing = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
    free = shutil.disk_usage(existing).free
    return (
        f"{format_bytes(size)}, at most {counted(count, 'checkpoint')} at once; the disk has {format_bytes(free)} free"
    )


def _described(found: Corpus | Unprepared) -> str:
    if isinstance(found, Corpus):
        tokens = f"{found.train_tokens:,} train and {counted(found.val_tokens, 'val token')}"
        return f"{found.name}, prepared in {found.path}: {tokens}"
    text = found.statistics
    vocabulary = f"{found.kind.kind} vocabulary of {'at most ' if found.size else ''}{found.vocab_size:,}"
    return f"{found.source.name}: {counted(text.characters, 'character')}, not tokenized yet; {vocabulary}"


def _steps(config: TrainConfig, found: Corpus | Unprepared) -> str:
    tokens = config.max_iters * config.tokens_per_step
    epochs = (
        f"{tokens / found.train_tokens:,.3g} epochs" if isinstance(found, Corpus) else "epochs are known once tokenized"
    )
    return f"{config.max_iters:,} of them read {counted(tokens, 'token')}: {epochs}"


def _time_rows(config: TrainConfig, machine: Machine, model: GPT, measured: Measurement) -> dict[str, str]:
    """The measured times, and the time of the run that follows from them."""
    step_seconds = measured.step_seconds(config.gradient_accumulation_steps)
    speed, whole = config.tokens_per_step / step_seconds, config.max_iters * step_seconds
    few = measured.sequences < config.batch_size
    note = f" for {config.batch_size} sequences, measured with {measured.sequences}" if few else ""
    work = "compiling" if config.compile else "warming up"
    peak, flops = peak_flops(machine.device, machine.dtype), flops_per_token(config, model.num_parameters())
    time = f"{format_duration(whole)} in steps, without evaluations and checkpoints"
    if config.max_minutes is not None and config.max_minutes * 60 < whole:
        time += f"; it stops near step {int(config.max_minutes * 60 / step_seconds):,}, after {config.max_minutes} min"
    return {
        "micro-batch": f"{format_duration(measured.micro)}{note}; {format_duration(measured.first)} while {work}",
        "optimizer": f"{format_duration(measured.update)} a step",
        "speed": f"{speed:,.0f} tokens/s, {format_duration(step_seconds)} a step"
        + (f", MFU {flops * speed / peak:.1%}" if peak else ""),
        "time": time,
    }
