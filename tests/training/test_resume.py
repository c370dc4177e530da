"""A run that stops and goes on is bit for bit the run that never stopped, wherever its folder lies."""

import dataclasses
import json
import math
import os
import pickle
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest

from fastgpt import cli, generate, train
from fastgpt.checkpoint import run_folder, store
from fastgpt.checkpoint.progress import Progress
from fastgpt.evaluation import loss as evaluation_loss
from fastgpt.loggers.jsonl import MetricsFile
from tests.helpers import runs
from tests.helpers.covering import some
from tests.helpers.runs import FLAGS, TEXT, contents, forge_manifest, records, resume, run

pytestmark = pytest.mark.usefixtures("workplace", "no_picture")
HARDER = (
    "--dropout 0.2 --batch_size 2 --gradient_accumulation_steps 3 --warmup_iters 5 --lr_decay_iters 40 "
    "--eval_interval 10 --log_interval 4"
)


def start(flags: str, out_dir: str = "out") -> Path:
    return run(f"{HARDER} {flags}", out_dir)


def state_of(out_dir: Path) -> tuple:
    """Everything a run is, to the bit: weights, moments, state, and the losses of metrics.jsonl."""
    folder = store.find(out_dir, "latest")
    files = [(folder / name).read_bytes() for name in (store.MODEL, store.OPTIMIZER, store.STATE)]
    lines = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    values = [
        (r["step"], key, r[key].hex()) for r in lines for key in ("loss", "grad_norm", "lr", "val_loss") if key in r
    ]
    return folder.name, files, values


@pytest.mark.parametrize(
    "setting",
    some(
        1,
        [
            "--n_layer 2",
            "--dtype bfloat16",
            "--kernels reference",
            "--position rotary --no-bias",
            "--dtype float16",
        ],
    ),
)
def test_twenty_steps_and_twenty_more_are_forty(setting: str):
    whole = start(f"--max_iters 40 {setting}", "whole")
    parted = start(f"--max_iters 20 {setting}", "parted")
    assert resume("--max_iters 40", "parted") == 0
    assert store.find(whole, "latest").name == "step-000040"
    assert state_of(parted) == state_of(whole)


@pytest.mark.slow
def test_a_compiled_run_goes_on_to_the_bit():
    whole = start("--compile --max_iters 12", "whole")
    parted = start("--compile --max_iters 6 --lr_decay_iters 40", "parted")
    assert resume("--max_iters 12", "parted") == 0
    parts, at_end = state_of(parted), state_of(whole)
    assert parts[1] == at_end[1]
    own = [value for value in at_end[2] if value[0] not in (6,)]  # where the parted run was evaluated as well
    assert [value for value in parts[2] if value[0] not in (6,)] == own


@pytest.mark.slow
def test_a_run_cut_into_many_parts_is_the_same_run():
    whole = start("--max_iters 24 --log_interval 1 --eval_interval 1", "whole")
    parted = start("--max_iters 1 --log_interval 1 --eval_interval 1", "parted")
    for end in (2, 7, 8, 24):
        assert resume(f"--max_iters {end}", "parted") == 0
    assert state_of(parted) == state_of(whole)


def test_what_a_crash_left_behind_is_done_again_and_not_twice():
    whole = start("--max_iters 40", "whole")
    # As if the power failed in step 33: the checkpoint is of step 30, the metrics are beyond it, a save is half done.
    crashed = start("--max_iters 30", "crashed")
    with (crashed / "metrics.jsonl").open("a") as file:
        file.write('{"step": 32, "tokens": 1536, "loss": 99.0}\n{"step": 36, "tok')
    (crashed / ".fastgpt-tmp-step-000040-1").mkdir()
    (crashed / ".fastgpt-tmp-step-000040-1" / "model.safetensors").write_bytes(b"half")
    assert resume("--max_iters 40", "crashed") == 0
    assert state_of(crashed) == state_of(whole)
    assert not list(crashed.glob(".fastgpt-tmp-*"))


def test_a_moved_and_renamed_run_resumes_and_generates(capsys):
    whole, parted = start("--max_iters 40", "whole"), start("--max_iters 20", "parted")
    moved = Path("elsewhere") / "my run"
    moved.parent.mkdir()
    parted.rename(moved)
    assert resume("--max_iters 40", str(moved)) == 0
    assert state_of(moved) == state_of(whole)
    assert not parted.exists()
    capsys.readouterr()
    assert cli.run(generate.main, ["--out_dir", str(moved), "--prompt", "The ", "--max_new_tokens", "5"]) == 0
    assert capsys.readouterr().out.startswith("The ")


