"""The problems that `fastgpt explain` looks for: a table, each row with a name, a function and an advice.

An advice has settings in braces, each of which becomes the setting's name in backticks and its present value.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fastgpt.inspection import symptoms
from fastgpt.inspection.symptoms import Case


@dataclass(frozen=True)
class Rule:
    """One problem: its name, what is looked for in words and in code, and what to change."""

    name: str
    looks_for: str
    find: Callable[[Case], str | None]
    advice: str


@dataclass(frozen=True)
class Finding:
    """A problem that a run has."""

    name: str
    evidence: str
    advice: str


RULES = (
    Rule(
        "loss is not a number",
        "steps that were skipped or rolled back because a loss or gradient is NaN or infinite, and such losses",
        symptoms.not_finite,
        "lower {learning_rate}, and set {grad_clip} to 1 or lower; with {dtype} float16 try bfloat16 or float32",
    ),
    Rule(
        "no better than a guess",
        "after the warm-up, a train loss about as high as that of a uniform guess, or higher",
        symptoms.guessing,
        "lower {learning_rate} to a tenth and lengthen {warmup_iters}; if the loss has hardly moved, raise it instead",
    ),
    Rule(
        "blown up at first",
        "in the first half, a train loss more than 10% above that of a uniform guess",
        symptoms.blown_up,
        "lower {learning_rate} to a tenth, or lengthen {warmup_iters}: such a loss comes from steps that are far too "
        "long",
    ),
    Rule(
        "diverging",
        "a train loss that ends well above its lowest",
        symptoms.diverging,
        "lower {learning_rate}, to a third at first, or lengthen {warmup_iters}; set {grad_clip} to 1 or lower",
    ),
    Rule(
        "stuck early",
        "a train loss that no longer falls, and is not far below that of a uniform guess",
        symptoms.stuck,
        "lower {learning_rate} to a tenth, or raise it where it is very small; lengthen {warmup_iters}",
    ),
    Rule(
        "plateau",
        "a train loss that fell by less than 1.25% in the last 40% of the records",
        symptoms.plateau,
        "more steps change little: try a larger model by {n_layer} or {n_embd}, or another {learning_rate}",
    ),
    Rule(
        "learning rate decayed early",
        "the same, while the learning rate was below a fifth of its peak",
        symptoms.decayed_early,
        "let it decay over the whole run: {lr_decay_iters} equal to {max_iters}; or raise {min_lr}",
    ),
    Rule(
        "overfitting",
        "a val loss that rises since two evaluations or more, while the train loss falls",
        symptoms.overfitting,
        "set {dropout} to 0.1 or 0.2, raise {weight_decay}, use more text or a smaller {n_layer} or {n_embd}, or stop "
        "at the best step by {max_iters}; its checkpoint was kept as best",
    ),
    Rule(
        "spikes",
        "a loss that jumps by more than 10% above the records before, and far outside their spread",
        symptoms.spikes,
        "lower {learning_rate} or {beta2}, lengthen {warmup_iters}, clip harder by {grad_clip}, or skip such steps: "
        "set {skip_loss_sigma} to 6",
    ),
    Rule(
        "gradient always clipped",
        "a gradient norm far above the largest that is allowed, in nearly all records after the warm-up",
        symptoms.clipped,
        "lower {learning_rate}; if the loss falls well, raise {grad_clip} above the usual norm, so that it clips "
        "spikes only",
    ),
    Rule(
        "slower than before",
        "a speed that stays below half of what it was",
        symptoms.slower,
        "look for other programs, heat or swapping, and at {threads}: python -m fastgpt.inspect machine",
    ),
    Rule(
        "warm-up never ended",
        "a learning rate that still rises at the last step, below its peak",
        symptoms.warming_up,
        "shorten {warmup_iters} to a tenth of {max_iters}",
    ),
    Rule(
        "dead units",
        "a layer of which more than half of the units are dead, where statistics are logged",
        symptoms.dead_units,
        "lower {learning_rate} or lengthen {warmup_iters}; with {mlp} relu try gelu, which has a gradient below 0 too",
    ),
    Rule(
        "updates too large",
        "weights that change by more than a tenth in a step after the warm-up, where statistics are logged",
        symptoms.large_updates,
        "lower {learning_rate}, or lengthen {warmup_iters}",
    ),
    Rule(
        "output repeats",
        "a sample in which half of all pieces of 12 characters repeat earlier text",
        symptoms.repeating,
        "train longer by {max_iters}, or a larger model, unless the text itself repeats; to generate, pass "
        "`repetition_penalty` 1.1 or a higher `temperature`",
    ),
)


def diagnose(case: Case) -> list[Finding]:
    """The problems that the rules find, in their order."""
    named = _Named(case.history.settings)
    found = [(rule, rule.find(case)) for rule in RULES]
    return [Finding(rule.name, text, rule.advice.format_map(named)) for rule, text in found if text is not None]


class _Named(dict[str, str]):
    """Each setting as a message names it, with its present value where that is known."""

    def __init__(self, settings: Mapping[str, Any]):
        super().__init__()
        self.settings = settings

    def __missing__(self, name: str) -> str:
        now = self.settings.get(name)
        shown = f"{now:g}" if isinstance(now, float) else now
        return f"`{name}`" if now is None else f"`{name}` (now {shown})"
