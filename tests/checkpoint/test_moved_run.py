"""A run that is moved, or whose data is, goes on; one of another version, or in use, is refused with the reason."""

import json
import os
import shutil
from pathlib import Path

import pytest

from fastgpt import __version__, cli, train
from fastgpt.checkpoint import run_folder
from fastgpt.data import corpus
from fastgpt.system import lock
from tests.helpers.runs import FLAGS, resume, run

pytestmark = pytest.mark.usefixtures("workplace")


def refusal(capsys: pytest.CaptureFixture[str], flags: str = "", out_dir: str = "out") -> str:
    capsys.readouterr()
    assert resume(flags, out_dir) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def saved(out_dir: str = "out") -> dict:
    return json.loads((Path(out_dir) / "config.json").read_text())


def test_a_run_goes_on_from_another_working_folder_on_the_data_that_is_there(tmp_path: Path, monkeypatch, capsys):
    run("--max_iters 3")
    assert saved()["config"]["dataset"] == str(tmp_path / "text.txt")
    assert saved()["config"]["data_dir"] == str(tmp_path / "data")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    shutil.move(tmp_path / "out", "moved")
    assert resume("--max_iters 4", "moved") == 0
    assert "reused text" in capsys.readouterr().err
    assert [path.name for path in Path.cwd().iterdir()] == ["moved"]


def test_names_are_no_paths_and_a_prepared_folder_by_its_name_is_one(tmp_path: Path):
    assert corpus.located("pydocs", "data") == "pydocs"
    run("--max_iters 3")
    (prepared,) = Path("data").iterdir()
    assert corpus.located(prepared.name, "data") == str(tmp_path / "data" / prepared.name)


def test_a_text_that_was_moved_is_asked_for_and_known_by_its_hash(tmp_path: Path, capsys):
    run("--max_iters 3")
    Path("texts").mkdir()
    Path("text.txt").rename("texts/renamed.txt")
    line = refusal(capsys, "--max_iters 4")
    assert line.startswith(f"error: --dataset {tmp_path / 'text.txt'}: the run in out recorded this path, and nothing")
    assert "pass --dataset with the path where it is now" in line
    Path("other.txt").write_text("another text with other words " * 200)
    assert "its vocabulary is not that of the run" in refusal(capsys, "--max_iters 4 --dataset other.txt")
    assert "'nowhere.txt' is no file or folder" in refusal(capsys, "--max_iters 4 --dataset nowhere.txt")
    assert resume("--max_iters 4 --dataset texts/renamed.txt") == 0
    assert resume("--max_iters 5") == 0  # which is recorded


def test_prepared_data_that_is_gone_is_made_again(tmp_path: Path, monkeypatch, capsys):
    (tmp_path / "before").mkdir()
    monkeypatch.chdir(tmp_path / "before")
    run("--max_iters 3 --dataset ../text.txt", "../out")
    monkeypatch.chdir(tmp_path)
    shutil.rmtree("before")
    assert resume("--max_iters 4") == 0
    assert f"--data_dir {tmp_path / 'before' / 'data'}, which the run recorded, is gone: using data" in (
        capsys.readouterr().err
    )
    assert saved()["config"]["data_dir"] == str(tmp_path / "data")


@pytest.mark.parametrize("name", ["resume", "out/step-000003"])
def test_a_run_that_another_process_trains_is_in_use_whatever_it_has_saved(name: str, capsys):
    Path("out").mkdir()
    if name != "resume":
        Path(name).mkdir()
    with lock.held(Path("out/.lock")):
        assert cli.run(train.main, ["--init_from", name, "--out_dir", "out"]) == 2
        assert f"error: --out_dir out is in use by process {os.getpid()};" in capsys.readouterr().err
        assert cli.run(train.main, [*FLAGS, "--out_dir", "out"]) == 2
        assert f"error: --out_dir out is in use by process {os.getpid()};" in capsys.readouterr().err


class TestVersions:
    @pytest.fixture
    def content(self) -> dict:
        run("--max_iters 3")
        return saved()

    def written(self, content: dict, capsys) -> str:
        content["sha256"] = run_folder.content_hash(content)
        Path("out/config.json").write_text(json.dumps(content))
        return refusal(capsys)

    def test_a_setting_of_another_version_is_named_with_it(self, content: dict, capsys):
        assert content["fastgpt"] == __version__
        content["config"]["n_expert"] = 4
        ours = f"and this is fastgpt {__version__}; use the version that wrote it"
        line = self.written(content | {"fastgpt": "7.1"}, capsys)
        assert line == f"error: out/config.json has the setting 'n_expert', from fastgpt 7.1, {ours}"
        del content["fastgpt"]
        assert "from fastgpt 0.1.0 or one before it, and this" in self.written(content, capsys)
        del content["config"]["n_expert"]
        assert f"has format 2, from fastgpt 8, {ours}" in self.written(content | {"format": 2, "fastgpt": 8}, capsys)
        reading = {"corpus": content["corpus"] | {"reading": 9}, "fastgpt": "8.2"}
        assert "by rules 9, which fastgpt 8.2 wrote" in self.written(content | reading, capsys)

    def test_a_run_that_names_no_version_goes_on(self, content: dict, capsys):
        del content["fastgpt"]
        assert "--max_iters" in self.written(content, capsys)  # it has no other fault than to be finished
        assert resume("--max_iters 4") == 0
        assert saved()["fastgpt"] == __version__
