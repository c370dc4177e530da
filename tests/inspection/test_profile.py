"""The profile: every moment of a step belongs to one operation, and limits follow from counted work."""

import json
from pathlib import Path

import pytest
import torch

from fastgpt import cli, inspect
from fastgpt.config.inspection import ProfileConfig
from fastgpt.inspection import least_work, profile, profile_view
from fastgpt.inspection.profile import Profile, Profiled, Row
from fastgpt.inspection.scopes import BACKWARD, FORWARD, LINEAR, UPDATE
from fastgpt.ops import ceilings
from fastgpt.ops.ceilings import Ceilings
from fastgpt.ops.counts import count

LAYERS, N, C, V = 3, 4 * 16, 32, 40
TINY = ProfileConfig(
    n_layer=LAYERS, n_head=2, n_embd=C, block_size=16, batch_size=4, vocab_size=V, dtype="float32", device="cpu"
)
MADE = Ceilings(copy_bandwidth=1e9, read_bandwidth=2e9, matmul={"float32": 1e10, "bfloat16": 4e10, "float16": 1e10})
CALLS = {
    "embedding": 1,
    "layer_norm": 1,
    "add_layer_norm": 2 * LAYERS,
    "causal_attention": LAYERS,
    "activation": LAYERS,
    **dict.fromkeys(LINEAR.values(), LAYERS),
}


def quiet(text: str) -> None:
    pass


@pytest.fixture(scope="module")
def trained() -> Profiled:
    return profile.training(TINY, None, quiet)


@pytest.fixture(scope="module")
def generated() -> Profiled:
    return profile.generation(TINY, None, quiet)


@pytest.fixture
def made_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "measure", lambda device: MADE)


def rows(one: Profile) -> dict[str, Row]:
    return {row.name: row for row in one.rows}


def test_each_operation_of_a_training_step_has_a_row(trained: Profiled):
    (step,) = trained.profiles
    found = rows(step)
    calls = CALLS | {"linear_cross_entropy": 1, "optimizer": 1}
    assert {name: found[name].calls for name in calls} == calls
    for name in (*CALLS, "linear_cross_entropy"):
        assert found[name].seconds[FORWARD] > 0
        assert found[name].seconds[BACKWARD] > 0
    assert set(found["optimizer"].seconds) == set(found["clip"].seconds) == {UPDATE}
    assert sum(row.total for row in step.rows) == pytest.approx(step.seconds)


def test_each_operation_of_a_token_has_a_row(generated: Profiled):
    prefill, token = generated.profiles
    calls = CALLS | {"logits": 1, "sampling": 1, "cache": LAYERS}
    for one in (prefill, token):
        assert {name: rows(one)[name].calls for name in calls} == calls
        assert all(set(row.seconds) <= {FORWARD, ""} for row in one.rows)
        assert sum(row.total for row in one.rows) == pytest.approx(one.seconds)


def test_modules_add_up_to_the_step(trained: Profiled):
    (step,) = trained.profiles
    found = profile_view.modules(step)
    parts = {f"h.{layer}.{part}" for layer in range(LAYERS) for part in ("attn", "mlp", "norms")}
    assert parts | {"embedding", "ln_f", "head", "optimizer"} <= set(found)
    assert sum(sum(times.values()) for times in found.values()) == pytest.approx(step.seconds)


def test_limits_are_of_the_counted_work():
    linear = count("linear", FORWARD, {"N": N, "C": C, "out": 4 * C, "bias": 1}, 4)
    assert linear.flops == pytest.approx(2 * N * C * 4 * C, rel=0.02)  # and the bias
    works = least_work.of_training(TINY.training(), 1000, torch.device("cpu"), torch.float32)
    work = works["MLP up"]
    assert (work.calls, work.counts[FORWARD]) == (LAYERS, linear)
    assert work.counts[BACKWARD].flops == pytest.approx(2 * linear.flops, rel=0.02)
    each = [max(one.bytes / 2e9, one.flops / 1e10) for one in work.counts.values()]
    assert work.limit(MADE).seconds == pytest.approx(LAYERS * sum(each))


def test_the_most_to_win_is_farthest_above_its_limit(trained: Profiled):
    (step,) = (one.against(MADE) for one in trained.profiles)
    gains = {row.name: row.total - row.limit.seconds for row in step.rows if row.limit is not None}
    assert step.most_to_win is not None
    assert step.most_to_win.name == max(gains, key=lambda name: gains[name])
    assert step.most_to_win.gain == pytest.approx(max(gains.values()))


SHAPE = "--n_layer 2 --n_head 2 --n_embd 32 --block_size 16 --batch_size 2 --vocab_size 40 --dtype float32 --preset cpu"


@pytest.mark.usefixtures("made_ceilings")
def test_the_command_writes_a_table_a_picture_and_a_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    assert cli.run(inspect.main, ["profile", *SHAPE.split(), "--png", "p.png", "--trace", "t.json"]) == 0
    out, err = capsys.readouterr()
    assert max(map(len, out.splitlines())) <= 80
    assert "> the most to win: " in out
    assert {"p.png", "t.json"} == {path.name for path in tmp_path.iterdir()}
    assert Path("p.png").read_bytes().startswith(b"\x89PNG")
    names = {event.get("name") for event in json.loads(Path("t.json").read_bytes())["traceEvents"]}
    assert {"phase: forward", "module: h.1.mlp", "op: causal_attention", "op: optimizer"} <= names
    assert err.count("\nwrote ") == 2


@pytest.mark.usefixtures("made_ceilings")
def test_json_holds_the_numbers(capsys: pytest.CaptureFixture[str]):
    assert cli.run(inspect.main, ["profile", *SHAPE.split(), "--generate", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ceilings"]["matmul"] == MADE.matmul
    prefill, token = found["profiles"]
    for one in (prefill, token):
        assert sum(row["seconds"] for row in one["operations"]) == pytest.approx(one["seconds"])
    attention = next(row for row in token["operations"] if row["operation"] == "causal_attention")
    assert attention["limit"] == pytest.approx(max(attention["bytes"] / 2e9, attention["flops"] / 1e10))


@pytest.mark.parametrize(
    ("words", "saying"),
    [
        ("--preset cpu --png no/p.png", "--png no/p.png: there is no folder no"),
        ("--preset cpu --trace .", "--trace . is a folder"),
        ("--preset cpo", "--preset 'cpo' is not one of mini, cpu"),
        ("nowhere", "--src nowhere is no file or folder here"),
        ("--preset cpu --generate --compile", "--compile with --generate"),
        ("--preset cpu --batch_size 1000000000", "--batch_size 1000000000"),
    ],
)
def test_bad_input_is_refused_in_a_line(
    words: str, saying: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    assert cli.run(inspect.main, ["profile", *words.split()]) == 2
    out, err = capsys.readouterr()
    assert (out, list(tmp_path.iterdir())) == ("", [])
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert saying in line
