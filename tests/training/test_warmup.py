"""A warm-up that nobody asked for takes at most a tenth of the run; the number is the run's from then on."""

from pathlib import Path

import pytest

from fastgpt import cli, train
from fastgpt.checkpoint import run_folder
from fastgpt.config.training import PRESETS, TrainConfig
from fastgpt.training.schedule import learning_rate
from fastgpt.training.start import with_warmup
from tests.helpers import runs

pytestmark = pytest.mark.usefixtures("workplace")
AT = runs.FLAGS.index("--warmup_iters")
FLAGS = [*runs.FLAGS[:AT], *runs.FLAGS[AT + 2 :], "--max_iters", "20", "--eval_interval", "20"]


def trained(capsys, *flags: str) -> tuple[TrainConfig, list[str]]:
    """The saved configuration of a run, and the lines about its warm-up."""
    assert cli.run(train.main, [*FLAGS, *flags]) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "warm-up" in line]
    return run_folder.load(Path("out"))[0], told


def test_a_short_run_reaches_its_rate_and_says_so(capsys):
    config, told = trained(capsys)
    assert config.warmup_iters == 2
    assert told == [
        "the warm-up takes 2 of the 20 steps, a tenth, and not 10; --warmup_iters sets another number",
    ]
    assert max(runs.records(Path("out"), "lr").values()) == pytest.approx(config.learning_rate)


def test_what_was_asked_for_is_kept_by_flag_or_file(capsys):
    config, told = trained(capsys, "--warmup_iters", "30")
    assert (config.warmup_iters, told) == (30, [])
    Path("settings.toml").write_text("warmup_iters = 35\n")
    config, told = trained(capsys, "--config", "settings.toml", "--overwrite")
    assert (config.warmup_iters, told) == (35, [])


def test_a_resume_keeps_the_schedule_and_an_older_runs_warm_up(capsys):
    trained(capsys)
    assert runs.resume("--max_iters 24") == 0
    assert run_folder.load(Path("out"))[0].warmup_iters == 2
    older, told = trained(capsys, "--warmup_iters", "100", "--overwrite")  # as all runs had before
    assert runs.resume("--max_iters 22") == 0
    assert run_folder.load(Path("out"))[0].warmup_iters == older.warmup_iters == 100
    assert told == []
    assert "warm-up" not in capsys.readouterr().err


def test_in_python_too(capsys):
    config, _ = trained(capsys)
    changes = {"out_dir": "other", "warmup_iters": None, "max_iters": 10}
    runs.train(TrainConfig(**vars(config) | changes))
    assert run_folder.load(Path("other"))[0].warmup_iters == 1
    assert "the warm-up takes 1 of the 10 steps, a tenth, and not 2000" in capsys.readouterr().err


def test_long_runs_warm_up_as_ever():
    assert TrainConfig().warmup == PRESETS["gpt2"].warmup == 2000
    assert learning_rate(2000, TrainConfig()) == pytest.approx(TrainConfig().learning_rate)
    for name in ("mini", "cpu", "baby"):
        assert with_warmup(PRESETS[name]) == PRESETS[name]
        assert PRESETS[name].warmup_iters == 100
