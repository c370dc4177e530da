"""Previews: one line of the same words at chosen steps, which changes nothing in the run."""

from pathlib import Path

import pytest
from rich.cells import cell_len

from fastgpt.training.samples import PREVIEW_COLUMNS, is_previewed
from tests.helpers.resumes import state_of
from tests.helpers.runs import resume, run

pytestmark = pytest.mark.usefixtures("workplace")
FLAGS = "--max_iters 60 --eval_interval 60 --log_interval 30"


def test_previews_come_more_and_more_rarely():
    steps = [0, 50, 100, 250, 500, 1000, 2500, 5000, 10_000, 25_000, 50_000, 100_000]
    assert [step for step in range(100_001) if is_previewed(step)] == steps


def test_each_continues_the_same_words_in_one_line(capsys):
    run(f"{FLAGS} --preview")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line[:12] for line in lines] == ["step     0  ", "step    50  "]
    before, after = (line[12:] for line in lines)
    assert before != after
    assert before[:3] == after[:3] != ""
    assert max(cell_len(before), cell_len(after)) <= PREVIEW_COLUMNS


def test_they_change_nothing_and_a_resume_does_not_begin_again(capsys):
    plain, watched = run(f"{FLAGS} --dropout 0.2", "plain"), run(f"{FLAGS} --dropout 0.2 --preview", "watched")
    assert state_of(plain) == state_of(watched)
    capsys.readouterr()
    assert resume("--max_iters 101", "watched") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line[:12] for line in lines] == ["step   100  "]


def test_wide_characters_fill_the_same_columns(capsys):
    Path("hangul.txt").write_text("모델은 글을 읽고 다음 글자를 배운다.\n" * 80, encoding="utf-8")
    run(f"{FLAGS} --preview --dataset hangul.txt --tokenizer byte")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert len(lines) == 2
    assert all(0 < cell_len(line[12:]) <= PREVIEW_COLUMNS for line in lines)
