"""A resume of a run whose files are damaged, or were left half done: it mends them or refuses by name."""

import dataclasses
import json
import math
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest

from fastgpt import cli, generate, train
from fastgpt.checkpoint import run_folder, store
from fastgpt.checkpoint.progress import Progress
from fastgpt.evaluation import loss as evaluation_loss
from fastgpt.loggers.jsonl import MetricsFile
from tests.helpers import runs
from tests.helpers.covering import some
from tests.helpers.resumes import HARDER, refused, start, state_of
from tests.helpers.runs import FLAGS, contents, forge_manifest, records, resume

pytestmark = pytest.mark.usefixtures("workplace")


@pytest.mark.parametrize("file", ["model.safetensors", "optim.safetensors", "state.json", "manifest.json"])
def test_the_only_checkpoint_is_refused_by_name_where_it_is_damaged(capsys, file: str):
    path = store.find(start("--max_iters 2"), "latest") / file
    path.write_bytes(path.read_bytes()[:-5])
    refused(capsys, "--max_iters 9", str(path))


def swapped(folder: Path) -> None:
    """The weights of another step in the place of this one's."""
    (folder / store.MODEL).write_bytes((folder.with_name("step-000020") / store.MODEL).read_bytes())


DAMAGES = {
    "flipped": lambda folder: flip(folder / store.OPTIMIZER),
    "truncated": lambda folder: os.truncate(folder / store.MODEL, 100),
    "missing": lambda folder: (folder / store.STATE).unlink(),
    "swapped": swapped,
    "gone": shutil.rmtree,
    "manifest": lambda folder: flip(folder / store.MANIFEST),
}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", some(1, [*DAMAGES]))
def test_a_resume_falls_back_to_the_newest_whole_checkpoint_and_says_so(capsys, damage: str):
    whole = start("--max_iters 40", "whole")
    damaged = start("--max_iters 30", "damaged")
    DAMAGES[damage](damaged / "step-000030")
    capsys.readouterr()
    assert resume("--max_iters 40", "damaged") == 0
    told = capsys.readouterr().err
    assert re.search(r"^damaged: damaged/(latest names 'step-000030'|step-000030/\w+\.)", told, re.M)
    assert "going on from damaged/step-000020, the newest checkpoint that is whole" in told
    assert state_of(damaged) == state_of(whole)
    assert [folder.name for folder in store.folders(damaged)] == [folder.name for folder in store.folders(whole)]


def test_a_checkpoint_that_is_named_by_its_path_does_not_fall_back(capsys):
    start("--max_iters 30")
    flip(Path("out/step-000020") / store.MODEL)
    before = contents(Path("out"))
    for flags in ("", "--out_dir out"):
        code = cli.run(train.main, ["--init_from", "out/step-000020", "--max_iters", "40", *flags.split()])
        assert code == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith("error: out/step-000020/model.safetensors is not")
    assert contents(Path("out")) == before


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\x00", None])
@pytest.mark.covering_array(1)
def test_a_damaged_run_file_is_refused_by_name(capsys, file: str, content: bytes | None):
    path = start("--max_iters 2") / file
    path.unlink() if content is None else path.write_bytes(content)
    refused(capsys, "--max_iters 9", str(path))


def test_every_digit_of_the_configuration_counts(capsys):
    path = start("--max_iters 2") / "config.json"
    whole = path.read_text()
    path.write_text(whole.replace('"learning_rate": 0.01', '"learning_rate": 0.03'))
    refused(capsys, "--max_iters 9", str(path), "not what was saved")


@pytest.mark.parametrize(
    "content", some(1, [b"step-000009\n", b"", b"{}", b"\xff\x00", b"plots\n", b"../../etc\n", None])
)
def test_a_damaged_pointer_is_mended(capsys, content: bytes | None):
    whole = start("--max_iters 40", "whole")
    out = start("--max_iters 20")
    (out / "plots").mkdir(exist_ok=True)
    (out / "latest").unlink() if content is None else (out / "latest").write_bytes(content)
    assert resume("--max_iters 40") == 0
    told = capsys.readouterr().err
    assert re.search(r"^damaged: out/latest (names|is missing)", told, re.M)
    assert "going on from out/step-000020" in told
    assert state_of(out) == state_of(whole)


