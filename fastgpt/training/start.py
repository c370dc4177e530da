"""Completes the settings of a run: what was given changes a preset, or the settings of the run that is resumed."""

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastgpt.checkpoint import run_folder, store
from fastgpt.checkpoint.source import Source, open_model
from fastgpt.config.fields import validate
from fastgpt.config.model import ModelConfig
from fastgpt.config.sources import STEP_NAME
from fastgpt.config.training import PRESETS, USUAL_WARMUP, TrainConfig
from fastgpt.data import corpus
from fastgpt.errors import UsageError, nearest, shown
from fastgpt.system.device import resolve_device

# Of weights: with another one of these they would mean something else.
SHAPE = tuple(
    field.name
    for field in dataclasses.fields(ModelConfig)
    if field.name not in ("vocab_size", "block_size", "dropout", "attention_dropout", "zero_init")
)


def complete(preset: str | None, given: Mapping[str, Any]) -> tuple[TrainConfig, Source | None]:
    """The whole configuration of a run, and the model that it starts from; says on stderr what was chosen, and why.

    Args:
        preset: its name; None takes the one that fits the device.
        given: settings that change it, each within its own limits.

    Returns:
        The configuration, and the model whose weights a new run begins with; None where it begins with random ones,
        and for a resume.

    Raises:
        UsageError: the settings do not fit each other, or there is no run to resume.
    """
    asked = asked_start(given)
    if asked.dry_run and asked.resuming:
        raise UsageError(
            f"`dry_run` measures a new run, and `init_from` {asked.init_from} continues one, whose metrics.jsonl has "
            "its tokens/s; leave one of them out"
        )
    source = None
    if asked.resuming:
        start, why = of_resumed_run(preset, asked)
    else:
        start, why = of_preset(preset, given, asked.imports)
        if asked.imports:
            validate(asked)
            source = open_model(asked.init_from, download=asked.download, setting="init_from")
            start = shaped_as(source, start, given)
            why += f"; the model's shape and weights are those of {asked.init_from}"
    config = dataclasses.replace(start, **given)
    validate(config)
    check_effect(config, given)
    print(why, file=sys.stderr)
    return (config if config.resuming or "warmup_iters" in given else with_warmup(config)), source


def check_effect(config: TrainConfig, given: Mapping[str, Any]) -> None:
    """Raise `UsageError` for a setting of Muon that was given to a run without it."""
    for name, value in given.items():
        if name.startswith("muon_") and config.optimizer != "muon":
            raise UsageError(
                f"`{name}` {value} changes nothing with `optimizer` {config.optimizer}; pass `optimizer` muon, or "
                "leave it out"
            )


def asked_start(given: Mapping[str, Any]) -> TrainConfig:
    """The settings that say where a run starts, and its folder: a step's own, unless another one is given."""
    settings = {name: given[name] for name in ("init_from", "download", "dry_run") if name in given}
    init_from = Path(settings.get("init_from", TrainConfig.init_from))
    own_folder = str(init_from.parent) if STEP_NAME.fullmatch(init_from.name) else TrainConfig.out_dir
    return TrainConfig(out_dir=given.get("out_dir", own_folder), **settings)


def of_resumed_run(preset: str | None, asked: TrainConfig) -> tuple[TrainConfig, str]:
    """The configuration of the run that is resumed, and why it is this one."""
    out_dir, init_from = Path(asked.out_dir), asked.init_from
    run_folder.check_free(out_dir)
    run_folder.mend(out_dir)
    validate(asked)
    if preset is not None:
        raise UsageError(f"`preset` {preset}: `init_from` {init_from} keeps the run's own settings; leave it out")
    run_folder.named_step(out_dir, init_from)
    store.require(out_dir)
    saved, about = run_folder.load(out_dir)
    if origin := about.get(run_folder.CONVERTED_FROM):
        raise UsageError(
            f"`init_from` {init_from}: {out_dir} was converted from {origin} and holds no optimizer's state; start "
            f"a new run from its weights, with `init_from` {out_dir} and another `out_dir`"
        )
    why = f"resume: the settings of the run in {out_dir}, changed by what was given"
    return dataclasses.replace(saved, out_dir=asked.out_dir), why


def of_preset(preset: str | None, given: Mapping[str, Any], imports: bool = False) -> tuple[TrainConfig, str]:
    """The configuration of the named preset, or of the one that fits, and why it is this one.

    Args:
        imports: the run starts from the weights of another model, which the rates of the first run would undo.
    """
    if preset is not None and preset not in PRESETS:
        raise UsageError(f"`preset` {shown(preset)} is not one of {', '.join(PRESETS)}{nearest(preset, PRESETS)}")
    kind = resolve_device(given.get("device", "auto")).type
    fitting = "baby" if kind == "cuda" else "cpu" if imports else "modern-cpu"
    why = f"preset {preset}" if preset else f"preset {fitting}: it fits a {kind} device (others: `preset` NAME)"
    config = PRESETS[preset or fitting]
    if "n_embd" in given or "mlp" in given:  # the preset's width of the MLP was for its own
        config = dataclasses.replace(config, n_inner=None)
    if "tokenizer" in given:  # another than the preset's brings its own vocabulary
        config = dataclasses.replace(config, vocab_size=None)
    elif corpus.has_tokens(given.get("dataset", config.dataset), given.get("data_dir", config.data_dir)):
        config = dataclasses.replace(config, vocab_size=None, tokenizer=TrainConfig.tokenizer)  # it has its own
    return config, why


def shaped_as(source: Source, config: TrainConfig, given: Mapping[str, object]) -> TrainConfig:
    """The configuration with the shape of a model and, if it has one, its kind of vocabulary.

    Raises:
        UsageError: another shape or kind was asked for.
    """
    asked = dataclasses.replace(source.shape, **{name: given[name] for name in SHAPE if name in given})
    for name, has in _shape(source.shape).items():
        if _shape(asked)[name] != has:
            raise UsageError(f"`{name}` {given[name]}: the weights of {source.path} are for {has}; leave it out")
    config = dataclasses.replace(config, **vars(source.shape) | {"vocab_size": None})
    if source.tokenizer is None:
        return config
    kind = source.tokenizer.kind
    if given.get("tokenizer", kind) != kind:
        raise UsageError(f"`tokenizer` {given['tokenizer']}: {source.path} has its own, of kind {kind}; leave it out")
    return dataclasses.replace(config, tokenizer=kind)


def _shape(config: ModelConfig) -> dict[str, Any]:
    """The settings with which the weights mean what they meant, defaults filled in."""
    filled = vars(config.filled())
    return {name: filled[name] for name in SHAPE}


def with_warmup(config: TrainConfig) -> TrainConfig:
    """Limit a warm-up that was not asked for to a tenth of the run, and say so.

    The number is saved with the run's settings, so that a resume has the same schedule.
    """
    usual = USUAL_WARMUP if config.warmup_iters is None else config.warmup_iters
    steps = min(usual, config.max_iters // 10)
    if steps < usual:
        print(
            f"the warm-up takes {steps} of the {config.max_iters} steps, a tenth, and not {usual}; "
            "`warmup_iters` sets another number",
            file=sys.stderr,
        )
    return dataclasses.replace(config, warmup_iters=steps)
