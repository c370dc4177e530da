"""Multiple-choice questions: a file of them, and a model's answers by likelihood.

A line of the file is a JSON object with `context` (text), `choices` (a list of texts) and `answer` (the place of the
right one, from 0), or with HellaSwag's names for the same: `ctx`, `endings` and `label`. Blank lines are skipped.

Scores are those of EleutherAI's lm-evaluation-harness: `acc` takes the choice with the highest log-likelihood, and
`acc_norm` that with the highest log-likelihood per character of the choice, the delimiter before it not counted. Of
equal ones, the first is taken.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgpt.errors import UsageError
from fastgpt.evaluation.likelihood import Request, encode_pair, is_cut, log_likelihoods
from fastgpt.model.gpt import GPT
from fastgpt.system.bars import Advance
from fastgpt.system.files import decode_utf8
from fastgpt.system.json_files import parse_object
from fastgpt.system.units import counted
from fastgpt.tokenizer.base import Tokenizer, check_unicode

KEYS = (("context", "choices", "answer"), ("ctx", "endings", "label"))


@dataclass(frozen=True)
class Question:
    """A question; `where` names its file and line, and `answer` is the place of the right choice."""

    where: str
    context: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Answered:
    """A question with the log-likelihood of each choice, in nats."""

    question: Question
    nats: tuple[float, ...]

    @property
    def choice(self) -> int:
        """The likeliest choice."""
        return self.nats.index(max(self.nats))

    @property
    def choice_norm(self) -> int:
        """The likeliest choice by its nats per character."""
        each = [nats / len(choice) for nats, choice in zip(self.nats, self.question.choices, strict=True)]
        return each.index(max(each))


@dataclass(frozen=True)
class Answers:
    """A model's answers. `cut` is the number of questions whose context was too long for block_size."""

    answered: Sequence[Answered]
    cut: int
    seconds: float

    @property
    def acc(self) -> float:
        """The share of right answers by the sum of log-probabilities."""
        return sum(one.choice == one.question.answer for one in self.answered) / len(self.answered)

    @property
    def acc_norm(self) -> float:
        """The share of right answers by log-likelihood per character."""
        return sum(one.choice_norm == one.question.answer for one in self.answered) / len(self.answered)


def read(name: str) -> list[Question]:
    """The questions of a file. Raises `UsageError`, naming the line, where it holds something else."""
    try:
        content = Path(name).read_bytes()
    except OSError as error:
        raise UsageError(f"`choices` {name} cannot be read: {error.strerror}; name a file of JSON lines") from None
    lines = decode_utf8(content, f"`choices` {name}").split("\n")
    questions = [_question(f"`choices` {name}, line {i}", line) for i, line in enumerate(lines, 1) if line.strip()]
    if not questions:
        raise UsageError(f"`choices` {name} is empty; write a question a line into it")
    return questions


def _question(where: str, line: str) -> Question:
    try:
        fields = parse_object(line, f" with {', '.join(KEYS[0])}")
    except ValueError as error:
        raise UsageError(f"{where} {error}") from None
    names = KEYS[1] if KEYS[1][0] in fields and KEYS[0][0] not in fields else KEYS[0]
    if missing := [name for name in names if name not in fields]:
        raise UsageError(f"{where} has no {missing[0]!r}; a question has {', '.join(names)}")
    context, choices, answer = (fields[name] for name in names)
    if not isinstance(context, str):
        raise UsageError(f"{where}: {names[0]} {context!r:.40} is not text")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
        raise UsageError(f"{where}: {names[1]} {choices!r:.40} is not a list of two texts or more, none of them empty")
    for text in (context, *choices):
        check_unicode(text, where)
    return Question(where, context, tuple(choices), _place(where, names[2], answer, len(choices)))


def _place(where: str, name: str, answer: Any, count: int) -> int:
    """The place of the right choice; HellaSwag writes it as text."""
    place = int(answer) if isinstance(answer, str) and answer.isdecimal() and len(answer) < 10 else answer
    if type(place) is not int or not 0 <= place < count:
        raise UsageError(f"{where}: {name} {answer!r:.40} is not the place of a choice, 0 to {count - 1}")
    return place


def answer(
    model: GPT,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    *,
    delimiter: str = " ",
    batch_size: int | None = None,
    advance: Advance = lambda done: None,
) -> Answers:
    """The model's answers to questions.

    Args:
        delimiter: stands between a context and a choice, as lm-evaluation-harness's `target_delimiter`.
        batch_size, advance: see `log_likelihoods`, whose requests are the choices.

    Raises:
        UsageError: a character that the vocabulary lacks, or a choice that is longer than block_size.
    """
    began = time.perf_counter()
    requests = [_requests(tokenizer, question, delimiter, model.config.block_size) for question in questions]
    flat = [request for of_one in requests for request in of_one]
    found = iter(log_likelihoods(model, flat, batch_size=batch_size, advance=advance))
    answered = [
        Answered(question, tuple(next(found).nats for _ in of_one))
        for question, of_one in zip(questions, requests, strict=True)
    ]
    cut = sum(any(is_cut(request, model.config.block_size) for request in of_one) for of_one in requests)
    return Answers(answered, cut, time.perf_counter() - began)


def _requests(tokenizer: Tokenizer, question: Question, delimiter: str, block_size: int) -> list[Request]:
    try:
        requests = [encode_pair(tokenizer, question.context, delimiter + choice) for choice in question.choices]
    except UsageError as error:
        raise UsageError(f"{question.where}: {error}") from None
    for choice, request in zip(question.choices, requests, strict=True):
        if (tokens := len(request.continuation)) > block_size:
            raise UsageError(
                f"{question.where}: the choice {choice!r:.40} has {counted(tokens, 'token')}, above the model's "
                f"block_size {block_size}; shorten it, or leave the question out"
            )
    return requests