def test_metrics_that_cannot_be_opened_are_one_line(capsys):
    path = start("--max_iters 2") / "metrics.jsonl"
    path.unlink()
    path.mkdir()
    refused(capsys, "--max_iters 9", "--out_dir out cannot be written: Is a directory")


def test_metrics_are_only_ever_taken_back_at_the_end():
    out = start("--max_iters 20")
    path = out / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[2] = b'{"step": damaged\n'
    path.write_bytes(b"".join(lines))
    assert resume("--max_iters 24") == 0
    assert path.read_bytes().startswith(b"".join(lines))


@pytest.mark.parametrize(
    "change",
    [
        {"progress": {"step": 2, "gradient": 1}},
        {"progress": None},
        {"progress": {"step": "two"}},
        {"progress": {"step": True, "tokens": 1.5}},
        {"guard": None},
        {"guard": {"in_row": "many"}},
        {"scaler": {"scale": "large"}},
    ],
    ids=str,
)
def test_a_forged_state_is_refused_by_name(capsys, change: dict):
    folder = store.find(start("--max_iters 2 --dtype float16"), "latest")
    state = json.loads((folder / store.STATE).read_text())
    (folder / store.STATE).write_text(json.dumps(state | change))
    forge_manifest(folder)
    refused(capsys, "--max_iters 9", str(folder / store.STATE))


def test_the_crash_that_parts_best_from_latest_is_mended(monkeypatch):
    """The process dies after `best` names the new checkpoint, and before `latest` does."""
    point, out = store.point, Path("out")

    def dying(out_dir: Path, name: str, folder: Path) -> None:
        if (name, folder.name) == ("latest", "step-000008"):
            raise KeyboardInterrupt
        point(out_dir, name, folder)

    with monkeypatch.context() as patch:
        patch.setattr(store, "point", dying)
        flags = shlex.split(f"{HARDER} --max_iters 30 --eval_interval 4")
        assert cli.run(train.main, [*FLAGS, *flags]) == 130
    assert (out / "latest").read_text() == "step-000004\n"
    assert (out / "best").read_text() == "step-000008\n"
    assert resume("--max_iters 5 --learning_rate 9 --schedule constant --grad_clip 0") == 0  # which is worse
    assert [path.name for path in store.folders(out)] == [f"step-{step:06d}" for step in (4, 5)]
    assert (out / "best").read_text() == "step-000004\n"


@pytest.mark.parametrize("init_from", ["resume", "out/step-000002"])
def test_a_checkpoint_that_was_put_aside_is_put_back_first(capsys, init_from: str):
    """The process died between the two renames that put a checkpoint in the place of another of the same step."""
    whole = start("--max_iters 4", "whole")
    out = start("--max_iters 2 --lr_decay_iters 40")
    (out / "step-000002").rename(out / ".fastgpt-tmp-aside-step-000002-1")
    capsys.readouterr()
    assert cli.run(generate.main, ["--max_new_tokens", "3"]) == 2
    told = capsys.readouterr().err
    assert "--init_from resume" in told
    assert "--overwrite" not in told
    assert cli.run(train.main, ["--init_from", init_from, "--max_iters", "4"]) == 0
    assert state_of(out)[1] == state_of(whole)[1]


def test_a_checkpoint_that_was_put_aside_is_put_back_for_the_api_too():
    out = start("--max_iters 2 --lr_decay_iters 40")
    config, _ = run_folder.load(out)
    (out / "step-000002").rename(out / ".fastgpt-tmp-aside-step-000002-1")
    summary = runs.train(dataclasses.replace(config, init_from="out/step-000002", max_iters=4))
    assert (summary.steps, summary.finished) == (4, True)


