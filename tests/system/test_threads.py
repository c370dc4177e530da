"""The number of CPU threads, and a run's record of it."""

import json

import pytest
import torch

import fastgpt
from fastgpt.errors import UsageError
from fastgpt.system import cpus, threads
from fastgpt.system.contention import Slowness
from tests.helpers import runs
from tests.test_cli import generate, parse, refused, toml

pytestmark = pytest.mark.usefixtures("four_cpus")


@pytest.fixture
def four_cpus(monkeypatch: pytest.MonkeyPatch):
    """PyTorch's own number is 3, this process may use four CPUs, and no variable says how many."""
    before = torch.get_num_threads()
    for name in threads.SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cpus, "usable", lambda: 4)
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("asked", "recorded", "usable", "expected"),
    [
        (None, None, 4, 3),
        (None, None, 2, 2),  # the affinity or the quota allows fewer
        (None, 4, 4, 4),  # as the run had them
        (None, 4, 2, 2),
        (2, 4, 4, 2),
        (6, None, 4, 6),
    ],
)
def test_threads_are_those_asked_for_then_the_runs_then_what_fits(
    monkeypatch: pytest.MonkeyPatch, asked: int | None, recorded: int | None, usable: int, expected: int
):
    monkeypatch.setattr(cpus, "usable", lambda: usable)
    with threads.restored():
        assert threads.use(asked, recorded) == expected == torch.get_num_threads()
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize("name", threads.SETTINGS)
def test_a_users_own_number_is_taken_as_pytorch_took_it(monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.setattr(cpus, "usable", lambda: 1)
    monkeypatch.setenv(name, "3")
    assert threads.use(None, recorded=2) == 3
    assert threads.use(2) == 2


@pytest.mark.parametrize("kind", [parse, generate])
def test_auto_is_a_number_left_to_the_machine(kind, tmp_path):
    assert kind("--threads", "auto").threads is None
    assert kind("--threads=AUTO").threads is None
    assert kind("--threads", "3").threads == 3
    assert kind().threads is None


def test_auto_is_written_alike_in_a_file(tmp_path):
    assert parse(toml(tmp_path, 'threads = "auto"\n')).threads is None
    assert parse(toml(tmp_path, "threads = 2\n")).threads == 2
    refused("--threads", "0", saying=["--threads 0 must be at least 1"])
    refused("--threads", "many", saying=["--threads 'many' is not a whole number"])
    refused("--n_layer", "auto", saying=["--n_layer 'auto' is not a whole number"])


def recorded(out):
    return json.loads((out / "config.json").read_text())["threads"]


def test_a_run_records_its_threads_and_a_resume_keeps_them(workplace, capsys):
    out = runs.run("--threads 2 --max_iters 3")
    assert "CPU, 2 threads, float32" in " ".join(capsys.readouterr().err.split())
    assert recorded(out) == 2
    assert torch.get_num_threads() == 3

    assert runs.resume("--max_iters 4 --threads auto") == 0
    assert "bits may differ" not in capsys.readouterr().err
    assert recorded(out) == 2

    assert runs.resume("--max_iters 5 --threads 1") == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "threads" in line]
    assert said[0] == (
        "going on with --threads 1, where the run had 2: floats are summed in another order, so bits may differ"
    )
    assert recorded(out) == 1

    generator = fastgpt.load(out, device="cpu", threads=2)
    assert torch.get_num_threads() == 2
    assert fastgpt.load(out, device="cpu").generate(max_new_tokens=2) == generator.generate(max_new_tokens=2)
    assert torch.get_num_threads() == 2
    with pytest.raises(UsageError, match="`threads` 0 must be at least 1"):
        fastgpt.load(out, threads=0)


def test_advice_about_slow_steps_is_shown(workplace, capsys, monkeypatch):
    said = iter(["stop the others"])
    monkeypatch.setattr(Slowness, "advice", lambda self, seconds: next(said, None) if seconds > 0 else None)
    runs.run("--max_iters 3 --device cpu")
    lines = capsys.readouterr().err.splitlines()
    assert "stop the others" in lines
    assert lines.index("stop the others") < lines.index(next(line for line in lines if line.startswith("step 2/")))
