"""The speedruns' command: who runs, what counts, and what is printed and written."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from bench import speedrun
from bench.peers import nanogpt_recipe
from bench.tools import race
from bench.tools.race import Run
from fastgpt import cli
from fastgpt.config.training import PRESETS, TrainConfig
from fastgpt.training.start import of_preset

TINY = (
    "--n_layer 1 --n_head 2 --n_embd 16 --block_size 8 --batch_size 2 --max_iters 3 --warmup_iters 0 --tokenizer byte"
)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("To be, or not to be, that is the question.\n" * 60)
    return path


def call(monkeypatch, text: Path, flags: str) -> int:
    """The command in this process, on a text of its own."""
    monkeypatch.setattr(speedrun, "apart", lambda function, *arguments: function(*arguments))
    board = speedrun.BOARDS["pydocs"]
    monkeypatch.setitem(speedrun.BOARDS, "pydocs", speedrun.Board("mini", {"dataset": str(text)}, board.ingredients))
    data_dir = text.parent / "data"
    return cli.run(speedrun.main, f"pydocs {TINY} --data_dir {data_dir} {flags}".split())


def of_command(recipe: str) -> TrainConfig:
    """The settings of a recipe as `fastgpt.train` takes them."""
    start = ["--config", str(speedrun.ROOT / recipe)] if recipe.endswith(".toml") else ["--preset", recipe]
    preset, given = cli.read(TrainConfig, start, prog="", description="", presets=PRESETS)
    return dataclasses.replace(of_preset(preset, given)[0], **given)


def test_every_recipe_is_a_whole_configuration():
    for board in speedrun.BOARDS.values():
        whole = speedrun.settings_of(board, [])
        TrainConfig(**whole).check()
        assert whole["eval_interval"] <= whole["max_iters"]
        assert TrainConfig(**whole) == dataclasses.replace(of_command(board.recipe), **board.settings)
        for name, less in board.ingredients.items():
            without = {**whole, **less}
            TrainConfig(**without).check()
            assert without != whole, name


def test_a_board_takes_other_settings_and_writes_what_it_prints(monkeypatch, capsys, text: Path, tmp_path: Path):
    assert call(monkeypatch, text, f"--seeds 2 --only eager --out {tmp_path}") == 0
    printed = capsys.readouterr().out
    [written], [lines] = tmp_path.glob("*-speedrun-pydocs.txt"), tmp_path.glob("*-speedrun-pydocs.jsonl")
    assert written.read_text() == printed
    runs = [Run(**json.loads(line)) for line in lines.read_text().splitlines()]
    assert [(run.entrant, run.seed, run.steps, run.tokens) for run in runs] == [
        ("eager", 1337, 3, 48),
        ("eager", 1338, 3, 48),
    ]
    assert all(run.seconds > 0 and run.bits_per_byte and run.bits_per_byte > 3 for run in runs)
    mean = sum(run.bits_per_byte or 0 for run in runs) / 2
    assert f"{mean:.4f} ± " in printed


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--only nobody", "--only 'nobody' is not one of eager, compiled"),
        ("--seeds 0", "argument --seeds: 0 is not a whole number from 1 on (see python bench/speedrun.py --help)"),
        ("--n_layer 0", "--n_layer 0 must be at least 1"),
    ],
)
def test_bad_input_is_one_line(monkeypatch, capsys, text: Path, flags: str, said: str):
    assert call(monkeypatch, text, flags) == 2
    assert capsys.readouterr().err == f"error: {said}\n"


def test_a_mean_counts_only_if_it_is_surely_below_the_mark():
    losses = [1.86, 1.87, 1.865, 1.872, 1.861]
    t = (np.mean(losses) - 1.88) / (np.std(losses, ddof=1) / 5**0.5)
    square = t**2 / (4 + t**2)
    by_hand = 0.5 - 0.75 * square**0.5 * (1 - square / 3)  # Student's distribution of 4 degrees of freedom
    assert race.p_below(losses, 1.88) == pytest.approx(by_hand, rel=1e-9)
    assert race.p_below([loss + 0.02 for loss in losses], 1.88) > 0.5
    assert race.p_below([1.0], 1.88) is None
    board = speedrun.BOARDS["shakespeare"]
    firsts = [30.0, 1.0, 1.0, 1.0, 1.0]  # seconds of the first step: of the first run, and with cached code
    runs = [
        Run("eager", seed, 10, 100, 2.0, first, loss)
        for seed, (first, loss) in enumerate(zip(firsts, losses, strict=True))
    ]
    runs.append(Run(speedrun.PEER, 0, 20, 600, 18.0, 0.0, 1.9))
    head, ours, _, counts, faster = [line for line in speedrun.report(board, runs).splitlines() if line]
    assert ours.split()[-4:] == ["2.0", "30.0", "1.0", "3.0"]
    assert head.endswith("s in steps  s compiling  s cached  s together")
    assert counts == "eager: counts: mean below 1.88 with p < 0.01"
    assert faster.startswith("eager: 9.00x less time in steps")
    assert "6.00x with the first step of cached code, 6.00x fewer tokens" in faster
    unsure = [Run("eager", seed, 10, 100, 2.0, 1.0, loss) for seed, loss in enumerate((1.70, 1.95, 1.87))]
    assert "eager: does not count" in speedrun.report(board, unsure)
    assert "counts" not in speedrun.report(
        board, [dataclasses.replace(run, entrant="without Muon") for run in runs[:5]]
    )


def test_the_peer_learns_and_is_judged_on_every_token():
    tokens = np.tile(np.arange(5, dtype=np.uint16), 500)
    few, many = (nanogpt_recipe.train(tokens, tokens[:997], 5, 0, steps) for steps in (2, 120))
    assert many.val_loss < 0.2 < 1.5 < few.val_loss
    assert (many.steps, many.tokens) == (120, 120 * 12 * 64)
    rates = [nanogpt_recipe.learning_rate(step, 2000) for step in (0, 99, 100, 1999)]
    assert rates == pytest.approx([1e-3 / 101, 1e-3 * 100 / 101, 1e-3, 1e-4], rel=1e-4)


@pytest.mark.slow
def test_a_run_apart_is_the_same_run(text: Path, tmp_path: Path):
    flags = f"{TINY} --dataset {text} --data_dir {tmp_path / 'data'} --threads 1".split()
    settings = speedrun.settings_of(speedrun.Board("mini", {}, {}), flags)
    here, there = race.train_engine("us", settings, 1), race.apart(race.train_engine, "us", settings, 1)
    assert (here.val_loss, here.steps) == (there.val_loss, there.steps)
