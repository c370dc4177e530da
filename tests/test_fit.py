"""fastgpt.fit trains what the command trains, from Python."""

import builtins
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fastgpt
from fastgpt.checkpoint import run_folder, store
from fastgpt.config.training import PRESETS
from fastgpt.errors import RunFailed, UsageError
from fastgpt.loggers.jsonl import read_metrics
from fastgpt.training import start
from tests.helpers import runs
from tests.helpers.notebooks import as_a_notebook_shows
from tests.helpers.places import ROOT

pytestmark = pytest.mark.usefixtures("workplace")
SETTINGS = {
    **{"dataset": "text.txt", "device": "cpu", "dtype": "float32", "n_layer": 1, "n_head": 2, "n_embd": 16},
    **{"block_size": 8, "dropout": 0.0, "batch_size": 4, "gradient_accumulation_steps": 2, "learning_rate": 1e-2},
    **{
        "preset": "cpu",
        "warmup_iters": 2,
        "max_iters": 6,
        "eval_interval": 3,
        "eval_iters": 2,
        "log_interval": 1,
        "sample_interval": 0,
    },
}
UNTIMED = ("seconds", "ms", "tokens_per_second", "memory")
STRICT = """\
import fastgpt


def shown(record: dict[str, object]) -> None:
    print(record["step"], record.get("loss"))


run = fastgpt.fit(preset="mini", dataset="book.txt", max_iters=20, on_log=shown)
print(run.best_val_loss, run.history[-1], run.out_dir / "metrics.jsonl")
generator = fastgpt.load(run.out_dir, device="cpu")
print(generator.generate("The ", max_new_tokens=20, temperature=0.5))
for piece in generator.engine(max_batch=4).stream(["a", "b"]):
    print(piece.text)
"""


def untimed(records: list[dict]) -> list[dict]:
    return [{key: value for key, value in record.items() if key not in UNTIMED} for record in records]


def fit(out_dir: str = "out", **changed) -> fastgpt.FitSummary:
    return fastgpt.fit(**SETTINGS | {"out_dir": out_dir} | changed)


def test_losses_and_files_are_those_of_the_command():
    command, seen = runs.run("--preset mini", "command"), []
    summary = fit(preset="mini", on_log=seen.append)
    assert summary.out_dir == Path("out")
    assert untimed(summary.history) == untimed(read_metrics(command / "metrics.jsonl"))
    assert seen == summary.history
    assert [record["step"] for record in seen] == [1, 2, 3, 3, 4, 5, 6, 6]
    for name in (store.MODEL, store.OPTIMIZER):
        assert (store.find(Path("out"), "latest") / name).read_bytes() == (
            store.find(command, "latest") / name
        ).read_bytes()
    ours, theirs = (dict(vars(run_folder.load(Path(name))[0])) for name in ("out", "command"))
    assert ours | {"out_dir": ""} == theirs | {"out_dir": ""}
    assert (summary.steps, summary.finished, summary.failures) == (6, True, 0)
    assert summary.val_loss == runs.records(Path("out"), "val_loss")[6]


@pytest.mark.parametrize(("kind", "fitting"), [("cpu", "modern-cpu"), ("cuda", "baby")])
def test_a_preset_is_where_settings_begin(monkeypatch, kind: str, fitting: str):
    """TrainConfig() alone is GPT-2 for 600,000 steps."""
    seen = []
    monkeypatch.setattr(start, "resolve_device", lambda name: type("Device", (), {"type": kind}))
    monkeypatch.setattr(sys.modules["fastgpt.fit"], "train", lambda config, *rest: seen.append(config) or 1 / 0)
    for preset in (None, "gpt2"):
        with pytest.raises(ZeroDivisionError):
            fastgpt.fit(preset, dataset=Path("text.txt"), n_layer=np.int64(3))
    assert [(config.n_layer, config.dataset) for config in seen] == [(3, "text.txt")] * 2
    assert [type(config.n_layer) for config in seen] == [int, int]
    assert [config.max_iters for config in seen] == [PRESETS[fitting].max_iters, 600_000]


