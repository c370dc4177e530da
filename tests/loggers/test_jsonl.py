"""metrics.jsonl, the stopwatch, the formulas, and the picture."""

import io
import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from fastgpt.checkpoint.progress import Progress
from fastgpt.config.model import ModelConfig
from fastgpt.loggers.console import Display
from fastgpt.loggers.curves import plot_loss
from fastgpt.loggers.jsonl import MetricsFile, read_metrics
from fastgpt.model.gpt import GPT
from fastgpt.system.units import format_bytes, format_seconds
from fastgpt.training import log as run_log
from fastgpt.training import speed
from fastgpt.training.log import RunLog
from fastgpt.training.speed import Stopwatch, flops_per_token
from tests.helpers.records import RECORD


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


@contextmanager
def opened(path: Path, progress: Progress) -> Iterator[MetricsFile]:
    """The logger of a file, from its start to its end."""
    file = MetricsFile(path.parent)
    file.start(progress)
    yield file
    assert file.finish(None) is None


def lines(path: Path) -> list[dict]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_line_is_on_disk_as_soon_as_it_is_written(path: Path):
    with opened(path, Progress()) as file:
        for step in (1, 2):
            file.log(RECORD | {"step": step})
            assert [line["step"] for line in lines(path)] == list(range(1, step + 1))
    with pytest.raises(ValueError, match="closed"):
        file.log(RECORD)
    assert read_metrics(path) == [RECORD | {"step": step} for step in (1, 2)]


def test_reopening_forgets_the_steps_that_are_done_again(path: Path):
    path.write_text("".join(json.dumps({"step": step, "tokens": 0}) + "\n" for step in (10, 20, 20, 30)))
    with opened(path, Progress(step=20, evaluated_step=20)) as file:
        file.log({"step": 30, "tokens": 1})
    assert [line["step"] for line in lines(path)] == [10, 20, 20, 30]
    assert list(path.parent.iterdir()) == [path]


@contextmanager
def recording(path: Path, progress: Progress) -> Iterator[RunLog]:
    """The log of a run, from its start to its end."""
    with RunLog(Display(Console(file=io.StringIO()), 9, 1.0), [MetricsFile(path.parent)]) as log:
        log.start(progress)
        yield log


