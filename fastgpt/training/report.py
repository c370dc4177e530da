"""Prints what a run is before its first step; after its last one the result, and the command that comes next."""

import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape

from fastgpt.config.training import TrainConfig
from fastgpt.data.corpus import Corpus
from fastgpt.errors import UsageError
from fastgpt.model.facts import describe_shape
from fastgpt.system.device import describe
from fastgpt.system.units import counted, format_bytes, format_seconds
from fastgpt.tokenizer.base import Tokenizer
from fastgpt.training.setup import Setup


@dataclass(frozen=True)
class RunSummary:
    """The end of a run. Seconds and tokens/s count steps only, not compiling, evaluating and saving.

    Attributes:
        bits_per_byte: of the best val loss.
        stopped_by: the number of the signal that stopped it, or None.
        saved_step: the step of the last checkpoint.
        failures: checkpoints, lines of metrics and pictures that the disk did not take.
    """

    steps: int
    finished: bool
    best_step: int
    best_val_loss: float | None
    val_loss: float | None
    bits_per_byte: float | None
    train_seconds: float
    tokens_per_second: float | None
    peak_memory: int | None
    stopped_by: int | None = None
    saved_step: int = 0
    failures: int = 0


def introduce(console: Console, setup: Setup) -> None:
    """Print the model, the data, the machine and the length of the run that is about to take its next step."""
    config, data, model, step = setup.config, setup.data, setup.state.model, setup.state.progress.step
    tokens = f"{data.train_tokens:,} train and {counted(data.val_tokens, 'val token')}"
    arithmetic = str(setup.dtype).removeprefix("torch.") + (", compiled" if config.compile else "")
    steps = f"{counted(config.max_iters - step, 'step')} of {counted(config.tokens_per_step, 'token')}"
    facts = {
        "model": f"{counted(model.num_parameters(), 'parameter')}: {describe_shape(config)}",
        "data": f"{data.name}: {tokens}, vocabulary {data.tokenizer.vocab_size:,} ({data.tokenizer.kind})",
        **({"packing": "attention stays within documents, and positions restart at each"} if config.pack else {}),
        "machine": f"{describe(setup.device)}, {arithmetic}",
        "kernels": str(model.ops),
        "evaluation": f"{setup.evaluation.describe()}, every {counted(config.eval_interval, 'step')}",
        "run": f"{steps}{f', continuing at step {step}' if step else ''} -> {config.out_dir}",
    }
    console.print(_lines(facts, bold=True), highlight=False, soft_wrap=True)


def judged(best_val_loss: float | None, val_loss: float | None) -> str:
    """A checkpoint's val loss in words; `val_loss` is None where it was not evaluated."""
    if val_loss is None:
        return "not evaluated"
    if best_val_loss is None:
        return f"val loss {val_loss:.4f}"
    best = "the best so far" if val_loss == best_val_loss else f"the best is {best_val_loss:.4f}"
    return f"val loss {val_loss:.4f}, {best}"


def conclude(summary: RunSummary, config: TrainConfig, logged: Mapping[str, str], data: Corpus) -> str:
    """The result, where it was saved, and the command that comes next; `logged` is what the loggers say, by name."""
    facts = {}
    if summary.best_val_loss is not None:
        bits = "" if summary.bits_per_byte is None else f", {summary.bits_per_byte:.4f} bits per byte"
        facts["best val loss"] = f"{summary.best_val_loss:.4f} at step {summary.best_step}{bits}"
    if summary.tokens_per_second is not None:
        spent = format_seconds(summary.train_seconds)
        facts["speed"] = (
            f"{summary.tokens_per_second:,.0f} tokens/s; {spent} in steps, without compiling and evaluating"
        )
    facts["peak memory"] = format_bytes(summary.peak_memory)
    facts |= logged
    where = "" if config.out_dir == "out" else f" --out_dir {shlex.quote(config.out_dir)}"
    lines = [_lines(facts)]
    if not summary.finished:
        what = "stopped" if summary.stopped_by is not None else f"max_minutes {config.max_minutes} are over: stopped"
        if summary.steps == 0:
            return f"{what} before the first step"
        saved = "saved" if summary.saved_step == summary.steps else f"and step {summary.saved_step} is the last saved"
        lines.append(f"{what} at step {summary.steps} of {config.max_iters}, {saved} in {config.out_dir}")
        lines.append(f"go on:  python -m fastgpt.train --init_from resume{where}")
    if summary.stopped_by is None:
        lines.append(f"next:  python -m fastgpt.generate{where}{_opening(data.tokenizer)}")
    if summary.failures:
        failures = counted(summary.failures, "time")
        lines.append(f"{failures} the disk did not take what was written; see the warnings above")
    return "\n".join(lines)


def _opening(tokenizer: Tokenizer) -> str:
    """A prompt as a flag, if the vocabulary can spell it."""
    try:
        tokenizer.encode("The ")
    except UsageError:
        return ""
    return ' --prompt "The "'


def bits_per_byte(loss: float | None, data: Corpus) -> float | None:
    """Nats per token as bits per byte of UTF-8, which compare across tokenizers; None if loss or bytes are unknown."""
    if loss is None or not data.val_bytes:
        return None
    return loss / math.log(2) * data.val_tokens / data.val_bytes


def _lines(facts: Mapping[str, str], bold: bool = False) -> str:
    """Names and values, a line each, aligned; with rich's markup around bold names."""
    width = max(map(len, facts))
    if bold:
        return "\n".join(f"[bold]{name:<{width}}[/]  {escape(value)}" for name, value in facts.items())
    return "\n".join(f"{name:<{width}}  {value}" for name, value in facts.items())
