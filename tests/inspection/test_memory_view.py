"""`fastgpt inspect memory`: sums, a dry run's numbers, what fits, and bad input."""

import json
import shlex
from pathlib import Path

import pytest

from fastgpt import cli, inspect, train
from fastgpt.config.inspection import MemoryConfig
from fastgpt.inspection import memory_fit, memory_work
from fastgpt.inspection.memory_fit import largest
from fastgpt.inspection.subject import complete
from fastgpt.system.units import format_bytes, format_exactly
from tests.helpers import runs

pytestmark = pytest.mark.usefixtures("workplace")
SMALL = "--preset mini --device cpu --dtype float32 --vocab_size 96"
MIB = 1 << 20


def shown(capsys, flags: str) -> str:
    assert cli.run(inspect.main, ["memory", *shlex.split(flags)]) == 0
    return capsys.readouterr().out


def values(capsys, flags: str) -> dict:
    return json.loads(shown(capsys, f"{flags} --json"))


def test_kinds_add_up_and_are_what_is_measured(capsys):
    found = values(capsys, f"{SMALL} --measure --max_batch 2")
    for work in (found["training"], found["generation"]):
        for phase in work["phases"].values():
            sizes = (kind["bytes"] if isinstance(kind, dict) else kind for kind in phase["kinds"].values())
            assert sum(sizes) == phase["bytes"]
        assert work["peak"] == max(phase["bytes"] for phase in work["phases"].values())
        assert work["peak"] == pytest.approx(work["measured"]["peak"], rel=0.1)
    layers = found["training"]["phases"]["backward"]["kinds"]["activations"]
    assert sum(block["layers"] for block in layers["blocks"]) == 4
    blocks = sum(block["layers"] * block["bytes"] for block in layers["blocks"])
    assert layers["bytes"] == layers["embedding"] + blocks + layers["head"]


def test_a_dry_run_tells_the_same_numbers(capsys):
    work = "--preset cpu --device cpu --dtype float32 --n_layer 7 --n_head 2 --n_embd 16 --block_size 8 --batch_size 64"
    flags = shlex.split(f"{work} --gradient_accumulation_steps 2 --dropout 0.1")
    assert cli.run(train.main, ["--dataset", "text.txt", "--dry_run", *flags]) == 0
    told = capsys.readouterr().out
    found = values(capsys, shlex.join(flags) + f" --vocab_size {len(set(runs.TEXT))}")["training"]
    kinds, kept = found["phases"]["update"]["kinds"], found["kept"]
    for name in ("weights", "gradients", "moments"):
        assert f"{name:14}  {format_bytes(kinds[name])}" in told
    assert f"activations     {format_bytes(kept['activations']['bytes'] + kept['logits'])}, kept" in told
    assert f"memory          {format_bytes(found['peak'])} at the peak, in the {found['phase']} pass" in told


def test_the_table_shows_equal_blocks_together(capsys):
    lines = shown(capsys, f"{SMALL} --n_layer 9 --compile").splitlines()
    assert lines[0].startswith("Training step, float32, before compiling: 1 micro-batch of 16 sequences x 128 tokens")
    (row,) = (line for line in lines if "activations: blocks 1-8" in line)
    assert row.split()[3:7] == ["8", "x", "8.06", "MiB"]
    assert not any("measured" in line for line in lines)
    assert "estimate - measured" in shown(capsys, f"{SMALL} --measure")


def test_a_run_is_looked_at(capsys):
    runs.run()
    capsys.readouterr()
    found = values(capsys, "out --fit 1GiB")
    assert found["training"]["batch_size"] == 4
    assert found["training"]["gradient_accumulation_steps"] == 2
    assert found["training"]["dtype"] == "float32"
    assert found["fit"]["fits"]
    assert found["fit"]["changes"] == []


