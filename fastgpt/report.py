"""What a run prints for people: before the first step what it is, after the last how it went and what comes next."""

import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape

from fastgpt.config import TrainConfig
from fastgpt.corpus import Corpus
from fastgpt.device import describe
from fastgpt.errors import UsageError
from fastgpt.metrics import format_bytes, format_seconds
from fastgpt.model import GPT
from fastgpt.tokenizer import Tokenizer


@dataclass(frozen=True)
class RunSummary:
    """How a run ended. Seconds and tokens/s are of the steps alone, without compiling, evaluating and saving."""

    steps: int
    best_step: int
    best_val_loss: float
    val_loss: float
    bits_per_byte: float | None
    train_seconds: float
    tokens_per_second: float
    peak_memory: int | None
    stopped_by: int | None = None


def introduce(
    console: Console,
    config: TrainConfig,
    model: GPT,
    data: Corpus,
    device: torch.device,
    dtype: torch.dtype,
    step: int,
) -> None:
    """Model, data, machine and length of the run that is about to take its next step."""
    shape = f"{config.n_layer} layers, {config.n_head} heads, width {config.n_embd}, context {config.block_size}"
    tokens = f"{data.train_tokens:,} train and {data.val_tokens:,} val tokens"
    arithmetic = str(dtype).removeprefix("torch.") + (", compiled" if config.compile else "")
    steps = f"{config.max_iters - step:,} steps of {config.tokens_per_step:,} tokens"
    facts = {
        "model": f"{model.num_parameters():,} parameters: {shape}",
        "data": f"{data.name}: {tokens}, vocabulary {data.tokenizer.vocab_size:,} ({data.tokenizer.kind})",
        "machine": f"{describe(device)}, {arithmetic}",
        "kernels": str(model.ops),
        "run": f"{steps}{f', continuing at step {step}' if step else ''} -> {config.out_dir}",
    }
    _print_facts(console, facts)


def conclude(summary: RunSummary, out_dir: Path, picture: Path, data: Corpus) -> None:
    """The result, where it lies, and the command that comes next, on stdout."""
    bits = "" if summary.bits_per_byte is None else f", {summary.bits_per_byte:.4f} bits per byte"
    spent = format_seconds(summary.train_seconds)
    facts = {
        "best val loss": f"{summary.best_val_loss:.4f} at step {summary.best_step}{bits}",
        "speed": f"{summary.tokens_per_second:,.0f} tokens/s; {spent} in steps, without compiling and evaluating",
        "peak memory": format_bytes(summary.peak_memory),
        "curves": str(picture),
    }
    if not summary.best_step:
        del facts["best val loss"]  # stopped before the first evaluation
    _print_facts(Console(), facts)
    where = "" if out_dir == Path("out") else f" --out_dir {shlex.quote(str(out_dir))}"
    if summary.stopped_by is not None:
        print(f"stopped at step {summary.steps}, saved in {out_dir}")
        print(f"next:  python -m fastgpt.train --init_from resume{where}")
    else:
        print(f"next:  python -m fastgpt.generate{where}{_opening(data.tokenizer)}")


def _opening(tokenizer: Tokenizer) -> str:
    """The flag of a prompt, where the vocabulary can spell it."""
    try:
        tokenizer.encode("The ")
    except UsageError:
        return ""
    return ' --prompt "The "'


def bits_per_byte(loss: float, data: Corpus) -> float | None:
    """Nats a token to bits a byte of UTF-8, which tokenizers share; None where the bytes are not known."""
    return loss / math.log(2) * data.val_tokens / data.val_bytes if data.val_bytes else None


def _print_facts(console: Console, facts: Mapping[str, str]) -> None:
    """Names and values, a line each, aligned."""
    width = max(map(len, facts))
    for name, value in facts.items():
        console.print(f"[bold]{name:<{width}}[/]  {escape(value)}", highlight=False, soft_wrap=True)
