"""The folder of a run: one process owns it, and nothing of anybody else's is replaced or deleted."""

import dataclasses
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fastgpt import cli, train
from fastgpt.checkpoint import run_folder, store
from fastgpt.config.model import ModelConfig
from fastgpt.config.training import TrainConfig
from fastgpt.errors import CorruptCheckpoint, UsageError
from fastgpt.tokenizer.char import CharTokenizer
from fastgpt.training import run as run_module
from fastgpt.training.checkpoints import Checkpoints
from fastgpt.training.run import Run
from tests.helpers.runs import ENDLESS, FLAGS, contents, records, resume, run, signal_at_step, spawn

pytestmark = pytest.mark.usefixtures("workplace")


def refused(flags: str = "") -> str:
    """The reason why a start with these flags is refused; a run that is there stays as it was."""
    before = contents(Path("out"))
    with pytest.raises(UsageError) as error:
        train.main([*FLAGS, *shlex.split(flags)])
    assert contents(Path("out")) == before
    return str(error.value)


class TestOwnership:
    def test_the_second_process_is_refused_and_a_dead_owner_frees_the_folder(self, capsys):
        first = spawn(f"{ENDLESS} --eval_interval 4")
        signal_at_step(first, 9, 0)  # it runs, and has saved
        for flags in ("--overwrite", "--init_from resume --max_iters 2000000"):
            assert cli.run(train.main, [*FLAGS, *shlex.split(flags)]) == 2
            out, err = capsys.readouterr()
            assert out == ""
            assert err.splitlines()[-1].startswith(f"error: --out_dir out is in use by process {first.pid}; ")
        assert first.poll() is None
        first.kill()
        first.communicate(timeout=60)
        assert first.returncode == -signal.SIGKILL
        step = int(store.find(Path("out"), "latest").name[5:])
        assert resume(f"--max_iters {step + 2}") == 0
        run("--overwrite")

    @pytest.mark.parametrize("error", [UsageError, KeyboardInterrupt, None])
    def test_the_folder_is_held_by_its_owner_and_free_after_the_block(self, tmp_path: Path, error: type | None):
        folder = tmp_path / "out"
        with pytest.raises(error) if error else nullcontext(), run_folder.locked(folder):
            assert (folder / ".lock").read_text() == f"{os.getpid()}\n"
            said = f"`out_dir` .*out is in use by process {os.getpid()}; "
            with pytest.raises(UsageError, match=said), run_folder.locked(folder):
                pass
            if error:
                raise error
        with run_folder.locked(folder):
            pass

    def test_a_longer_number_of_the_last_owner_does_not_stay(self, tmp_path: Path):
        (tmp_path / ".lock").write_text("1234567890123\n")
        with run_folder.locked(tmp_path):
            assert (tmp_path / ".lock").read_text() == f"{os.getpid()}\n"

    @pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="needs a folder that may not be written")
    def test_a_folder_that_cannot_be_written_is_refused(self, tmp_path: Path):
        (tmp_path / "out").mkdir(mode=0o500)
        said = r"`out_dir` .*out cannot be written: .*; name another"
        with pytest.raises(UsageError, match=said), run_folder.locked(tmp_path / "out"):
            pass


