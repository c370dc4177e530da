"""Says in words what is wrong with a run: runs the rules over its records, and over a sample of its best model."""

import dataclasses
import json
import math
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from fastgpt.config.curves import ExplainConfig
from fastgpt.errors import RunFailed, UsageError
from fastgpt.inspection import history
from fastgpt.inspection.history import History
from fastgpt.inspection.rules import RULES, Finding, diagnose
from fastgpt.inspection.symptoms import Case
from fastgpt.system.streams import Lasting
from fastgpt.system.units import counted
from fastgpt.tokenizer import saved

TOKENS, TEMPERATURE, SEED = 200, 0.8, 1337  # of the sample


def explain(config: ExplainConfig, with_flags: Callable[[str], str]) -> None:
    """Print what is wrong with the run in `out_dir`, or that nothing is.

    Args:
        with_flags: turns the settings that an advice names in backticks into flags, which can be typed.

    Raises:
        UsageError: there is no run, or none of its records can be read; or an unknown device.
    """
    run = history.read(config.out_dir, "out_dir")
    text, missing = _sample(config) if config.sample else (None, "no sample was wanted")
    if missing and config.sample:
        print(f"whether the output repeats was not checked: {missing}", file=sys.stderr)
    found = diagnose(Case(run, _uniform(run.out_dir), text))
    findings = [dataclasses.replace(one, advice=with_flags(one.advice)) for one in found]
    if config.json:
        rules = {rule.name: rule.looks_for for rule in RULES}
        sampled = {"sample": text, "no_sample": missing}
        print(json.dumps({**_facts(run), "findings": [*map(vars, findings)], **sampled, "looked_for": rules}))
    else:
        _print(run, findings)


def _sample(config: ExplainConfig) -> tuple[str | None, str | None]:
    """A text by the run's best model, or why there is none."""
    # Only now, as they import PyTorch, which nothing else here needs.
    from fastgpt.checkpoint import store
    from fastgpt.generation.load import load
    from fastgpt.system import threads
    from fastgpt.system.device import resolve_device

    resolve_device(config.device)
    if not store.folders(Path(config.out_dir)):
        return None, "the run has no checkpoint"
    with threads.restored():
        threads.use(config.threads)
        try:
            generator = load(config.out_dir, device=config.device, setting="out_dir")
            opening = generator.tokenizer.opening
            return generator.generate(opening, max_new_tokens=TOKENS, temperature=TEMPERATURE, seed=SEED), None
        except (UsageError, RunFailed) as error:
            return None, str(error)


def _uniform(out_dir: Path) -> float | None:
    """The loss of a uniform guess; None where the vocabulary cannot be read."""
    try:
        return math.log(saved.load(out_dir / "tokenizer.json").vocab_size)
    except UsageError:
        return None


def _facts(run: History) -> dict[str, Any]:
    (steps, val), (_, loss), (_, speed) = run.val_curve(), run.curve("loss"), run.curve("tokens_per_second")
    best = int(np.argmin(val)) if val.size else None
    return {
        "out_dir": str(run.out_dir),
        "steps": run.steps,
        "max_iters": run.settings.get("max_iters"),
        "tokens": run.records[-1]["tokens"],
        "best_val_loss": None if best is None else float(val[best]),
        "best_step": None if best is None else int(steps[best]),
        "loss": float(loss[-1]) if loss.size else None,
        "tokens_per_second": float(np.median(speed)) if speed.size else None,
    }


def _print(run: History, findings: list[Finding]) -> None:
    """One line of facts; below it the findings, each with what was seen and what to change."""
    from rich.console import Console

    console = Console(file=cast(IO[str], Lasting(sys.stdout)), highlight=False, markup=False, emoji=False)
    width = console.width if console.is_terminal else sys.maxsize
    console.print(f"{run.out_dir}: {_headline(_facts(run), len(findings))}", soft_wrap=not console.is_terminal)
    for finding in findings:
        console.print(f"\n{finding.name}", style="bold")
        for name, text in (("seen", finding.evidence), ("change", finding.advice)):
            lines = textwrap.fill(text, width, initial_indent=f"  {name:<8}", subsequent_indent=" " * 10)
            console.print(lines, soft_wrap=True)


def _headline(facts: dict[str, Any], problems: int) -> str:
    steps, most = facts["steps"], facts["max_iters"]
    done = counted(steps, "step") if most in (None, steps) else f"{steps:,} of {counted(most, 'step')}"
    said = [f"{counted(problems, 'problem') if problems else 'no problem'} in {done}"]
    if facts["best_val_loss"] is not None:
        said.append(f"best val loss {facts['best_val_loss']:.4f} at step {facts['best_step']:,}")
    elif facts["loss"] is not None:
        said.append(f"train loss {facts['loss']:.4f}, not evaluated")
    if facts["tokens_per_second"] is not None:
        said.append(f"{facts['tokens_per_second']:,.0f} tokens/s (median)")
    return "; ".join(said)
