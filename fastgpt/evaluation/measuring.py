"""Does what `fastgpt evaluate` and `fastgpt compare` ask for: opens models and texts, measures, and prints."""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from fastgpt.config.evaluation import CompareConfig, EvaluateConfig, MeasureConfig
from fastgpt.data.prepared import Tokens
from fastgpt.data.splits import Dataset
from fastgpt.errors import UsageError
from fastgpt.evaluation import comparison, questions, report, sliding_window
from fastgpt.evaluation.sliding_window import Measurement, predicted_bytes
from fastgpt.model.gpt import GPT
from fastgpt.system import contention, threads
from fastgpt.system.bars import bar
from fastgpt.system.units import counted
from fastgpt.tokenizer.base import Tokenizer


class Opened(Protocol):
    """A model with its tokenizer, and whether it was trained on packed documents."""

    model: GPT
    tokenizer: Tokenizer
    packed: bool


Opener = Callable[..., Opened]  # `fastgpt.generation.load.load`


def evaluate(config: EvaluateConfig, load: Opener) -> int:
    """Measure a model, and print what was found; the exit code.

    Raises:
        UsageError: a model, a text or questions that cannot be read, or settings that do not go together.
        RunFailed: the model's logits are not numbers.
    """
    with threads.restored(), contention.watching(threads.use(config.threads)):
        return _on_text(config, load) if config.choices is None else _on_questions(config, load)


def compare(config: CompareConfig, load: Opener) -> int:
    """Compare two models on a text, and print what was found; the exit code.

    Raises:
        UsageError, RunFailed: see `evaluate`.
    """
    with threads.restored(), contention.watching(threads.use(config.threads)):
        names = (config.src, config.other or "")
        second = dataclasses.replace(
            config, dtype=config.other_dtype or config.dtype, quantize=config.other_quantize or config.quantize
        )
        opened = [_open(config.src, config, load), _open(config.other or "", second, load, setting="other")]
        if opened[0].tokenizer == opened[1].tokenizer:
            return _by_distributions(config, names, opened)
        return _by_bytes(config, names, opened)


def _open(name: str, config: MeasureConfig, load: Opener, setting: str = "src") -> Opened:
    return load(
        Path(name) if name == MeasureConfig.src else name,  # the default run is no name on the hub
        download=config.download,
        device=config.device,
        dtype=config.dtype,
        kernels=config.kernels,
        quantize=config.quantize,
        setting=setting,
    )


def _tokens(config: MeasureConfig, tokenizer: Tokenizer) -> Tokens:
    folders = {"data_dir": config.data_dir, "corpus_file": config.corpus_file, "gpt2_vocab": config.gpt2_vocab}
    return Dataset(config.dataset or "", _split(config), **folders).tokens(tokenizer)


def _split(config: MeasureConfig) -> str:
    return config.split or "val"


def _end_token(config: MeasureConfig, *opened: Opened) -> int | None:
    """The token that begins a document, if attention stays within documents; `pack` auto takes that from the models."""
    end = opened[0].tokenizer.end_token
    if config.pack and end is None:
        raise UsageError(f"`pack`: the {opened[0].tokenizer.kind} vocabulary has no end-of-text; leave it out")
    return end if config.pack or (config.pack is None and all(one.packed for one in opened)) else None


def _measured(config: MeasureConfig, opened: Opened, title: str) -> Measurement:
    """The loss of a model on the text."""
    model, tokenizer = opened.model, opened.tokenizer
    tokens = _tokens(config, tokenizer)
    with bar(title, len(tokens) - 1, "tokens") as advance:
        return sliding_window.measure(
            model,
            tokenizer,
            tokens,
            stride=config.stride,
            batch_size=config.batch_size,
            end_token=_end_token(config, opened),
            advance=advance,
        )


def _print(config: MeasureConfig, values: dict[str, Any]) -> int:
    report.print_json(values) if config.json else report.print_values(values)
    return 0


def _on_text(config: EvaluateConfig, load: Opener) -> int:
    values = report.of_measurement(_measured(config, _open(config.src, config, load), "evaluate"))
    return _print(config, values | {"split": _split(config), "dataset": config.dataset, "model": config.src})


def _on_questions(config: EvaluateConfig, load: Opener) -> int:
    asked = questions.read(config.choices or "")
    opened = _open(config.src, config, load)
    with bar("evaluate", sum(len(question.choices) for question in asked), "choices") as advance:
        found = questions.answer(
            opened.model,
            opened.tokenizer,
            asked,
            delimiter=config.delimiter,
            batch_size=config.batch_size,
            advance=advance,
        )
    if found.cut:
        _note(
            f"{counted(found.cut, 'context')} of {len(asked):,} did not fit in block_size "
            f"{opened.model.config.block_size}; their ends were kept"
        )
    return _print(config, report.of_answers(found) | {"file": config.choices, "model": config.src})


def _by_distributions(config: CompareConfig, names: Sequence[str], opened: Sequence[Opened]) -> int:
    """Compare two models with one vocabulary."""
    tokenizer = opened[0].tokenizer
    tokens = _tokens(config, tokenizer)
    with bar("compare", len(tokens) - 1, "tokens") as advance:
        found = comparison.compare(
            opened[0].model,
            opened[1].model,
            tokens,
            stride=config.stride,
            batch_size=config.batch_size,
            end_token=_end_token(config, *opened),
            advance=advance,
        )
    values = report.of_comparison(found, tokenizer, tokens, predicted_bytes(tokenizer, tokens))
    return _print_models(config, names, values)


def _by_bytes(config: CompareConfig, names: Sequence[str], opened: Sequence[Opened]) -> int:
    """Measure two models whose tokens do not compare, each in windows of its own block_size."""
    _note("the vocabularies differ, so only bits per byte compare")
    found = [_measured(config, one, name) for name, one in zip(names, opened, strict=True)]
    keys = ("bits_per_byte", "tokens", "bytes", "seconds", "stride", "block_size")
    values = [{key: report.of_measurement(one)[key] for key in keys} for one in found]
    return _print_models(config, names, dict(zip(("a", "b"), values, strict=True)))


def _print_models(config: CompareConfig, names: Sequence[str], values: dict[str, Any]) -> int:
    values |= {"split": _split(config), "dataset": config.dataset, "model_a": names[0], "model_b": names[1]}
    if config.json:
        report.print_json(values)
        return 0
    report.print_models({f"{key.upper()} {name}": values[key] for key, name in zip(("a", "b"), names, strict=True)})
    print()
    report.print_values(values)
    if "differences" in values:
        print()
        report.print_differences(values["differences"])
    return 0


def _note(text: str) -> None:
    print(f"[{text}]", file=sys.stderr, flush=True)