class TestClaim:
    @pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
    @pytest.mark.parametrize("content", ["{}", "", "[1]", '{"format": 1, "config": {"theirs": 1}}'])
    @pytest.mark.parametrize("flags", ["", "--overwrite"])
    def test_foreign_files_are_refused_and_stay(self, name: str, content: str, flags: str):
        Path("out").mkdir()
        (Path("out") / name).write_text(content)
        assert refused(flags) == f"`out_dir` out has a {name} that is not a run's; name another `out_dir`"
        assert [path.name for path in Path("out").iterdir()] == [name]

    def test_foreign_files_of_other_names_are_no_obstacle_and_stay(self):
        names = ("notes.txt", "step-by-step.md", "plots/mine.png", "sub/config.json", "step-000002-copy/a", "step-2/a")
        for name in names:
            (Path("out") / name).parent.mkdir(parents=True, exist_ok=True)
            (Path("out") / name).write_text("mine")
        out = run()
        run("--overwrite --max_iters 2 --n_layer 1")
        assert [path.name for path in store.folders(out)] == ["step-000002"]
        assert list(records(out)) == [1, 2]
        assert all((out / name).read_text() == "mine" for name in names)
        (out / ".fastgpt-tmp-step-000003-7").mkdir()
        (out / ".fastgpt-tmp-config.json-7").touch()
        run_folder.delete(out)
        assert not list(out.glob(".fastgpt-tmp-*"))
        assert sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()) == sorted([*names, ".lock"])

    def test_a_deletion_that_dies_anywhere_is_no_obstacle(self, monkeypatch):
        out, unlink = run("--max_iters 1"), Path.unlink
        kept = shutil.copytree(out, "kept")
        for survived in range(9):
            shutil.rmtree(out)
            shutil.copytree(kept, out)
            allowed = iter(range(survived))

            def deadly(self: Path, missing_ok: bool = False, allowed=allowed) -> None:
                if next(allowed, None) is None:
                    raise KeyboardInterrupt
                unlink(self, missing_ok)

            with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
                patch.setattr(Path, "unlink", deadly)
                run_folder.delete(out)
            run_folder.claim(out, overwrite=True)
        assert not store.holds_run(out)

    def test_a_configuration_that_is_out_of_its_limits_is_not_ours(self, tmp_path: Path):
        (tmp_path / "config.json").write_text('{"format": 1, "config": {"n_layer": 0}}')
        with pytest.raises(UsageError, match=r"has a config\.json that is not a run's"):
            run_folder.claim(tmp_path, overwrite=True)

    def test_a_file_is_no_folder(self):
        Path("out").write_text("mine")
        with pytest.raises(UsageError, match="`out_dir` out is a file; name a folder"):
            run_folder.claim(Path("out"), overwrite=True)

    def test_a_folder_that_holds_a_run_is_refused_and_stays_as_it_was(self):
        run()
        error = refused("--max_iters 9")
        assert error.startswith("`out_dir` out already holds a run")
        assert all(way in error for way in ("`init_from` resume", "another `out_dir`", "`overwrite=True`"))

    @pytest.mark.parametrize(
        "mistake", ["--dataset nowhere.txt", "--block_size 100000", "--tokenizer bpe --vocab_size 3"]
    )
    def test_overwrite_deletes_nothing_when_the_new_run_cannot_start(self, mistake: str):
        run()
        refused(f"--overwrite {mistake}")

    @pytest.mark.parametrize("mistake", ["--dataset nowhere.txt", "--block_size 100000", "--kernels cuda"])
    def test_a_failed_start_leaves_no_folder(self, mistake: str):
        assert cli.run(train.main, [*FLAGS, *shlex.split(mistake)]) == 2
        assert not Path("out").exists()
        run()

    @pytest.mark.parametrize(
        ("owner", "moment"), [(run_module, "open_folder"), (Run, "take_step"), (Checkpoints, "save")]
    )
    def test_a_start_that_dies_before_its_first_checkpoint_is_started_again(self, monkeypatch, owner, moment: str):
        def dying(*rest):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(owner, moment, dying)
            assert cli.run(train.main, FLAGS) == 130
        if moment == "save":  # steps were taken, which only --overwrite may forget
            assert "`overwrite=True`" in refused()
            with pytest.raises(
                UsageError, match="holds a run without a checkpoint yet; start it with `overwrite=True`"
            ):
                train.main(["--init_from", "resume"])
            run("--overwrite")
        else:
            run()


class TestConfiguration:
    @pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
    @pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
    @pytest.mark.picture
    def test_whom_the_umask_lets_read_can_read_every_file(self, umask: int):
        before = os.umask(umask)
        try:
            out = run("--max_iters 1")
        finally:
            os.umask(before)
        modes = {str(path): path.stat().st_mode & 0o777 for path in out.rglob("*")}
        assert len(modes) == 13
        assert modes == {name: (0o777 if Path(name).is_dir() else 0o666) & ~umask for name in modes}

    def test_what_was_asked_for_and_what_came_of_it_are_saved(self, tmp_path: Path):
        config, about = TrainConfig(out_dir="x", n_layer=3, overwrite=True), {"dtype": "float32", "device": "cpu"}
        run_folder.save(tmp_path, config, CharTokenizer("añ"), about)
        content = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
        assert content.items() >= {"format": 1, **about}.items()
        assert content["config"].keys() == vars(config).keys() - set(run_folder.COMMANDS)
        loaded, again = run_folder.load(tmp_path)
        assert vars(loaded) == vars(config) | {"overwrite": False}
        assert again == content

    def test_a_run_records_its_machine_and_its_text(self):
        about = run_folder.load(run("--dtype auto"))[1]
        assert about["device"] == "cpu"
        assert about["dtype"] in ("float32", "bfloat16")
        assert about["config"]["dtype"] == "auto"
        assert set(about["columns"].values()) == {"torch"}
        assert about["corpus"]["name"] == "text"
        assert len(about["corpus"]["source_sha256"]) == 64

    def test_the_configuration_is_written_just_before_the_first_checkpoint(self, monkeypatch):
        seen = []

        def watched(out_dir: Path, *rest):
            seen.append(sorted(path.name for path in out_dir.iterdir()))
            return save(out_dir, *rest)

        save = store.save
        monkeypatch.setattr(store, "save", watched)
        monkeypatch.setattr(
            run_folder, "save", lambda *rest, write=run_folder.save: seen.append("save") or write(*rest)
        )
        run()
        assert seen[:2] == ["save", [".lock", "config.json", "metrics.jsonl", "tokenizer.json"]]

    @pytest.mark.parametrize(
        "content", ["", "[]", "{}", '{"format": 2, "config": {}}', '{"format": 1, "config": {"n_embed": 3}}']
    )
    def test_what_is_not_a_runs_configuration_is_corrupt(self, tmp_path: Path, content: str):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(CorruptCheckpoint, match=r"config\.json"):
            run_folder.load(tmp_path)


