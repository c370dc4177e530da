"""The kept report of compiled rows: what is compiled anew, what is written, and what is said of it."""

import json
import os
import shutil
import subprocess
import sys

import pytest

triton = pytest.importorskip("triton")

from fastgpt_kernels import aot, compile_report  # noqa: E402
from fastgpt_kernels.compile_report import HERE, changes, expected, lines, path, read, refresh, write  # noqa: E402
from fastgpt_kernels.launch import TABLE, Config  # noqa: E402

ROW = ("sm_90", "norm_forward", "bfloat16 128 8x128 w4 s1 plain")


def line(target: str, kernel: str, config: str, registers: int = 32) -> dict:
    numbers = dict.fromkeys(compile_report.COLUMNS, 0) | {"registers": registers, "wide_loads": 0.5, "warnings": None}
    return {"target": target, "kernel": kernel, "config": config, **numbers, "seconds": 1.0}


class Compiler:
    """Gives every row the same number of registers, and remembers what it was asked for."""

    def __init__(self, registers: int = 32) -> None:
        self.registers, self.tasks = registers, []

    def __call__(self, tasks):
        for target, kernel, configs in tasks:
            self.tasks.append((target, kernel, list(configs)))
            yield [line(target, kernel, config, self.registers) for config in configs]


@pytest.fixture
def file(tmp_path):
    """A report of all rows."""
    refresh(path(tmp_path / "reports"), Compiler())
    return path(tmp_path / "reports")


def test_the_first_time_every_row_is_compiled(tmp_path):
    compiler = Compiler()
    file = path(tmp_path / "reports")
    assert file.name == f"{triton.__version__}.json"
    compiled, got_worse = refresh(file, compiler)
    rows = [(t, k, c) for t, k, configs in compiler.tasks for c in configs]
    assert ROW in rows
    assert compiled == len(rows) == sum(map(len, expected().values()))
    assert got_worse == []
    content = read(file)
    assert changes(content) == []
    assert [(one["target"], one["kernel"], one["config"]) for one in lines(content)] == rows
    first = line(*rows[0])
    del first["seconds"]
    assert lines(content)[0] == first


def test_a_current_report_is_left_alone(file):
    before, compiler = file.stat(), Compiler()
    assert refresh(file, compiler) == (0, [])
    assert compiler.tasks == []
    assert file.stat().st_ino == before.st_ino  # which a new file does not have


def test_another_tile_makes_its_own_rows_outdated_and_no_others(file, monkeypatch):
    rows = TABLE["norm_forward"]["sm_90", "16-bit"]
    monkeypatch.setitem(rows, 128, Config(4, 128, 4))
    configs = ["bfloat16 128 4x128 w4 s1 plain", "bfloat16 128 4x128 w4 s1 heaviest"]
    (group,) = (group for group in expected() if group.startswith("sm_90 norm_forward "))
    assert changes(read(file)) == [
        *(f"not compiled: {group} {config}" for config in sorted(configs)),
        *(f"outdated: {group} {config.replace('4x128', '8x128')}" for config in sorted(configs)),
    ]
    compiler = Compiler()
    assert refresh(file, compiler) == (2, [])
    assert compiler.tasks == [("sm_90", "norm_forward", configs)]
    assert changes(read(file)) == []
    assert list(read(file)[group])[:2] == configs  # in the table's order


def test_a_row_that_is_gone_leaves_the_report(file, monkeypatch):
    monkeypatch.delitem(TABLE["norm_forward"]["sm_90", "16-bit"], 128)
    assert [change.split(":")[0] for change in changes(read(file))] == ["outdated"] * 2
    compiler = Compiler()
    assert refresh(file, compiler) == (0, [])
    assert compiler.tasks == []
    assert changes(read(file)) == []


