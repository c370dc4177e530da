"""Prints measurements on stdout: a short table, or one JSON object with full precision."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from fastgpt.data.prepared import Tokens
from fastgpt.evaluation.comparison import Comparison, Guess
from fastgpt.evaluation.questions import Answers
from fastgpt.evaluation.sliding_window import Measurement
from fastgpt.system import tables
from fastgpt.tokenizer.base import Tokenizer

BEFORE = 24  # tokens that are told before one at which two models differ
LEFT = 30  # characters of them in the table
Values = Mapping[str, Any]  # by the names of the JSON object
SHARES = ("acc", "acc_norm", "equal_argmax")


def of_measurement(found: Measurement) -> dict[str, Any]:
    """The values of a measurement. A perplexity beyond float64 is None."""
    return {
        "loss": found.loss,
        "perplexity": found.perplexity if math.isfinite(found.perplexity) else None,
        "bits_per_byte": found.bits_per_byte,
        "tokens": found.tokens,
        "bytes": found.bytes,
        "seconds": found.seconds,
        "tokens_per_second": found.tokens / found.seconds,
        "stride": found.stride,
        "block_size": found.block_size,
    }


def of_answers(found: Answers) -> dict[str, Any]:
    """The values of answers, with each question's own in a list."""
    return {
        "acc": found.acc,
        "acc_norm": found.acc_norm,
        "questions": len(found.answered),
        "cut_contexts": found.cut,
        "seconds": found.seconds,
        "answers": [
            {
                "log_likelihoods": list(one.nats),
                "choice": one.choice,
                "choice_norm": one.choice_norm,
                "answer": one.question.answer,
            }
            for one in found.answered
        ],
    }


def of_comparison(found: Comparison, tokenizer: Tokenizer, tokens: Tokens, text_bytes: int) -> dict[str, Any]:
    """The values of a comparison on tokens (N,), whose text has so many bytes without the first token."""

    def model(nats: float) -> dict[str, Any]:
        measured = Measurement(nats, found.tokens, text_bytes, found.seconds, found.block_size, found.stride)
        return {name: of_measurement(measured)[name] for name in ("loss", "perplexity", "bits_per_byte")}

    def guess(own: Guess) -> dict[str, Any]:
        return {"token": own.token, "text": tokenizer.decode([own.token]), "probability": own.probability}

    return {
        "a": model(found.nats_a),
        "b": model(found.nats_b),
        "kl_ab": found.kl_ab,
        "kl_ba": found.kl_ba,
        "equal_argmax": found.equal_argmax,
        "tokens": found.tokens,
        "bytes": text_bytes,
        "seconds": found.seconds,
        "stride": found.stride,
        "block_size": found.block_size,
        "differences": [
            {
                "position": one.position,
                "kl": one.kl,
                "before": tokenizer.decode(tokens[max(0, one.position - BEFORE) : one.position].tolist()),
                "token": one.token,
                "text": tokenizer.decode([one.token]),
                "a": guess(one.a),
                "b": guess(one.b),
            }
            for one in found.differences
        ],
    }


def print_json(values: Values) -> None:
    """One line of JSON."""
    print(json.dumps(values, allow_nan=False))


def print_values(values: Values) -> None:
    """Names and values, a line each; lists are left out, and so is what is None."""
    shown = {name: _text(name, value) for name, value in values.items() if not isinstance(value, list | dict | None)}
    width = max(map(len, shown))
    for name, text in shown.items():
        print(f"{name.replace('_', ' '):<{width}}  {text}")


def print_models(values: Mapping[str, Values]) -> None:
    """The values of several models side by side, each in a column of its own under its name."""
    table = Table(box=None, pad_edge=False)
    table.add_column()
    for name in values:
        table.add_column(_shown(name), justify="right", overflow="fold")
    rows: dict[str, None] = {name: None for of_one in values.values() for name in of_one}
    for name in rows:
        cells = (_text(name, of_one.get(name)) for of_one in values.values())
        table.add_row(name.replace("_", " "), *cells)
    _print(table)


def print_differences(differences: Sequence[Values]) -> None:
    """The tokens at which two models differ most, a line each."""
    table = Table(box=None, pad_edge=False)
    table.add_column("KL", justify="right", min_width=7)
    table.add_column("text before", justify="right", no_wrap=True)
    for column in ("token", "A", "B"):
        table.add_column(column, no_wrap=True)
    for one in differences:
        guesses = (f"{own['text']!r} {own['probability']:.1%}" for own in (one["a"], one["b"]))
        table.add_row(f"{one['kl']:#.3g}", _shown(one["before"])[-LEFT:], repr(one["text"]), *guesses)
    _print(table)


def _shown(text: str) -> str:
    """A text on one line, with its control characters as escapes."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def _text(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return _shown(value)
    if isinstance(value, int):
        return f"{value:,}"
    if name in SHARES:
        return f"{value:.2%}"
    if name in ("seconds", "tokens_per_second"):
        return f"{value:,.1f}"
    return f"{value:,.4g}" if name.startswith("kl") or value >= 1e4 else f"{value:.4f}"


def _print(table: Table) -> None:
    tables.console().print(table)