def other_value(field: dataclasses.Field) -> Any:
    """A value of the field that is not its default."""
    if field.type == "bool | None" or field.type == bool | None:
        return False  # it follows `bias`, which is on
    if isinstance(field.default, bool):
        return not field.default
    if isinstance(field.default, str):
        return next(choice for choice in field.metadata["choices"] if choice != field.default)
    return (field.default or 0) + (0.5 if isinstance(field.default, float) else 1)


class TestResume:
    @pytest.mark.parametrize("field", dataclasses.fields(ModelConfig), ids=lambda field: field.name)
    def test_every_setting_of_the_model_but_dropout_is_kept(self, tmp_path: Path, field: dataclasses.Field):
        data: Any = SimpleNamespace(tokenizer=CharTokenizer("an"), source_sha256="0")
        config = TrainConfig()
        run_folder.save(tmp_path, config, data.tokenizer, {"corpus": {"source_sha256": "0"}})
        run_folder.check_resume(tmp_path, config, data)
        changed = dataclasses.replace(config, **{field.name: other_value(field)})
        if field.name in ("dropout", "attention_dropout", "vocab_size"):  # the vocabulary is compared itself
            run_folder.check_resume(tmp_path, changed, data)
        else:
            with pytest.raises(UsageError, match=f"`{field.name}` .* has .*, and a resume keeps it; leave it out"):
                run_folder.check_resume(tmp_path, changed, data)

    def test_a_default_may_be_written_out(self, tmp_path: Path):
        data: Any = SimpleNamespace(tokenizer=CharTokenizer("an"), source_sha256="0")
        run_folder.save(tmp_path, TrainConfig(), data.tokenizer, {"corpus": {"source_sha256": "0"}})
        run_folder.check_resume(tmp_path, TrainConfig(n_kv_head=TrainConfig.n_head), data)


class TestWatchers:
    """A run outlives whoever watches it."""

    @pytest.mark.parametrize("streams", ["stdout", "both"])
    @pytest.mark.slow
    def test_a_reader_that_leaves_does_not_stop_the_run(self, streams: str):
        both = {"stderr": subprocess.STDOUT} if streams == "both" else {}
        with spawn("--max_iters 9 --sample_interval 1", **both) as process:
            for line in process.stdout:
                if line.startswith(("step 3/", "--- sample at step 3")):
                    break
            process.stdout.close()
            err = "" if both else process.stderr.read()
            assert process.wait(60) == 0
        assert "Traceback" not in err
        assert store.find(Path("out"), "latest").name == "step-000009"
        assert len(records(Path("out"))) == 9

    @pytest.mark.skipif(os.name == "nt", reason="Windows has no such terminals")
    @pytest.mark.slow
    def test_a_terminal_that_is_closed_loses_nothing(self):
        import pty

        parent, child = pty.openpty()
        terminal = dict.fromkeys(("stdin", "stdout", "stderr"), child)
        code = (
            "import fcntl, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
            "from fastgpt import cli, train; sys.exit(cli.run(train.main))"
        )
        command = [sys.executable, "-c", code, *FLAGS, *shlex.split(ENDLESS)]
        wide = os.environ | {"TERM": "xterm", "COLUMNS": "200"}
        process = subprocess.Popen(command, **terminal, env=wide, start_new_session=True)
        try:
            os.close(child)
            shown = b""
            while b"/1000000" not in shown:
                shown += os.read(parent, 4096)
            os.close(parent)  # the window is closed: SIGHUP, and nothing can be written any more
            assert process.wait(60) == 129
        finally:
            process.kill()
        folder = store.find(Path("out"), "latest")
        store.verify(folder)
        assert resume(f"--max_iters {int(folder.name[5:]) + 1}") == 0

    @pytest.mark.slow
    def test_a_terminal_of_few_characters_stops_nothing(self):
        Path("häuser.txt").write_bytes(Path("text.txt").read_bytes())
        flags = "--sample_interval 2 --dataset häuser.txt --out_dir häuser"
        process = spawn(flags, env=os.environ | {"PYTHONIOENCODING": "ascii"})
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        assert "next:  python -m fastgpt.generate --out_dir" in out
        assert store.find(Path("häuser"), "latest").name == "step-000006"
