"""A run's messages: its introduction, its result, and commands that can be typed as they stand."""

import math
import re
import shlex
from pathlib import Path

import pytest

from fastgpt import cli, generate, train
from fastgpt.checkpoint import store
from fastgpt.config.training import TrainConfig
from fastgpt.training import report
from fastgpt.training.report import RunSummary
from tests.helpers.corpora import prepare
from tests.helpers.runs import TEXT, records, resume, run

pytestmark = pytest.mark.usefixtures("workplace")
SUMMARY = RunSummary(
    steps=6,
    finished=True,
    best_step=3,
    best_val_loss=2.5,
    val_loss=2.75,
    bits_per_byte=3.5,
    train_seconds=61.0,
    tokens_per_second=1234.5,
    peak_memory=3 << 20,
    saved_step=6,
)


def concluded(tmp_path: Path, out_dir: str = "out", **changes) -> list[str]:
    config = TrainConfig(out_dir=out_dir, max_iters=9, max_minutes=0.5)
    summary = RunSummary(**vars(SUMMARY) | changes)
    return report.conclude(summary, config, {"curves": "loss.png"}, prepare("text.txt", tmp_path)).splitlines()


@pytest.mark.picture
def test_samples_and_the_summary_go_to_stdout(capsys):
    out = run("--sample_interval 2 --eval_iters 0")
    text = capsys.readouterr().out
    assert re.findall(r"^--- sample (.*)$", text, re.M) == ["at step 2", "at step 4", "after step 6"]
    best = min(records(out, "val_loss").values())
    val = TEXT[int(0.9 * len(TEXT)) :]
    bits = best / math.log(2) * len(val) / len(val.encode())
    assert len(val.encode()) > len(val)
    assert f"{best:.4f} at step 6, {bits:.4f} bits per byte" in text
    assert re.search(r"^speed +[\d,]+ tokens/s", text, re.M)
    assert re.search(r"^peak memory +[\d.]+ [MG]iB$", text, re.M)
    assert (out / "plots" / "loss.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert "\r" not in text


@pytest.mark.parametrize("out_dir", ["out", "my run"])
@pytest.mark.parametrize("text", [TEXT, TEXT.lower()])
@pytest.mark.covering_array(1)
def test_the_next_command_runs(capsys, out_dir: str, text: str):
    Path("text.txt").write_text(text, encoding="utf-8")
    run(out_dir=out_dir)
    (command,) = re.findall(r"^next:  python -m fastgpt\.generate(.*)$", capsys.readouterr().out, re.M)
    assert cli.run(generate.main, [*shlex.split(command), "--max_new_tokens", "3"]) == 0


def test_a_conclusion_is_the_result_and_the_next_command(tmp_path: Path):
    assert concluded(tmp_path) == [
        "best val loss  2.5000 at step 3, 3.5000 bits per byte",
        "speed          1,234 tokens/s; 1:01 in steps, without compiling and evaluating",
        "peak memory    3 MiB",
        "curves         loss.png",
        'next:  python -m fastgpt.generate --prompt "The "',
    ]


def test_a_conclusion_leaves_out_what_is_not_known(tmp_path: Path):
    unknown = {"best_val_loss": None, "val_loss": None, "bits_per_byte": None, "tokens_per_second": None}
    lines = concluded(tmp_path, **unknown, peak_memory=None)
    assert lines[:2] == ["peak memory  memory unknown", "curves       loss.png"]
    assert "bits" not in concluded(tmp_path, bits_per_byte=None)[0]


def test_a_run_that_stopped_says_why_and_how_to_go_on(tmp_path: Path):
    lost = concluded(tmp_path, "my run", finished=False, stopped_by=15, saved_step=3, failures=1)
    assert lost[4] == "stopped at step 6 of 9, and step 3 is the last saved in my run"
    lines = concluded(tmp_path, "my run", finished=False, stopped_by=15, saved_step=6)
    assert lines[4:] == [
        "stopped at step 6 of 9, saved in my run",
        "go on:  python -m fastgpt.train --init_from resume --out_dir 'my run'",
    ]
    lines = concluded(tmp_path, finished=False)
    assert lines[4:6] == [
        "max_minutes 0.5 are over: stopped at step 6 of 9, saved in out",
        "go on:  python -m fastgpt.train --init_from resume",
    ]
    assert lines[6].startswith("next:  python -m fastgpt.generate")


def test_a_checkpoint_is_judged_beside_the_best():
    assert report.judged(2.5, 2.5) == "val loss 2.5000, the best so far"
    assert report.judged(2.5, 2.75) == "val loss 2.7500, the best is 2.5000"
    assert report.judged(None, math.nan) == "val loss nan"
    assert report.judged(None, None) == report.judged(2.5, None) == "not evaluated"


def test_max_minutes_stops_evaluates_saves_says_so_and_a_resume_goes_on(capsys):
    out = run("--max_minutes 1e-9 --max_iters 1000")
    assert store.find(out, "latest").name == "step-000001"
    assert list(records(out)) == list(records(out, "val_loss")) == [1]
    text = capsys.readouterr().out
    assert "max_minutes 1e-09 are over: stopped at step 1 of 1000, saved in out" in text
    (command,) = re.findall(r"^go on:  python -m fastgpt\.train (.*)$", text, re.M)
    assert cli.run(train.main, [*shlex.split(command), "--max_minutes", "none", "--max_iters", "4"]) == 0
    assert list(records(out)) == [1, 2, 3, 4]
    assert "go on:" not in capsys.readouterr().out


def test_the_introduction_says_what_is_about_to_run(capsys):
    run()
    assert resume("--max_iters 9") == 0
    first, second = capsys.readouterr().err.split("resume: the settings of the run in out")
    words = ("1 layer, 2 heads, width 16, context 8", "text: ", "vocabulary 29 (char)", "CPU, 1 thread,", "float32")
    for text, length in (
        (first, "6 steps of 64 tokens -> out"),
        (second, "3 steps of 64 tokens, continuing at step 6"),
    ):
        assert [word for word in (*words, length) if word not in text] == [], text