def test_a_resume_keeps_the_runs_backends_unless_others_are_asked_for(capsys):
    out = start("--max_iters 2 --kernels reference")
    for flags, column in [("--kernels auto --max_iters 4", "reference"), ("--kernels torch --max_iters 6", "torch")]:
        assert resume(flags) == 0
        assert set(json.loads((out / "config.json").read_text())["columns"].values()) == {column}
    assert re.search(r"^kernels +reference \(as this run began\)", capsys.readouterr().err, re.M)


def test_a_resume_may_change_what_is_not_the_models_shape():
    start("--max_iters 4")
    assert resume("--max_iters 6 --learning_rate 5e-3 --batch_size 3 --dropout 0.1 --grad_clip 0.5") == 0
    config, _ = run_folder.load(Path("out"))
    assert (config.learning_rate, config.batch_size, config.dropout, config.n_embd) == (5e-3, 3, 0.1, 16)


def refused(capsys, flags: str = "--max_iters 9", *words: str) -> None:
    """A resume exits 2 with one line that has the words, and leaves the folder as it was."""
    before = contents(Path("out"))
    capsys.readouterr()
    assert resume(flags) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("error: ") == 1
    last = captured.err.splitlines()[-1]
    assert last.startswith("error: ")
    assert "Traceback" not in captured.err
    assert [word for word in words if word not in last] == [], last
    assert contents(Path("out")) == before


@pytest.mark.parametrize(
    ("flag", "value"),
    some(
        4,
        [
            ("n_layer", "2"),
            ("n_head", "4"),
            ("n_kv_head", "1"),
            ("n_embd", "32"),
            ("block_size", "4"),
            ("bias", "false"),
            ("position", "rotary"),
            ("tokenizer", "byte"),
        ],
    ),
)
def test_another_shape_is_refused_by_name(capsys, flag: str, value: str):
    start("--max_iters 2")
    refused(
        capsys, f"--max_iters 9 --{flag}={value}", f"--{flag} {value.title() if flag == 'bias' else value}", "out has"
    )


def test_the_runs_own_shape_may_be_given_again():
    start("--max_iters 2")
    assert resume("--max_iters 3 --n_layer 1 --n_head 2 --n_embd 16 --block_size 8 --bias --tokenizer char") == 0


def test_a_run_that_is_done_names_a_larger_max_iters(capsys):
    start("--max_iters 2")
    refused(capsys, "", "--max_iters 2", "already at step 2", "--max_iters 4")


def test_a_run_beyond_max_iters_is_refused_though_its_evaluation_is_owed(capsys):
    folder = store.find(start("--max_iters 4 --eval_interval 2"), "latest")
    state = json.loads((folder / store.STATE).read_text())
    state["progress"]["evaluated_step"] = 2  # as a signal leaves it
    (folder / store.STATE).write_text(json.dumps(state))
    forge_manifest(folder)
    refused(capsys, "--max_iters 3", "--max_iters 3", "already at step 4")


def test_a_changed_text_is_refused(capsys):
    start("--max_iters 2")
    Path("text.txt").write_text(TEXT + " fox", encoding="utf-8")
    refused(capsys, "--max_iters 9", f"--dataset {Path('text.txt').absolute()}", "text changed", "sha256")


def test_another_vocabulary_is_refused(capsys):
    start("--max_iters 2")
    Path("text.txt").write_text(TEXT + "?", encoding="utf-8")
    refused(capsys, "--max_iters 9", f"--dataset {Path('text.txt').absolute()}", "vocabulary")


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


def test_a_run_goes_on_from_the_step_that_is_named(capsys):
    whole, undone = start("--max_iters 40", "whole"), start("--max_iters 30", "undone")
    assert cli.run(train.main, ["--init_from", "undone/step-000010", "--max_iters", "40"]) == 0
    assert state_of(undone) == state_of(whole)


