"""Prints the memory of a training step and of a generation: tables, or one JSON object."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table

from fastgpt.generation import footprint as generation_footprint
from fastgpt.inspection.memory_fit import Change, Fit
from fastgpt.inspection.memory_work import Work
from fastgpt.model.footprint import Footprint, Holding, Layers
from fastgpt.ops.ceilings import dtype_name
from fastgpt.system import tables
from fastgpt.system.device import describe
from fastgpt.system.units import counted, format_exactly
from fastgpt.training import footprint
from fastgpt.training.footprint import StepFootprint

KINDS = {  # in the tables' order, with their names there
    "weights": "weights",
    "gradients": "gradients",
    "moments": "moments",
    "cache": "keys and values",
    "activations": "activations",
    "logits": "logits",
    "tokens": "tokens",
    "temporary": "temporary",
}
BY_LAYER = "activations"


@dataclass(frozen=True)
class Found:
    """The estimates, and the measurements beside them.

    Attributes:
        measured, measured_generation: of a real step, and the peak of a real generation, where they were asked for.
    """

    work: Work
    training: StepFootprint
    generation: Footprint
    measured: StepFootprint | None = None
    measured_generation: int | None = None


def print_json(found: Found, fit: Fit | None) -> None:
    """One line of JSON; all sizes are in bytes."""
    print(json.dumps(as_values(found, fit), allow_nan=False))


def as_values(found: Found, fit: Fit | None) -> dict[str, Any]:
    """The content of the JSON object."""
    config, work = found.work.config, found.work
    training, generation = found.training, found.generation
    values: dict[str, Any] = {
        "device": str(work.device),
        "before_compiling": config.compile,
        "training": {
            "batch_size": config.batch_size,
            "block_size": config.block_size,
            "gradient_accumulation_steps": config.gradient_accumulation_steps,
            "dtype": dtype_name(work.machine.dtype),
            "kernels": dict(work.ops.backends),
            "peak": training.peak,
            "phase": training.phase,
            "phases": _phases(training.bytes, training.peaks),
            "kept": _kinds(training.kept),
        },
        "generation": {
            "max_batch": config.max_batch,
            "block_size": config.block_size,
            "dtype": dtype_name(work.weights_dtype),
            "kernels": dict(work.generation_ops.backends),
            "peak": generation.peak,
            "phase": generation.phase,
            "phases": _phases(generation.bytes, generation.peaks),
        },
    }
    if found.measured is not None:
        measured = found.measured
        phases = _phases(measured.bytes, measured.peaks)
        values["training"]["measured"] = {"peak": measured.peak, "phase": measured.phase, "phases": phases}
        values["generation"]["measured"] = {"peak": found.measured_generation}
    if fit is not None:
        values["fit"] = _fit(fit)
    return values


def _phases(sizes: Mapping[str, int], peaks: Mapping[str, Holding]) -> dict[str, Any]:
    return {
        phase: {"bytes": size} | ({"kinds": _kinds(peaks[phase])} if phase in peaks else {})
        for phase, size in sizes.items()
    }


def _kinds(held: Holding) -> dict[str, Any]:
    """Bytes of each kind, and of activations those of each layer too."""
    return {kind: _layers(held[kind]) if kind == BY_LAYER else held[kind].total for kind in KINDS if kind in held}


def _layers(layers: Layers) -> dict[str, Any]:
    blocks = [{"layers": count, "bytes": size} for count, size in layers.blocks]
    return {"bytes": layers.total, "embedding": layers.embedding, "blocks": blocks, "head": layers.head}


def _fit(fit: Fit) -> dict[str, Any]:
    def change(one: Change) -> dict[str, Any]:
        return {"settings": dict(one.settings), "bytes": one.bytes}

    return {
        "budget": fit.budget,
        "fits": fit.fits,
        "largest": fit.largest and change(fit.largest),
        "same_tokens": fit.same_tokens and change(fit.same_tokens),
        "changes": [change(one) for one in fit.changes],
        "together": fit.together and change(fit.together),
        "generation": fit.generation and change(fit.generation),
    }


def print_tables(found: Found, fit: Fit | None) -> None:
    """A table of training, one of generation, and what fits."""
    config, work = found.work.config, found.work
    console = tables.console()
    compiled = ", before compiling" if config.compile else ""
    accumulated = counted(config.gradient_accumulation_steps, "micro-batch")
    console.print(
        f"Training step, {dtype_name(work.machine.dtype)}{compiled}: {accumulated} of "
        f"{counted(config.batch_size, 'sequence')} x {config.block_size:,} tokens"
    )
    measured = found.measured
    console.print(_table(footprint.PHASES, found.training.bytes, found.training.peaks, measured and measured.bytes))
    console.print(
        f"Generation, {dtype_name(work.weights_dtype)}{compiled}: {counted(config.max_batch, 'sequence')} x "
        f"{config.block_size:,} tokens"
    )
    generation, peak = found.generation, found.measured_generation
    real = {generation.phase: peak} if peak else None
    console.print(_table(generation_footprint.PHASES, generation.bytes, generation.peaks, real))
    console.print(f"{describe(work.device)}; {work.ops}", soft_wrap=True)
    console.print("Tensors alone: PyTorch itself takes a few hundred MiB more.", soft_wrap=True)
    if fit is not None:
        console.print()
        for line in _fit_lines(found, fit):
            console.print(line, soft_wrap=True)


def _table(
    phases: Sequence[str],
    sizes: Mapping[str, int],
    peaks: Mapping[str, Holding],
    measured: Mapping[str, int] | None,
) -> Table:
    """A column for each phase, what it holds at its own peak, and the shares of the phase that holds most, in bold."""
    most = max(phases, key=sizes.__getitem__)
    table = Table(box=box.SIMPLE, pad_edge=False)
    table.add_column("at the peak of", no_wrap=True)
    for phase in phases:
        table.add_column(phase, justify="right", style="bold" if phase == most else "", no_wrap=True)
    table.add_column("share", justify="right", no_wrap=True)

    def row(name: str, amounts: Mapping[str, Layers], cells: Sequence[str] | None = None) -> None:
        totals = {phase: amount.total for phase, amount in amounts.items()}
        cells = cells or [format_exactly(totals[phase]) if totals[phase] else "-" for phase in phases]
        table.add_row(name, *cells, f"{totals[most] / sizes[most]:.1%}")

    for kind, name in KINDS.items():
        amounts = {phase: peaks[phase].get(kind, Layers()) for phase in phases}
        if not any(amount.total for amount in amounts.values()):
            continue
        if kind != BY_LAYER:
            row(name, amounts)
            continue
        for part, of_part, cells in _parts([amounts[phase] for phase in phases]):
            row(f"{name}: {part}", dict(zip(phases, of_part, strict=True)), cells)
    table.add_section()
    table.add_row("estimate", *(format_exactly(sizes[phase]) for phase in phases), "100.0%")
    if measured is not None:
        blank = dict.fromkeys(phases, "")
        shown = blank | {phase: format_exactly(size) for phase, size in measured.items()}
        off = blank | {phase: f"{sizes[phase] / size - 1:+.2%}" for phase, size in measured.items()}
        table.add_row("measured", *(shown[phase] for phase in phases), "")
        table.add_row("estimate - measured", *(off[phase] for phase in phases), "")
    return table


def _parts(columns: Sequence[Layers]) -> Iterator[tuple[str, list[Layers], list[str]]]:
    """Rows of one kind: the embedding, the blocks, equal ones together, and the head."""
    yield "embedding", [Layers(column.embedding) for column in columns], []
    bounds = sorted({bound for column in columns for bound in _bounds(column)})
    for begin, end in zip([0, *bounds], bounds, strict=False):
        count, sizes = end - begin, [_size_of(column, begin) for column in columns]
        name = f"block {begin}" if count == 1 else f"blocks {begin}-{end - 1}"
        times = f"{count} x " if count > 1 else ""
        yield (
            name,
            [Layers(head=count * size) for size in sizes],
            [f"{times}{format_exactly(size)}" if size else "-" for size in sizes],
        )
    yield "head", [Layers(head=column.head) for column in columns], []


def _bounds(layers: Layers) -> Iterator[int]:
    end = 0
    for count, _ in layers.blocks:
        end += count
        yield end


def _size_of(layers: Layers, block: int) -> int:
    """The bytes of one block."""
    return next((size for end, (_, size) in zip(_bounds(layers), layers.blocks, strict=True) if block < end), 0)


def _fit_lines(found: Found, fit: Fit) -> Iterator[str]:
    within, step = format_exactly(fit.budget), format_exactly(found.training.peak)
    yield f"Within {within}:"
    yield f"  this step {'fits' if fit.fits else 'does not fit'}: it holds {step}"
    if fit.largest is None:
        yield "  no batch fits, not even of one sequence"
    else:
        yield f"  the largest batch that fits: {_described(fit.largest)}"
    asked = found.work.config.batch_size
    if fit.fits and fit.same_tokens is not None and fit.same_tokens.settings["batch_size"] != asked:
        yield f"  as many tokens a step: {_described(fit.same_tokens)}"
    if not fit.fits:
        yield "  each of these changes fits by itself:" if fit.changes else "  no single change fits"
        for one in fit.changes:
            yield f"    {_described(one)}"
    if fit.together is not None:
        yield f"  these changes fit together: {_described(fit.together)}"
    elif not fit.fits and not fit.changes:
        yield "  nor do all of them together; take a smaller n_embd, or another machine"
    if fit.generation is None:
        yield "  no sequence can be generated with a full context"
    else:
        yield f"  the most sequences that are generated at once, at full context: {_described(fit.generation)}"


def _described(change: Change) -> str:
    values = {name: f"{value:,}" if type(value) is int else value for name, value in change.settings.items()}
    return f"{', '.join(f'{name} {value}' for name, value in values.items())} ({format_exactly(change.bytes)})"