def test_wall_time_goes_on_over_a_resume_and_over_a_return_to_an_earlier_step(path: Path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(run_log, "time", type("Clock", (), {"monotonic": staticmethod(lambda: now[0])}))
    with recording(path, Progress()) as log:
        for step in (1, 2, 3):
            now[0] += 10
            log.log(RECORD | {"step": step})
    now[0] += 5000  # stopped, with a checkpoint of step 2
    with recording(path, Progress(step=2)) as log:
        now[0] += 7
        log.log(RECORD | {"step": 3})
        log.go_back(Progress(step=2))
        now[0] += 0.0625
        log.log(RECORD | {"step": 3})
    assert {line["step"]: line["seconds"] for line in lines(path)} == {1: 10, 2: 20, 3: 27.062}


def kept(path: Path, records: list[dict], progress: Progress) -> list[dict]:
    """What is left of records when a run goes on from there."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    with opened(path, progress):
        return lines(path)


def test_an_evaluation_that_is_made_up_for_stands_there_once(path: Path):
    """The process died after the record, while the checkpoint that knows of the evaluation was written."""
    records = [{"step": 10, "loss": 2.0}, {"step": 10, "val_loss": 2.5}]
    assert kept(path, records, Progress(step=10, evaluated_step=0)) == records[:1]
    assert kept(path, records, Progress(step=10, evaluated_step=10)) == records


def test_a_return_that_is_done_again_stands_there_once(path: Path):
    records = [
        {"step": 8, "loss": 2.0},
        {"step": 8, "rolled_back_from": 12, "batches": [8, 11]},
        {"step": 8, "rolled_back_from": 11, "batches": [12, 14]},
    ]
    assert kept(path, records, Progress(step=8, skipped_batches=4)) == records[:2]
    assert kept(path, records, Progress(step=12, skipped_batches=4)) == records[:2]
    assert kept(path, records, Progress(step=8, skipped_batches=7)) == records


@given(cut=st.integers(0, 60))
def test_a_line_cut_short_by_a_crash_is_left_out(tmp_path_factory, cut: int):
    path = tmp_path_factory.mktemp("cut") / "metrics.jsonl"
    text = "".join(json.dumps({"step": step, "loss": 1.5}) + "\n" for step in (1, 2))
    path.write_text(text[: len(text) - 1 - cut])
    whole = len(text[: len(text) - 1 - cut].split("}")) - 1
    assert [record["step"] for record in read_metrics(path)] == [1, 2][:whole]
    with opened(path, Progress(step=2, evaluated_step=2)):
        pass
    assert len(lines(path)) == whole


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_json_lacks_is_null(path: Path, value: float):
    with opened(path, Progress()) as file:
        file.log(RECORD | {"grad_norm": value})
    assert lines(path) == [RECORD | {"grad_norm": None}]


def test_no_file_has_no_records(path: Path):
    assert read_metrics(path) == []


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(speed, "time", type("Clock", (), {"perf_counter": staticmethod(lambda: now[0])}))
    assert time.perf_counter() != 100.0  # only the module's own clock is replaced
    return now


def test_the_stopwatch_counts_steps_and_not_what_lies_between(clock: list[float]):
    watch = Stopwatch(torch.device("cpu"))
    for seconds in (70.0, 1.0, 3.0):  # the first is not counted
        with watch:
            clock[0] += seconds
        clock[0] += 50  # an evaluation
    assert watch.lap() == 2.0
    with watch:
        clock[0] += 5
    assert (watch.lap(), watch.seconds, watch.steps) == (5.0, 9.0, 3)


def test_a_step_that_was_dropped_and_time_out_of_it_do_not_count(clock: list[float]):
    watch = Stopwatch(torch.device("cpu"))
    with watch:
        clock[0] += 70
        watch.drop()
    assert watch.first  # the next one compiles
    for _ in range(2):
        with watch:
            clock[0] += 3
            with watch.paused():
                clock[0] += 100
    assert watch.lap() == 3.0


def test_an_empty_lap_has_no_time(clock: list[float]):
    watch = Stopwatch(torch.device("cpu"))
    assert (watch.lap(), watch.seconds, watch.steps) == (None, 0.0, 0)
    with watch:
        clock[0] += 70
    assert (watch.lap(), watch.seconds, watch.steps) == (None, 0.0, 0)


def test_the_first_step_is_waited_for_so_that_the_second_need_not(monkeypatch):
    waited = []
    monkeypatch.setattr(speed, "synchronize", waited.append)
    watch = Stopwatch(torch.device("cpu"))
    for _ in range(3):
        with watch:
            pass
    assert waited == [torch.device("cpu")]


@pytest.mark.parametrize("position", ["learned", "rotary"])
def test_flops_are_six_a_weight_and_attention_at_half(position: str):
    config = ModelConfig(vocab_size=30, block_size=16, n_layer=2, n_head=2, n_embd=8, bias=False, position=position)
    C, T, L, V = 8, 16, 2, 30
    matrices = L * 12 * C * C + V * C + (2 * L + 1) * C  # attention 4, MLP 8; embedding; LayerNorms
    scores = L * 2 * 2 * T * C * 3 // 2  # QK^T and PV, forward and twice backward, half of them masked
    assert flops_per_token(config, GPT(config).num_parameters()) == 6 * matrices + scores


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (59.6, "1:00"), (61, "1:01"), (3599.4, "59:59"), (3600, "1:00:00"), (90061, "25:01:01")],
)
def test_seconds_are_written_as_a_clock(seconds: float, text: str):
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (None, "memory unknown"),
        (0, "0 KiB"),
        (5000, "5 KiB"),
        (1 << 20, "1 MiB"),
        (5 << 20, "5 MiB"),
        (3 << 29, "1.5 GiB"),
    ],
)
def test_bytes_are_written_in_binary_units(count: int | None, text: str):
    assert format_bytes(count) == text


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_the_curves_are_a_png_however_short_the_run(path: Path, steps: int):
    with opened(path, Progress()) as file:
        for step in range(1, steps + 1):
            file.log({"step": step, "tokens": step * 32, "loss": 3.0 / step})
            file.log({"step": step, "tokens": step * 32, "val_loss": math.nan if step == 2 else 3.1})
            file.log({"step": step, "tokens": 10**400, "loss": 1.0})
            file.log({"step": 10**400, "tokens": step, "loss": 1.0})
            file.log({"step": step, "tokens": step, "loss": 1e308, "val_loss": 10**400})
    picture = plot_loss(path.parent)
    assert picture == path.parent / "plots" / "loss.png"
    content = picture.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert content.endswith(b"IEND\xaeB`\x82")
    width, height = (int.from_bytes(content[at : at + 4], "big") for at in (16, 20))
    assert (width, height) == (960, 600)