def test_other_code_makes_every_row_of_its_kernels_outdated_and_no_others(file, tmp_path):
    shutil.copytree(HERE, tmp_path / "commented")
    shutil.copytree(HERE, tmp_path / "changed")
    with (tmp_path / "commented" / "norm.py").open("a", encoding="utf-8") as norm:
        norm.write("# a comment, and code on which no kernel depends\nANSWER = 42\n")
    assert changes(read(file), tmp_path / "commented") == []
    with (tmp_path / "changed" / "norm.py").open("a", encoding="utf-8") as norm:
        norm.write("forward_launch.changed = True\n")
    found = changes(read(file), tmp_path / "changed")
    kernels = {change.split()[-8] for change in found}
    layer_norm = {"norm_forward", "norm_backward", "norm_weight_partials"}
    assert kernels == layer_norm | {f"rms_{name}" for name in layer_norm} | {"sum_partials"}
    rows = [one for one in lines(read(file)) if one["kernel"] in kernels]
    assert len(found) == 2 * len(rows)


def test_other_versions_of_triton_keep_their_files(file, monkeypatch):
    before = file.read_bytes()
    monkeypatch.setattr(triton, "__version__", "0.1.2")
    refresh(path(file.parent), Compiler(64))
    assert file.read_bytes() == before
    assert {one["registers"] for one in lines(read(file.parent / "0.1.2.json"))} == {64}


def test_what_is_compiled_is_kept_when_the_rest_fails(file, monkeypatch):
    groups = [group for group in expected() if " norm_forward " in group]
    content = {group: of for group, of in read(file).items() if group not in groups}
    write(file, content)

    def failing(tasks):
        yield from list(Compiler()(tasks))[:1]
        raise RuntimeError("no more memory")

    with pytest.raises(RuntimeError, match="no more memory"):
        refresh(file, failing)
    compiler = Compiler()
    refresh(file, compiler)
    assert [f"{target} {kernel}" for target, kernel, _ in compiler.tasks] == [
        group.rpartition(" ")[0] for group in groups[1:]
    ]


def test_rows_that_got_worse_are_named_whatever_sources_they_had(file):
    content = {f"{group.rpartition(' ')[0]} 0123456789ab": of for group, of in read(file).items()}
    group = "sm_90 norm_forward 0123456789ab"
    content[group][ROW[2]][0] = 23
    content[group][ROW[2].replace("plain", "heaviest")][0] = 24  # a unit of registers less
    write(file, content)
    compiled, got_worse = refresh(file, Compiler())
    assert compiled == len(lines(read(file)))
    assert got_worse == [f"{' '.join(ROW)}: registers 23 -> 32"]
    assert compile_report.worse(read(file), read(file)) == []


def test_a_report_with_other_columns_is_refused(file):
    content = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(content | {"columns": ["registers"]}), encoding="utf-8")
    with pytest.raises(ValueError, match="has the columns"):
        read(file)


def test_the_file_has_a_line_for_each_row(file):
    text = file.read_text(encoding="utf-8").splitlines()
    assert f' "{ROW[2]}": [32, 0, 0, 0, 0, 0, 0, 0.5, null],' in text
    assert sum(one.startswith(" ") for one in text) == len(lines(read(file)))


def test_tasks_are_compiled_one_after_the_other():
    assert list(aot.compile_tasks([])) == []
    assert [config for config, _ in aot.examples(*ROW[:2], only=[ROW[2]])] == [ROW[2]]


@pytest.mark.parametrize(("flags", "words"), [([], "FOLDER"), (["reports", "--all"], "--all")])
def test_bad_usage_is_one_line(capsys, flags, words):
    with pytest.raises(SystemExit) as exit:
        compile_report.main(flags)
    assert exit.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


@pytest.mark.slow
def test_an_interpreter_compiles_nothing(tmp_path):
    command = [sys.executable, "-m", "fastgpt_kernels.compile_report", str(tmp_path)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "TRITON_INTERPRET is set" in line
    assert list(tmp_path.iterdir()) == []


def test_the_command_says_what_got_worse_and_how_many_it_compiled(file, monkeypatch, capsys):
    monkeypatch.setattr(compile_report, "INTERPRETED", False)
    monkeypatch.setattr(compile_report, "refresh", lambda file: (980, ["sm_90 scale: registers 23 -> 32"]))
    assert compile_report.main([str(file.parent)]) == 0
    first, last = capsys.readouterr().out.splitlines()
    assert first == "worse: sm_90 scale: registers 23 -> 32"
    assert last.startswith(f"{file}: 980 rows compiled in ")