def test_a_picture_is_written(capsys):
    out = shown(capsys, f"{SMALL} --png memory.png --json --measure --n_layer 1")
    assert Path("memory.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads(out)["training"]["measured"]["phase"] == "backward"


class TestFit:
    @staticmethod
    def work(kernels: str, n_layer: int) -> memory_work.Work:
        given = {"device": "cpu", "dtype": "float32", "kernels": kernels, "vocab_size": 96, "n_layer": n_layer}
        return memory_work.prepared(*complete(MemoryConfig, "mini", given)[:2])

    def test_what_is_told_to_fit_fits(self):
        work, budget = self.work("torch", 2), 18 * MIB
        asked = work.step()
        fit = memory_fit.find(work, budget, asked)
        assert not fit.fits
        assert fit.largest is not None
        assert fit.same_tokens is not None
        assert fit.generation is not None
        B = fit.largest.settings["batch_size"]
        assert work.step(batch_size=B).peak == fit.largest.bytes <= budget < work.step(batch_size=B + 1).peak
        assert 16 % fit.same_tokens.settings["batch_size"] == 0
        for change in (fit.same_tokens, *fit.changes):
            assert work.step(**change.settings).peak == change.bytes <= budget
        assert [change.bytes for change in fit.changes] == sorted(change.bytes for change in fit.changes)
        many = fit.generation.settings["max_batch"]
        assert work.generation(many).peak == fit.generation.bytes <= budget < work.generation(many + 1).peak

    def test_changes_are_put_together_where_none_does_alone(self):
        work = self.work("reference", 1)
        fit = memory_fit.find(work, budget := 1600 * 1024, work.step())
        assert (fit.largest, fit.same_tokens, fit.changes) == (None, None, ())
        assert fit.together is not None
        assert list(fit.together.settings)[:3] == ["dtype", "kernels", "batch_size"]
        assert work.step(**fit.together.settings).peak == fit.together.bytes <= budget

    def test_nothing_fits(self, capsys):
        out = shown(capsys, f"{SMALL} --n_layer 1 --fit 300KiB")
        assert "no batch fits, not even of one sequence" in out
        assert "nor do all of them together" in out

    @pytest.mark.parametrize("budget", [1, 9, 10, 999, 5000, 123_456, 10**9])
    @pytest.mark.parametrize("most", [0, 1, 2, 1000])
    def test_the_largest_is_that_of_a_search_one_by_one(self, budget: int, most: int):
        for size in (lambda n: 3 + 7 * n, lambda n: max(50 + n, 9 * n), lambda n: n * n, lambda n: 10 * -(-n // 8)):
            assert largest(size, budget, most) == max((n for n in range(1, most + 1) if size(n) <= budget), default=0)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--fit '8 apples'", "--fit '8 apples' is not an amount of memory such as 2GiB, 500MB or 30%"),
        ("--fit 100KiB", "--fit 100KiB: the weights alone take 846 KiB; give more"),
        ("--png nowhere/memory.png", "--png nowhere/memory.png: there is no folder nowhere"),
        ("--batch_size 1000000000 --measure", "--measure runs a training step that holds about "),
        ("--preset cput", "--preset 'cput' is not one of modern-cpu, modern-baby"),
    ],
)
def test_bad_input_is_one_line(capsys, flags: str, said: str):
    words = flags if "--preset" in flags else f"{SMALL} {flags}"
    before = runs.contents(Path())
    assert cli.run(inspect.main, ["memory", *shlex.split(words)]) == 2
    out, err = capsys.readouterr()
    assert (out, runs.contents(Path()), err.count("\n")) == ("", before, 1)
    assert err.startswith(f"error: {said}")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("text.txt", "--src text.txt is no model"),
        ("out --n_layer 3", "--n_layer 3: the weights of out are for 1; leave it out"),
        ("out --block_size 4096", "--block_size 4096: out has learned 8 positions; pass 8 or less"),
    ],
)
def test_what_is_no_such_model_is_one_line(capsys, flags: str, said: str):
    runs.run()
    capsys.readouterr()
    assert cli.run(inspect.main, ["memory", *shlex.split(flags)]) == 2
    err = capsys.readouterr().err
    assert (err.startswith(f"error: {said}"), err.count("\n")) == (True, 1)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1,023 B"),
        (1024, "1.00 KiB"),
        (831 << 10, "831 KiB"),
        (MIB - 1, "1.00 MiB"),
        (35 * MIB, "35.0 MiB"),
    ],
)
def test_sizes_have_three_digits(size: int, text: str):
    assert format_exactly(size) == text
