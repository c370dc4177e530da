"""`fastgpt explain`: what it prints of runs that are well and unwell, with a sample and without; what it refuses."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from fastgpt import cli, explain
from fastgpt.generation.generator import TextGenerator
from tests.helpers import runs
from tests.helpers.histories import SETTINGS, healthy, write


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.run_in(tmp_path_factory.mktemp("trained"), "--max_iters 3")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(*words: str) -> int:
    return cli.run(explain.main, words)


def test_a_healthy_run_is_a_line(capsys: pytest.CaptureFixture[str]):
    write(Path("well"), healthy())
    assert run("well", "--no-sample") == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith("well: no problem in 1,500 steps; best val loss 1.6")
    assert out.endswith(" at step 1,500; 6,393 tokens/s (median)\n")
    assert out.count("\n") == 1


def test_a_problem_has_its_evidence_and_the_flag_to_change(capsys: pytest.CaptureFixture[str]):
    write(Path("short"), healthy(lr=lambda steps: steps * 5e-7), max_iters=1400)
    assert run("short", "--no-sample") == 0
    assert capsys.readouterr().out.splitlines()[1:] == [
        "",
        "warm-up never ended",
        "  seen    at step 1,500, the last, the learning rate had risen to 0.00075; its peak is 0.001",
        "  change  shorten --warmup_iters (now 100) to a tenth of --max_iters (now 1400)",
    ]


def test_one_json_object_holds_the_same(capsys: pytest.CaptureFixture[str]):
    write(Path("slow"), healthy(tokens_per_second=lambda steps: np.where(steps > 1000, 2e3, 6e3))[:-1])
    assert run("slow", "--json", "--sample", "false") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["steps"], found["max_iters"], found["best_step"], found["sample"]) == (1500, 1500, 1350, None)
    (finding,) = found["findings"]
    assert finding["name"] == "slower than before"
    assert finding["evidence"] == "since step 1,010 training runs at 2,000 tokens/s; before, at up to 6,000"
    assert finding["name"] in found["looked_for"]


def test_without_a_checkpoint_it_says_what_was_not_checked(capsys: pytest.CaptureFixture[str]):
    write(Path("new"), healthy()[:20])
    assert run("new") == 0
    out, err = capsys.readouterr()
    assert out.startswith("new: no problem in 190 of 1,500 steps; ")
    assert err == "whether the output repeats was not checked: the run has no checkpoint\n"


def test_a_first_record_is_one_step(capsys: pytest.CaptureFixture[str]):
    write(Path("first"), [{"step": 1, "tokens": 8, "loss": 4.0}], max_iters=1)
    assert run("first", "--no-sample") == 0
    assert capsys.readouterr().out == "first: no problem in 1 step; train loss 4.0000, not evaluated\n"


def test_a_sample_of_the_best_checkpoint_is_made_and_judged(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert run(str(trained), "--json", "--device", "cpu") == 0
    first = json.loads(capsys.readouterr().out)
    assert run(str(trained), "--json", "--device", "cpu") == 0
    assert json.loads(capsys.readouterr().out)["sample"] == first["sample"]
    assert len(first["sample"]) == 200
    assert set(first["sample"]) <= set(runs.TEXT)
    monkeypatch.setattr(TextGenerator, "generate", lambda *_, **__: "over and " * 30)
    assert run(str(trained), "--device", "cpu") == 0
    assert "\noutput repeats\n  seen    97% of a sample of 270 characters" in capsys.readouterr().out


def test_a_damaged_checkpoint_and_vocabulary_are_no_failure(trained: Path, capsys: pytest.CaptureFixture[str]):
    out = Path(shutil.copytree(trained, "out"))
    (out / "tokenizer.json").write_text("{")
    assert run() == 0
    printed, err = capsys.readouterr()
    assert printed.startswith("out: no problem in 3 steps; ")
    assert err.startswith("whether the output repeats was not checked: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "saying"),
    [
        (["nowhere"], "--out_dir nowhere does not exist"),
        (["empty"], "--out_dir empty: no step is logged there yet"),
        (["garbage"], "garbage/metrics.jsonl holds no record of a run: 1 damaged line"),
        (["well", "--device", "abacus"], "--device"),
        (["well", "well"], "'well' is not a flag"),
    ],
)
def test_bad_input_is_a_line(words: list[str], saying: str, capsys: pytest.CaptureFixture[str]):
    write(Path("well"), healthy()[:5])
    write(Path("empty"), [])
    write(Path("garbage"), [])
    Path("garbage/metrics.jsonl").write_bytes(b"\x80" * 999 + b"\n")
    assert run(*words) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("error: ")
    assert saying in err


def test_torn_lines_are_counted_and_no_failure(capsys: pytest.CaptureFixture[str]):
    path = write(Path("torn"), healthy()) / "metrics.jsonl"
    lines = path.read_text().splitlines()
    lines[40] = lines[40][:30]
    path.write_text("\n".join(lines)[:-20])
    assert run("torn", "--no-sample") == 0
    out, err = capsys.readouterr()
    assert err == f"{path}: 1 damaged line left out\n"
    assert out.startswith(f"torn: no problem in {SETTINGS['max_iters']:,} steps; ")