@pytest.mark.parametrize(
    ("init_from", "flags", "words"),
    [
        ("out/step-000099", "", ["--init_from 'out/step-000099'", "is not one of scratch, resume", "path of a step"]),
        ("out", "", ["--init_from out is not the folder of a step in ., such as out/step-000500"]),
        ("out", "--out_dir out", ["--init_from out is not the folder of a step in out"]),
        ("other/step-000002", "--out_dir out", ["--init_from other/step-000002 is not the folder of a step in out"]),
        ("out/plots", "", ["--init_from out/plots is not the folder of a step in out"]),
        ("resum", "", ["--init_from 'resum'", "did you mean resume?"]),
        ("out/step-000002", "--preset mini", ["--preset mini", "keeps the run's own settings"]),
        ("out/step-000002", "--overwrite", ["--overwrite deletes the run that --init_from out/step-000002"]),
    ],
)
def test_a_start_from_what_is_no_step_of_the_run_is_refused(capsys, init_from: str, flags: str, words: list[str]):
    start("--max_iters 2")
    start("--max_iters 2", "other")
    (Path("out") / "plots").mkdir(exist_ok=True)
    capsys.readouterr()
    assert cli.run(train.main, ["--init_from", init_from, "--max_iters", "9", *flags.split()]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert [word for word in words if word not in line] == [], line


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


def test_no_run_there_is_refused_with_the_command_that_makes_one(capsys):
    refused(capsys, "", "--out_dir out", "no run", "python -m fastgpt.train --out_dir out")
    Path("out").mkdir()
    refused(capsys, "", "--out_dir out", "no run")


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


def test_a_resume_deletes_nothing_where_no_run_is(capsys):
    """A misspelled --init_from has the working folder for its run's."""
    Path(".fastgpt-tmp-precious").touch()
    for flags in ("--init_from resum", "--init_from ./model.ptx", "--init_from resume --out_dir ."):
        assert cli.run(train.main, flags.split()) == 2
    assert sorted(path.name for path in Path().iterdir()) == [".fastgpt-tmp-precious", "text.txt"]


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


def test_an_overwrite_that_is_not_allowed_loses_nothing(monkeypatch, capsys):
    """The picture lies in a folder of its own, which may be one that cannot be written."""
    out = start("--max_iters 2")
    before = contents(out)
    forbid_deleting(monkeypatch, "loss.png")
    assert cli.run(train.main, [*FLAGS, "--overwrite"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: --out_dir out cannot be written: Permission denied; name another"
    )
    assert contents(out) == before


def test_a_run_begun_with_overwrite_is_resumed_and_not_overwritten():
    start("--max_iters 4")
    out = start("--max_iters 2 --overwrite")
    content = json.loads((out / "config.json").read_text())["config"]
    assert not {"overwrite", "init_from"} & content.keys()
    assert resume("--max_iters 4") == 0
    assert resume("--max_iters 6") == 0  # after a resume as well
    assert store.find(out, "latest").name == "step-000006"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_float32_run_goes_on_in_another_arithmetic(dtype: str):
    out = start("--max_iters 4")
    assert resume(f"--max_iters 8 --dtype {dtype}") == 0
    assert json.loads((out / "config.json").read_text())["dtype"] == dtype
    assert bool(store.load_state(store.find(out, "latest"))["scaler"]) == (dtype == "float16")
    assert resume("--max_iters 12 --dtype float32") == 0


def test_a_resume_under_auto_keeps_the_runs_arithmetic(capsys):
    out = start("--max_iters 2 --dtype float16")
    assert resume("--max_iters 4 --dtype auto") == 0
    about = json.loads((out / "config.json").read_text())
    assert (about["dtype"], about["config"]["dtype"]) == ("float16", "auto")
    assert re.search(r"^machine .*float16$", capsys.readouterr().err.split("resume:")[1], re.M)


def test_a_vocabulary_that_was_swapped_is_refused(capsys):
    out = start("--max_iters 2")
    path = out / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    swapped = content | {"chars": content["chars"][::-1]}  # of the same size
    path.write_text(json.dumps(swapped), encoding="utf-8")
    refused(capsys, "--max_iters 9", "vocabulary")


def test_a_checkpoint_of_another_vocabulary_is_refused_though_the_run_folder_agrees(capsys):
    start("--max_iters 2")
    folder = store.find(Path("out"), "latest")
    state = json.loads((folder / store.STATE).read_text())
    (folder / store.STATE).write_text(json.dumps(state | {"vocabulary": "0" * 64}))
    forge_manifest(folder)
    refused(capsys, "--max_iters 9", "trained with another vocabulary")


@pytest.mark.parametrize("file", ["train.bin", "val.bin"])
def test_changed_tokens_of_a_nanogpt_folder_are_refused(capsys, file: str):
    folder = Path("data") / "foreign"
    folder.mkdir(parents=True)
    chars = sorted(set(TEXT))
    tokens = np.array([chars.index(char) for char in TEXT], dtype=np.uint16)
    tokens[:-200].tofile(folder / "train.bin")
    tokens[-200:].tofile(folder / "val.bin")
    (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": len(chars), "itos": dict(enumerate(chars))}))
    start("--max_iters 2 --dataset foreign")
    assert resume("--max_iters 4") == 0
    content = bytearray((folder / file).read_bytes())
    content[6] ^= 1
    (folder / file).write_bytes(content)
    refused(capsys, "--max_iters 9", f"--dataset {folder.absolute()}", "text changed", "sha256")