def test_a_run_is_resumed_and_has_the_whole_history():
    whole = fit("whole")
    fit(max_iters=4, eval_interval=3, lr_decay_iters=6)
    parted = fastgpt.fit(init_from="resume", out_dir="out", max_iters=6)
    losses = {record["step"]: record["loss"] for record in whole.history if "loss" in record}
    assert {record["step"]: record["loss"] for record in parted.history if "loss" in record} == losses


def test_a_run_is_overwritten_only_where_that_is_asked_for():
    fit(max_iters=2)
    with pytest.raises(UsageError, match="already holds a run"):
        fit(max_iters=2)
    assert fit(max_iters=1, overwrite=True).steps == 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"outdir": "x"}, "unknown setting 'outdir'; did you mean out_dir"),
        ({"preset": "minni"}, "preset 'minni' is not one of .*; did you mean mini"),
        ({"n_layer": "two"}, "`n_layer` 'two' is not of type int"),
        ({"n_layer": 0}, "`n_layer` 0 must be at least 1"),
        ({"n_head": 3}, "`n_head` 3 does not divide"),
        ({"dataset": "nowhere.txt"}, "nowhere.txt"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_written(settings: dict, words: str):
    with pytest.raises(UsageError, match=words):
        fit(**settings)
    assert not Path("out").exists()


def test_what_a_callback_raises_ends_the_run_and_a_lost_connection_does_not(capsys):
    def broken(record: dict) -> None:
        raise RunFailed("seen enough")

    def offline(record: dict) -> None:
        raise ConnectionError("offline")

    with pytest.raises(RunFailed, match="seen enough"):
        fit("broken", on_log=broken)
    summary = fit(on_log=offline)
    assert (summary.finished, summary.failures) == (True, 8)
    assert "warning: on_log misses a line of step 1: offline" in capsys.readouterr().err


def test_a_callback_cannot_change_what_is_saved():
    summary = fit(on_log=dict.clear)
    assert [record["step"] for record in summary.history] == [1, 2, 3, 3, 4, 5, 6, 6]


def test_a_notebook_has_one_live_line(monkeypatch, capsys):
    monkeypatch.setattr(builtins, "get_ipython", type("ZMQInteractiveShell", (), {}), raising=False)
    fit()
    err = capsys.readouterr().err
    assert "<pre" not in err  # rich's HTML
    assert "\x1b" not in err
    shown = as_a_notebook_shows(err)
    assert [line[:16] for line in shown if "/6" in line] == ["step 1/6  loss 3", "step 6/6  loss 3"]
    assert "(ln V, a uniform guess, is 3.37)" in "".join(shown)
    assert shown[-2].startswith("step 6/6  loss ")
    assert shown[-1] == ""


@pytest.mark.slow
@pytest.mark.parametrize("first", ["import fastgpt.fit", "from fastgpt.fit import fit", "fastgpt.fit", "pass"])
def test_it_can_be_called_whether_its_module_was_imported_or_not(first: str):
    twice = "for _ in range(2):\n    try: fastgpt.fit(preset='x')\n    except ValueError: print('called')"
    code = f"import fastgpt\n{first}\n{twice}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["called", "called"]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("pyright") is None, reason="needs pyright")
def test_pyright_finds_nothing_in_a_users_script(tmp_path: Path):
    (tmp_path / "user.py").write_text(STRICT)
    about = {"extraPaths": [str(ROOT), str(ROOT / "kernels")], "include": ["user.py"], "typeCheckingMode": "strict"}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(about))
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "--outputjson", "-p", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    try:
        report = json.loads(done.stdout)
    except ValueError:
        pytest.skip(f"pyright does not run here: {done.stderr:.200}")
    assert report["generalDiagnostics"] == []
    assert report["summary"]["filesAnalyzed"] == 1
