"""`python -m fastgpt.verify out`: every checkpoint is read, what is damaged is named, and nothing is changed."""

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fastgpt import cli, verify
from fastgpt.checkpoint import run_folder, store, verification
from fastgpt.checkpoint.store import MANIFEST, MODEL, OPTIMIZER, STATE
from fastgpt.system import lock
from fastgpt.tokenizer.base import Tokenizer
from tests.helpers import runs
from tests.helpers.verified import Verified

FLAGS = "--max_iters 8 --eval_interval 3 --keep_last 9"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A run of three checkpoints."""
    return runs.run_in(tmp_path_factory.mktemp("made"), FLAGS)


@pytest.fixture
def out(made: Path, tmp_path: Path, monkeypatch) -> Path:
    """A copy of the run, at out, that a test may damage."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(made, "out"))


STEPS = (3, 6, 8)


@pytest.fixture
def verified(capsys) -> Callable[..., Verified]:
    return lambda *arguments: Verified(capsys, *arguments)


def kibibytes(out: Path, step: int) -> str:
    """The size of a checkpoint's files."""
    return f"{sum(file.stat().st_size for file in (out / f'step-{step:06d}').iterdir()) / 1024:.0f}"


def named(found: Verified, name: str | Path) -> str:
    """The one fault that was found, which names this."""
    assert found.code == 1
    (fault,) = found.faults
    assert fault.startswith("damaged: ")
    assert str(name) in fault
    return fault


class TestWhole:
    @pytest.mark.parametrize("arguments", [(), ("out",), ("--out_dir", "out"), ("--out_dir=out",), ("./out",)])
    def test_every_checkpoint_has_a_row(self, out: Path, verified, arguments: tuple[str, ...]):
        found = verified(*arguments)
        assert (found.code, found.faults) == (0, [])
        assert found.header == ["step", "size", "intact", "val", "loss"]
        losses = runs.records(out, "val_loss")
        best = min(losses, key=losses.get)
        assert list(found.rows) == list(losses) == list(STEPS)
        for step, loss in losses.items():
            marks = ",".join(name for name, at in (("latest", 8), ("best", best)) if at == step)
            assert found.cells(step) == [
                str(step),
                kibibytes(out, step),
                "yes",
                f"{loss:.4f}",
                *([marks] if marks else []),
            ]

    def test_latest_and_best_are_marked_where_their_files_point(self, out: Path, verified):
        store.point(out, "latest", out / "step-000006")
        store.point(out, "best", out / "step-000003")
        found = verified("out")
        assert found.code == 0
        assert [found.cells(step)[4:] for step in STEPS] == [["best"], ["latest"], []]
        store.point(out, "best", out / "step-000006")
        assert verified("out").cells(6)[4:] == ["latest,best"]

    def test_a_run_that_was_not_evaluated_has_no_best(self, out: Path, verified):
        (out / "best").unlink()
        found = verified("out")
        assert found.code == 0  # as generate, which then takes the latest
        assert found.cells(8)[4:] == ["latest,best"]

    def test_the_sizes_are_those_of_the_files(self, out: Path):
        report = verification.check(out / "step-000006", run_folder.vocabulary(out))
        assert report.size == sum(file.stat().st_size for file in (out / "step-000006").iterdir())
        assert report.damage is None

    def test_a_checkpoint_that_was_saved_without_an_evaluation_has_no_loss(self, out: Path, verified):
        folder = out / "step-000006"
        state = store.load_state(folder)
        state["progress"]["evaluated_step"] = 3
        (folder / STATE).write_bytes(store.json_bytes(state))
        runs.forge_manifest(folder)
        found = verified("out")
        assert (found.code, found.cells(6)) == (0, ["6", kibibytes(out, 6), "yes", "-"])

    def test_a_run_that_is_under_way_can_be_checked(self, out: Path, verified):
        with lock.held(out / run_folder.LOCK):
            assert verified("out").code == 0

    def test_it_changes_nothing(self, out: Path, verified):
        (out / ".fastgpt-tmp-step-000009-7").mkdir()  # of a save that is under way, or died
        (out / ".fastgpt-tmp-step-000009-7" / MODEL).write_bytes(b"half")
        (out / "step-000003" / OPTIMIZER).write_bytes(b"")
        before, names = runs.contents(out), sorted(out.rglob("*"))
        assert verified("out").code == 1
        assert runs.contents(out) == before
        assert sorted(out.rglob("*")) == names

    @pytest.mark.slow
    def test_as_a_program(self, out: Path):
        def program(*arguments: str) -> subprocess.CompletedProcess:
            command = [sys.executable, "-m", "fastgpt.verify", *arguments]
            return subprocess.run(command, capture_output=True, text=True, timeout=60)

        found = program("out")
        assert (found.returncode, found.stderr) == (0, "")
        assert re.findall(r"^ *(\d+) .* yes ", found.stdout, re.M) == ["3", "6", "8"]
        (out / "step-000006" / MODEL).write_bytes(b"")
        found = program("out")
        assert found.returncode == 1
        assert found.stderr.startswith(f"damaged: {out / 'step-000006' / MODEL} ")
        assert re.findall(r"^ *(\d+) .* no ", found.stdout, re.M) == ["6"]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a flipped bit": flip,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-2]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "empty": lambda path: path.write_bytes(b""),
    "missing": Path.unlink,
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a link to nothing": lambda path: (path.unlink(), path.symlink_to("nowhere")),
    "a link to itself": lambda path: (path.unlink(), path.symlink_to(path.name)),
}


