"""Printed tables: text as it is, a line each, and a mark for values without a number."""

import json

import numpy as np

from fastgpt.evaluation import report
from fastgpt.evaluation.comparison import Comparison, Difference, Guess
from fastgpt.evaluation.sliding_window import Measurement
from tests.helpers.untrained import fresh


def test_text_is_shown_as_it_is_and_on_one_line(capsys):
    guess = {"text": ":smile:\x1b", "probability": 0.25}
    one = {"kl": 2.0, "before": "[red]a\nb :heart:\x1b[2J", "text": "\n", "a": guess, "b": guess}
    report.print_differences([one])
    header, line = capsys.readouterr().out.splitlines()
    assert header.split() == ["KL", "text", "before", "token", "A", "B"]
    for part in ("2.00", r"[red]a\nb :heart:\x1b[2J", r"'\n'", r"':smile:\x1b' 25.0%"):
        assert part in line


def test_models_stand_side_by_side(capsys):
    report.print_models({"A [x]": {"loss": 1.25, "bits_per_byte": None}, "B \x1b": {"loss": 2.5, "tokens": 1200}})
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows == [
        ["A", "[x]", "B", r"\x1b"],
        ["loss", "1.2500", "2.5000"],
        ["bits", "per", "byte", "-", "-"],
        ["tokens", "-", "1,200"],
    ]


def test_a_perplexity_beyond_all_numbers_is_no_json_number(capsys):
    values = report.of_measurement(Measurement(8e6, 1000, 10, 2.0, 8, 8))
    report.print_json(values)
    found = json.loads(capsys.readouterr().out)
    assert (found["loss"], found["perplexity"], found["tokens_per_second"]) == (8000.0, None, 500.0)
    report.print_values(values)
    assert "perplexity" not in capsys.readouterr().out


def test_a_difference_has_the_text_before_it():
    tokens, guess = np.array([1, 2, 3, 4]), Guess(5, 0.5)
    found = Comparison(4.0, 8.0, 0.1, 0.2, 0.5, [Difference(0.3, 2, 3, guess, guess)], 4, 1.0, 8, 8)
    values = report.of_comparison(found, fresh().tokenizer, tokens, 4)
    (one,) = values["differences"]
    assert (one["before"], one["text"], one["a"]["text"]) == ("ab", "c", "e")
    assert (values["a"]["loss"], values["b"]["loss"]) == (1.0, 2.0)
