"""`fastgpt inspect profile`: tables in 80 columns, the picture, the trace, and what is refused."""

import json
import re
import shlex

import pytest
from rich.cells import cell_len

from fastgpt import cli
from fastgpt import inspect as command
from fastgpt.inspection import profile
from fastgpt.inspection.profile import Profile, Row
from fastgpt.inspection.profile_view import notes
from fastgpt.inspection.scopes import FORWARD
from fastgpt.ops import ceilings
from fastgpt.ops.ceilings import Ceilings
from tests.helpers import gpt2_folders, runs

SMALL = (
    "--preset mini --n_layer 2 --n_head 2 --n_embd 16 --block_size 16 --batch_size 2 --device cpu --dtype float32 "
    "--threads 1"
)
MADE = Ceilings(2e9, 1e9, {"float32": 1e12})


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Measurements of a moment, and ceilings that were measured before."""
    for name, value in {"SECONDS": 0.0, "FEWEST": 1}.items():
        monkeypatch.setattr(profile, name, value)
    monkeypatch.setattr(ceilings, "measure", lambda device: MADE)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working folder, which is empty."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(flags: str) -> int:
    return cli.run(command.main, ["profile", *shlex.split(flags)])


def test_tables_fit_80_columns_and_the_files_are_whole(folder, capsys):
    assert run(f"{SMALL} --png bars.png --trace trace.json") == 0
    shown, said = capsys.readouterr()
    assert max(map(cell_len, shown.splitlines())) <= 80
    lines = [line.replace(">", " ").split() for line in shown.splitlines()]
    assert ["MLP", "up", "2"] in [line[:3] for line in lines]
    assert ["h.0", "to", "h.1,", "2", "layers"] in [line[:5] for line in lines]
    assert "ceilings 2.0 GB/s, 1,000 GFLOP/s" in shown
    assert "> most to win: " in shown
    assert re.search(r"wrote bars\.png: \d+ KiB\nwrote trace\.json: .*\n$", said)
    assert (folder / "bars.png").read_bytes().startswith(b"\x89PNG")
    trace = json.loads((folder / "trace.json").read_text(encoding="utf-8"))
    assert [trace.get(name) or "" for name in ("host_name", "traceName")] == ["", ""]
    names = [event.get("name") for event in trace["traceEvents"]]
    for name in ("phase: forward", "module: h.1.attn", "op: MLP down", "op: optimizer"):
        assert names.count(name) == names.count("fastgpt step") * (2 if name == "op: MLP down" else 1), name
    assert sorted(path.name for path in folder.iterdir()) == ["bars.png", "trace.json"]


def test_json_holds_the_same_numbers(capsys):
    assert run(f"{SMALL} --json") == 0
    (line,) = capsys.readouterr().out.splitlines()
    values = json.loads(line)
    (found,) = values["profiles"]
    rows = {row["operation"]: row for row in found["operations"]}
    assert sum(row["seconds"] for row in rows.values()) == pytest.approx(found["seconds"])
    assert sum(sum(times.values()) for times in found["modules"].values()) == pytest.approx(found["seconds"])
    assert (rows["qkv"]["flops"], rows["qkv"]["limit_by"]) == (2 * (3 * 2 * 32 * 16 * 48 + 2 * 32 * 48), "memory")
    assert rows["qkv"]["limit"] == pytest.approx(rows["qkv"]["bytes"] / 2e9)
    assert rows["qkv"]["limit_reached"] == pytest.approx(rows["qkv"]["limit"] / rows["qkv"]["seconds"])
    assert values["ceilings"] == {"copy_bandwidth": 2e9, "read_bandwidth": 1e9, "matmul": {"float32": 1e12}}


@pytest.mark.parametrize("work", ["", "--generate"])
def test_a_hugging_face_folder_is_profiled(tmp_path, capsys, work):
    gpt2_folders.folder_of(tmp_path / "gpt2", n_layer=3, n_head=2, n_embd=16, block_size=8)
    assert run(f"{tmp_path / 'gpt2'} {work} --batch_size 2 --threads 1 --device cpu --dtype float32 --json") == 0
    values = json.loads(capsys.readouterr().out)
    assert values["model"].startswith("3 layers, 2 heads, width 16, context 8, vocabulary ")
    for found in values["profiles"]:
        assert {row["operation"]: row["calls"] for row in found["operations"]}["causal_attention"] == 3
    assert len(values["profiles"]) == (2 if work else 1)


def test_a_run_is_profiled_as_it_was_trained(workplace, capsys):
    runs.run()
    capsys.readouterr()
    assert run("out --json") == 0
    values = json.loads(capsys.readouterr().out)
    assert (values["model"][:8], values["arithmetic"]) == ("1 layer,", "float32")
    assert values["profiles"][0]["what"] == "training step of 4 x 8 tokens"


def test_what_cannot_be_told_is_said():
    row = Row("MLP up", 1, {FORWARD: 1e-3})
    compiled = Profile("step", 1e-3, 1e-3, 1, 1, [row], {}, {})
    assert notes(compiled, compiled=True) == [
        "compiled code has no modules: its calls and kernels go by PyTorch's names"
    ]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--preset mini --png none/bars.png", "--png none/bars.png: there is no folder none"),
        ("--preset mini --png same --trace ./same", "--png and --trace are both ./same; name two files"),
        ("--preset mini --trace .", "--trace . is a folder; name a file in it"),
        ("--preset mnii", "--preset 'mnii' is not one of"),
        ("nothing", "--src nothing is no file or folder here"),
        ("--preset mini --generate --compile", "--compile with --generate"),
        ("--preset mini --generate --block_size 1", "--block_size 1 has no room for a token after others"),
    ],
)
def test_bad_input_is_one_line(folder, capsys, flags, message):
    assert run(flags) == 2
    shown, said = capsys.readouterr()
    assert (shown, said.count("\n")) == ("", 1)
    assert said.startswith(f"error: {message}")
    assert list(folder.iterdir()) == []


def test_a_disk_that_is_read_only_is_noticed_before_measuring(folder, capsys, monkeypatch):
    def refused(dir):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("fastgpt.inspection.outputs.tempfile.TemporaryFile", refused)
    assert run(f"{SMALL} --png bars.png") == 2
    assert capsys.readouterr().err == ("error: --png bars.png cannot be written: Read-only file system; name another\n")