class TestDamage:
    @pytest.mark.parametrize("name", [MODEL, OPTIMIZER, STATE, MANIFEST])
    @pytest.mark.parametrize("damage", DAMAGES)
    def test_each_kind_is_named(self, out: Path, verified, name: str, damage: str):
        DAMAGES[damage](out / "step-000006" / name)
        found = verified("out")
        if (name, damage) == (MANIFEST, "a flipped bit"):  # of a digest or a size, which accuses the file it is of
            name = ""
        named(found, out / "step-000006" / name)
        assert [found.cells(step)[2] for step in STEPS] == ["yes", "no", "yes"]
        assert found.cells(6)[3] == "-"

    def test_all_of_them_are_told(self, out: Path, verified):
        flip(out / "step-000003" / OPTIMIZER)
        (out / "step-000008" / STATE).unlink()
        (out / "best").write_text("step-000007\n")
        found = verified("out")
        assert found.code == 1
        assert [found.cells(step)[2] for step in STEPS] == ["no", "yes", "no"]
        assert len(found.faults) == 3
        assert all(fault.startswith("damaged: ") for fault in found.faults)
        for part in (out / "step-000003" / OPTIMIZER, out / "step-000008" / STATE, out / "best"):
            assert sum(str(part) in fault for fault in found.faults) == 1

    def test_a_checkpoint_under_another_steps_name(self, out: Path, verified):
        (out / "step-000006").rename(out / "step-000007")
        named(verified("out"), out / "step-000007" / STATE)

    @pytest.mark.parametrize("content", ["", "step-000007\n", "nonsense", "\0", "\xff", "..", "step-000008/model"])
    @pytest.mark.parametrize("name", ["latest", "best"])
    def test_a_pointer_to_nothing(self, out: Path, verified, name: str, content: str):
        (out / name).write_text(content, encoding="latin-1")
        found = verified("out")
        named(found, out / name)
        assert [found.cells(step)[2] for step in STEPS] == ["yes"] * 3
        assert not any(name in row for row in found.rows.values())

    def test_a_pointer_that_is_missing(self, out: Path, verified):
        (out / "latest").unlink()
        named(verified("out"), out / "latest")

    @pytest.mark.parametrize("damage", DAMAGES)
    def test_the_configuration(self, out: Path, verified, damage: str):
        DAMAGES[damage](out / "config.json")
        found = verified("out")
        named(found, out / "config.json")
        assert [found.cells(step)[2] for step in STEPS] == ["yes"] * 3


class TestGone:
    @pytest.mark.parametrize("moment", ["before it is listed", "after its list was read"])
    def test_a_checkpoint_that_is_deleted_meanwhile_is_left_out(self, out: Path, verified, monkeypatch, moment: str):
        doomed = out / "step-000003"
        if moment == "before it is listed":
            check = verification.check

            def late(folder: Path, vocabulary: Tokenizer) -> verification.Report | None:
                if folder == doomed:
                    store.delete_folder(folder)
                return check(folder, vocabulary)

            monkeypatch.setattr(verification, "check", late)
        else:
            sha256 = store.sha256

            def later(path: Path) -> str:
                if path.parent == doomed and path.name == OPTIMIZER:
                    store.delete_folder(doomed)
                return sha256(path)

            monkeypatch.setattr(store, "sha256", later)
        found = verified("out")
        assert (found.code, found.faults) == (0, [])
        assert list(found.rows) == [6, 8]

    def test_one_that_is_deleted_after_it_was_read_is_left_out(self, out: Path, verified, monkeypatch):
        doomed, load = out / "step-000003", store.load_state
        reads = []

        def last(folder: Path) -> dict:
            reads.append(folder)
            if folder == doomed and reads.count(doomed) == 2:  # the first is that of the comparison
                shutil.rmtree(doomed)
            return load(folder)

        monkeypatch.setattr(store, "load_state", last)
        found = verified("out")
        assert not doomed.exists()
        assert (found.code, found.faults) == (0, [])
        assert list(found.rows) == [6, 8]


class TestRefused:
    def refused(self, verified, *arguments: str) -> str:
        """The one line with exit code 2."""
        found = verified(*arguments)
        assert (found.code, found.rows) == (2, {})
        (line,) = found.faults
        assert line.startswith("error: ")
        return line

    @pytest.mark.parametrize("there", [True, False])
    def test_no_run(self, workplace: Path, verified, there: bool):
        if there:
            Path("out").mkdir()
        assert "error: out holds no run; train one first" in self.refused(verified, "out")
        assert Path("out").exists() == there

    def test_a_run_without_a_checkpoint(self, out: Path, verified):
        store.delete(out)
        line = self.refused(verified, "out")
        assert "--out_dir out holds a run without a checkpoint yet" in line

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (("--outdir", "out"), ["unknown flag --outdir", "did you mean --out_dir?"]),
            (("out", "--checkpoint", "best"), ["unknown flag --checkpoint"]),
            (("out", "other"), ["'other' is not a flag"]),
            (("--out_dir",), ["--out_dir needs a value"]),
            (("",), ["--out_dir ''"]),
            (("a\0b",), ["--out_dir", "NUL"]),
            (("text.txt",), ["--out_dir text.txt"]),
        ],
    )
    def test_bad_flags(self, workplace: Path, verified, arguments: tuple[str, ...], words: list[str]):
        line = self.refused(verified, *arguments)
        assert all(word in line for word in words), line

    def test_help(self, capsys):
        with pytest.raises(SystemExit) as stopped:
            cli.run(verify.main, ["--help"])
        assert stopped.value.code == 0
        assert "--out_dir" in capsys.readouterr().out