def test_a_kill_while_going_back_loses_no_record(monkeypatch):
    """`latest` is moved before the records of later steps are cut off."""
    start("--max_iters 20 --eval_interval 5")

    def dying(self: MetricsFile, progress: Progress) -> None:
        raise SystemExit(9)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsFile, "start", dying)
        with pytest.raises(SystemExit):
            cli.run(train.main, ["--init_from", "out/step-000010", "--max_iters", "20"])
    assert store.find(Path("out"), "latest").name == "step-000010"
    assert resume("--max_iters 20") == 0
    assert list(records(Path("out"), "val_loss")) == [5, 10, 15, 20]


def test_a_best_checkpoint_that_is_gone_is_none_to_compare_with(monkeypatch, capsys):
    """After a resume from an earlier step, the folder of its best step may have been pruned."""
    losses = iter([2.0, 3.0, 3.0, 1.0, 2.9, 2.5, 2.6])
    monkeypatch.setattr(evaluation_loss, "mean_loss", lambda *rest, **named: next(losses))
    out = start("--max_iters 8 --eval_interval 2")
    assert (out / "best").read_text() == "step-000008\n"
    assert not (out / "step-000002").exists()
    assert cli.run(train.main, ["--init_from", "out/step-000006", "--max_iters", "12"]) == 0
    assert (out / "best").read_text() == "step-000010\n"
    assert "best val loss  2.5000 at step 10" in capsys.readouterr().out


def test_a_step_of_a_time_before_any_evaluation_leaves_no_best(monkeypatch):
    losses = iter([None, 2.0])  # the first is cut short
    monkeypatch.setattr(evaluation_loss, "mean_loss", lambda *rest, **named: next(losses))
    out = start("--max_iters 4 --eval_interval 2")
    assert (out / "best").read_text() == "step-000004\n"
    monkeypatch.setattr(evaluation_loss, "mean_loss", lambda *rest, **named: math.nan)
    assert cli.run(train.main, ["--init_from", "out/step-000002", "--max_iters", "3", "--eval_interval", "9"]) == 0
    assert not (out / "best").exists()
    assert [folder.name for folder in store.folders(out)] == ["step-000002", "step-000003"]


def forbid_deleting(monkeypatch, name: str) -> None:
    """Let a file of this name be one that this process may not delete, which root may always."""
    unlink = Path.unlink

    def unable(path: Path, missing_ok: bool = False) -> None:
        if path.name == name:
            raise PermissionError(13, "Permission denied")
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", unable)


def test_what_cannot_be_deleted_stops_no_start(monkeypatch):
    out = start("--max_iters 2")
    elsewhere = Path("elsewhere")
    elsewhere.mkdir()
    (elsewhere / "file").touch()
    (out / ".fastgpt-tmp-doomed-step-000001-1").symlink_to(elsewhere.resolve())
    (out / ".fastgpt-tmp-latest-1").touch()
    forbid_deleting(monkeypatch, ".fastgpt-tmp-latest-1")
    assert resume("--max_iters 4") == 0
    assert [path.name for path in out.glob(".fastgpt-tmp-*")] == [".fastgpt-tmp-latest-1"]
    assert (elsewhere / "file").exists()


def test_a_step_that_lies_elsewhere_goes_with_its_link():
    out = start("--max_iters 2")
    (out / "step-000002").rename("elsewhere")
    (out / "step-000002").symlink_to(Path("elsewhere").resolve())
    assert resume("--max_iters 4 --eval_interval 1 --keep_last 1") == 0
    assert not (out / "step-000002").exists()
    store.verify(Path("elsewhere"))


@pytest.mark.picture
def test_an_overwrite_that_is_not_allowed_loses_nothing(monkeypatch, capsys):
    """The picture lies in a folder of its own, which may be one that cannot be written."""
    out = start("--max_iters 2")
    assert (out / "plots" / "loss.png").exists()
    before = contents(out)
    forbid_deleting(monkeypatch, "loss.png")
    assert cli.run(train.main, [*FLAGS, "--overwrite"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: --out_dir out cannot be written: Permission denied; name another"
    )
    assert contents(out) == before
