"""Multiple choice: the file, both scores, and contexts that are too long."""

import json
from pathlib import Path

import pytest
import torch

from fastgpt.errors import UsageError
from fastgpt.evaluation import questions
from fastgpt.evaluation.questions import Answered, Question
from tests.helpers.untrained import BLOCK, fresh

CHARS = "\n abcdefghij"
ASKED = [
    {"context": "abc", "choices": ["d", "ef", "ghij"], "answer": 1},
    {"ctx": "abc", "endings": ["jj", "a"], "label": "0"},
    {"context": "", "choices": ["ab", "b"], "answer": 1},
    {"context": "abcdefghij ", "choices": ["a", "bc"], "answer": 0},
]


def written(folder: Path, *lines: object) -> str:
    path = folder / "questions.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return str(path)


def plain(generator, context: str, choice: str) -> float:
    """The log-likelihood of ' choice' by one forward pass."""
    ids = generator.tokenizer.encode(f"{context.rstrip() or chr(10)} {choice}")
    text, count = torch.from_numpy(ids)[-(BLOCK + 1) :], len(choice) + 1
    if context.endswith(" "):  # the space of the context and the delimiter
        text = torch.from_numpy(generator.tokenizer.encode(f"{context} {choice}"))[-(BLOCK + 1) :]
        count += 1
    with torch.no_grad():
        logs = generator.model(text[None, :-1])[0].double().log_softmax(-1)
    return logs.gather(1, text[1:, None])[-count:].sum().item()


def test_answers_are_those_of_plain_likelihoods(tmp_path: Path):
    generator = fresh(chars=CHARS)
    asked = questions.read(written(tmp_path, *ASKED))
    found = questions.answer(generator.model, generator.tokenizer, asked, batch_size=3)
    right = right_norm = 0
    for question, own in zip(asked, found.answered, strict=True):
        nats = [plain(generator, question.context, choice) for choice in question.choices]
        assert own.nats == pytest.approx(nats, rel=1e-5)
        each = [one / len(choice) for one, choice in zip(nats, question.choices, strict=True)]
        right += max(range(len(nats)), key=nats.__getitem__) == question.answer
        right_norm += max(range(len(nats)), key=each.__getitem__) == question.answer
    assert (found.acc, found.acc_norm) == (right / 4, right_norm / 4)
    assert found.cut == 1


def test_the_two_scores_choose_by_sum_and_by_character():
    question = Question("here", "", ("ab", "한국어의", "abcdef"), 0)
    own = Answered(question, (-3.0, -4.0, -9.0))
    assert (own.choice, own.choice_norm) == (0, 1)  # by characters: -1.5, -1.0, -1.5; by bytes it would be -0.33
    assert Answered(question, (-3.0, -3.0, -3.0)).choice == 0


def test_the_delimiter_stands_before_the_choice(monkeypatch):
    generator, seen = fresh(chars=CHARS), []
    monkeypatch.setattr(
        questions, "encode_pair", lambda tokenizer, *texts: seen.append(texts) or questions.Request((1,), (2,))
    )
    asked = [Question("here", "ab", ("c", "d"), 0)]
    for delimiter in (" ", ""):
        questions.answer(generator.model, generator.tokenizer, asked, delimiter=delimiter)
    assert seen == [("ab", " c"), ("ab", " d"), ("ab", "c"), ("ab", "d")]


def test_a_context_of_several_questions_is_computed_once(monkeypatch):
    generator = fresh(chars=CHARS)
    asked = [Question("here", "abc", ("d", "ef"), 0), Question("here", "abc", ("g", "h"), 0)]
    shapes, hidden = [], generator.model.hidden
    monkeypatch.setattr(
        generator.model, "hidden", lambda x, *rest, **named: shapes.append(x.shape) or hidden(x, *rest, **named)
    )
    questions.answer(generator.model, generator.tokenizer, asked)
    assert shapes == [(1, 3), (4, 2)]


GOOD = {"context": "a", "choices": ["b", "c"], "answer": 0}


@pytest.mark.parametrize(
    ("line", "saying"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[1]", "is a list, not an object with context, choices, answer"),
        ({"choices": ["a", "b"], "answer": 0}, "has no 'context'; a question has context, choices, answer"),
        ({"ctx": "a", "endings": ["a", "b"]}, "has no 'label'; a question has ctx, endings, label"),
        (GOOD | {"context": 3}, "context 3 is not text"),
        (GOOD | {"context": "\ud800"}, "is not valid Unicode"),
        (GOOD | {"choices": "ab"}, "choices 'ab' is not a list of two texts"),
        (GOOD | {"choices": ["a"]}, "is not a list of two texts"),
        (GOOD | {"choices": ["a", ""]}, "none of them empty"),
        (GOOD | {"answer": 2}, "answer 2 is not the place of a choice, 0 to 1"),
        (GOOD | {"answer": -1}, "answer -1 is not"),
        (GOOD | {"answer": True}, "answer True is not"),
        ('{"context": "a", "choices": ["b", "c"], "answer": %s}' % ("1" * 5000), "answer inf is not the place"),
        (GOOD | {"answer": "b"}, "answer 'b' is not"),
        (GOOD | {"answer": "9" * 5000}, "is not the place"),
    ],
)
def test_a_line_that_is_no_question_is_named(tmp_path: Path, line, saying: str):
    name = written(tmp_path, GOOD, "", line)
    with pytest.raises(UsageError) as error:
        questions.read(name)
    message = str(error.value)
    assert message.startswith(f"`choices` {name}, line 3")
    assert saying in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("content", "saying"),
    [(b"", "is empty"), (b"\n \n", "is empty"), (b"\xff", "is not UTF-8"), (None, "No such file")],
)
def test_a_file_without_questions_is_refused(tmp_path: Path, content: bytes | None, saying: str):
    path = tmp_path / "questions.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=saying):
        questions.read(str(path))


@pytest.mark.parametrize(
    ("choice", "saying"), [("k", "lacks 'k'"), ("abcdefgh", "has 9 tokens, above the model's block_size 8")]
)
def test_a_question_that_the_model_cannot_read_is_named(choice: str, saying: str):
    generator = fresh(chars=CHARS)
    with pytest.raises(UsageError, match=f"^here: .*{saying}"):
        questions.answer(generator.model, generator.tokenizer, [Question("here", "a", ("b", choice), 0)])
