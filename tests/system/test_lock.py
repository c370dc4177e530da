"""Locks and who holds them: one owner at a time, told by its number, and none that outlives its process."""

import errno
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest

from fastgpt import cli, train
from fastgpt.checkpoint import run_folder, store
from fastgpt.errors import UsageError
from fastgpt.system import lock
from fastgpt.system.lock import Locked
from tests.helpers.runs import ENDLESS, FLAGS, contents, resume, spawn

fcntl = pytest.importorskip("fcntl", reason="Windows locks otherwise, and has no fork")

RACERS = 6


@contextmanager
def child(action: Callable[[int], None]) -> Iterator[tuple[int, int]]:
    """A process that does the action, which is given a pipe to write to; its number and the pipe's other end.

    It is killed at the end of the block.
    """
    reading, writing = os.pipe()
    number = os.fork()
    if number == 0:
        try:
            os.close(reading)
            action(writing)
            os._exit(0)
        except BaseException as error:
            os.write(2, f"{error!r}\n".encode())
        finally:
            os._exit(1)
    os.close(writing)
    try:
        yield number, reading
    finally:
        os.close(reading)
        os.kill(number, signal.SIGKILL)
        os.waitpid(number, 0)


def holder(path: Path) -> Callable[[int], None]:
    """An action that holds a lock, says so, and stays."""

    def hold(pipe: int) -> None:
        with lock.held(path):
            os.write(pipe, b"!")
            time.sleep(60)

    return hold


def dead_process() -> int:
    """The number of a process that is over."""
    number = os.fork()
    if number == 0:
        os._exit(0)
    os.waitpid(number, 0)
    return number


def owner_of(path: Path) -> str:
    """Who is named by the refusal to take a lock."""
    with pytest.raises(Locked) as refused, lock.held(path):
        pass
    with pytest.raises(Locked) as checked:
        lock.check(path)
    assert refused.value.owner == checked.value.owner
    return refused.value.owner


class TestOwner:
    @pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt, SystemExit])
    def test_it_is_held_until_the_end_of_the_block_however_that_is_left(self, tmp_path: Path, error: type | None):
        path = tmp_path / "lock"
        with pytest.raises(error) if error else nullcontext(), lock.held(path):
            assert path.read_text() == f"{os.getpid()}\n"
            assert owner_of(path) == str(os.getpid())
            if error:
                raise error
        lock.check(path)
        with lock.held(path):
            pass

    def test_a_second_process_is_refused_with_the_owners_number(self, tmp_path: Path):
        path = tmp_path / "lock"
        with child(holder(path)) as (number, pipe):
            os.read(pipe, 1)
            assert number != os.getpid()
            assert owner_of(path) == str(number)
            assert owner_of(path) == str(number)  # a refusal has taken nothing from it
            assert path.read_text() == f"{number}\n"

    def test_a_block_that_was_refused_is_not_entered(self, tmp_path: Path):
        path, entered = tmp_path / "lock", []
        with child(holder(path)) as (_, pipe):
            os.read(pipe, 1)
            with pytest.raises(Locked), lock.held(path):
                entered.append(True)
        assert not entered

    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
    def test_a_dead_owners_lock_frees_itself(self, tmp_path: Path, number: int):
        path = tmp_path / "lock"
        with child(holder(path)) as (owner, pipe):
            os.read(pipe, 1)
            assert owner_of(path) == str(owner)
            os.kill(owner, number)
            os.waitid(os.P_PID, owner, os.WEXITED | os.WNOWAIT)
            assert path.read_text() == f"{owner}\n"  # it could not clear it away
            lock.check(path)
            with lock.held(path):
                assert path.read_text() == f"{os.getpid()}\n"

    def test_a_shorter_number_replaces_a_longer_one_whole(self, tmp_path: Path):
        path = tmp_path / "lock"
        path.write_text("123456789012345678901234567890\n")
        with lock.held(path):
            assert path.read_text() == f"{os.getpid()}\n"


class TestCheck:
    def test_it_makes_nothing(self, tmp_path: Path):
        lock.check(tmp_path / "lock")
        lock.check(tmp_path / "nowhere" / "lock")
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("content", ["", "12345\n", "not a number"])
    def test_it_changes_nothing_and_holds_nothing(self, tmp_path: Path, content: str):
        path = tmp_path / "lock"
        path.write_text(content)
        before = path.stat()
        lock.check(path)
        after = path.stat()
        assert path.read_text() == content
        assert (after.st_mtime_ns, after.st_ino, after.st_mode) == (before.st_mtime_ns, before.st_ino, before.st_mode)
        lock.check(path)
        with lock.held(path):
            pass

    def test_it_takes_nothing_from_an_owner(self, tmp_path: Path):
        path = tmp_path / "lock"
        with lock.held(path):
            before = path.stat().st_mtime_ns
            for _ in range(3):
                with pytest.raises(Locked):
                    lock.check(path)
            assert path.stat().st_mtime_ns == before
            assert path.read_text() == f"{os.getpid()}\n"


class TestNameOfTheOwner:
    """The file's text is the last owner's until the next one has written its own."""

    @pytest.mark.parametrize("left", ["nothing", "a dead process"])
    def test_an_owner_that_has_not_yet_written_its_number_is_waited_for(self, tmp_path: Path, left: str):
        path = tmp_path / "lock"
        path.write_text("" if left == "nothing" else f"{dead_process()}\n")

        def slow(pipe: int) -> None:
            with path.open("r+") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                os.write(pipe, b"!")
                time.sleep(0.3)
                file.truncate(0)
                file.write(f"{os.getpid()}\n")
                file.flush()
                time.sleep(60)

        with child(slow) as (number, pipe):
            os.read(pipe, 1)
            with pytest.raises(Locked) as refused, lock.held(path):
                pass
            assert refused.value.owner == str(number)

    @pytest.mark.parametrize("left", ["", "nonsense\n", "99999999999999999999\n", None])
    def test_a_number_of_no_living_process_is_never_named(self, tmp_path: Path, monkeypatch, left: str | None):
        monkeypatch.setattr(lock, "PATIENCE_SECONDS", 0.2)
        path, dead = tmp_path / "lock", dead_process()
        path.write_text(f"{dead}\n" if left is None else left)

        def silent(pipe: int) -> None:
            with path.open("r+") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                os.write(pipe, b"!")
                time.sleep(60)

        with child(silent) as (_, pipe):
            os.read(pipe, 1)
            assert owner_of(path) == "unknown"

    def test_who_only_checked_for_a_moment_refuses_nobody(self, tmp_path: Path):
        path = tmp_path / "lock"
        path.write_text(f"{dead_process()}\n")

        def moment(pipe: int) -> None:
            with path.open("r+") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                os.write(pipe, b"!")
                time.sleep(0.2)

        with child(moment) as (_, pipe):
            os.read(pipe, 1)
            with lock.held(path):
                assert path.read_text() == f"{os.getpid()}\n"


class TestFileThatIsDeleted:
    """Who has a lock may delete its file, while others have opened it and wait to lock it."""

    @pytest.fixture
    def deleted(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A lock whose file is deleted just before it is locked the first time."""
        path, flock, deleted = tmp_path / "lock", fcntl.flock, []

        def delete_and_lock(file, operation: int) -> None:
            if file.name == str(path) and not deleted:
                deleted.append(path.unlink())
            flock(file, operation)

        monkeypatch.setattr(fcntl, "flock", delete_and_lock)
        return path

    def test_the_next_file_is_locked(self, deleted: Path):
        with lock.held(deleted):
            assert deleted.read_text() == f"{os.getpid()}\n"
            assert owner_of(deleted) == str(os.getpid())

    def test_the_next_files_owner_is_not_disturbed(self, deleted: Path, monkeypatch: pytest.MonkeyPatch):
        other, unlink = deleted.with_name("other"), Path.unlink
        with child(holder(other)) as (number, pipe):
            os.read(pipe, 1)
            monkeypatch.setattr(Path, "unlink", lambda path: (unlink(path), other.rename(path)))
            with pytest.raises(Locked) as refused, lock.held(deleted):
                pass
            assert refused.value.owner == str(number)

    @pytest.mark.parametrize("when", ["before it was opened", "before it was locked"])
    def test_none_is_made_that_was_not_asked_for(self, deleted: Path, when: str):
        if when == "before it was locked":
            deleted.touch()
        with pytest.raises(FileNotFoundError), lock.held(deleted, make=False):
            pass
        assert not list(deleted.parent.iterdir())


class TestLinks:
    """A lock is written to, so a link in its place would have another file written over."""

    @pytest.mark.parametrize("there", [True, False])
    def test_what_a_link_leads_to_is_not_touched(self, tmp_path: Path, there: bool):
        path, precious = tmp_path / "lock", tmp_path / "precious"
        if there:
            precious.write_text("precious")
        path.symlink_to(precious)
        for make in (True, False):
            with pytest.raises(OSError, match="symbolic links"), lock.held(path, make=make):
                pass
        with pytest.raises(OSError, match="symbolic links") if there else nullcontext():
            lock.check(path)
        assert (precious.read_text() if there else precious.exists()) == ("precious" if there else False)


class TestNoLocks:
    """A file system that cannot lock is told apart from a lock that is held."""

    @pytest.fixture(params=["ENOLCK", "ENOTSUP", "EIO"])
    def reason(self, request, monkeypatch) -> str:
        number = getattr(errno, request.param)

        def unable(*_: object) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fcntl, "flock", unable)
        return os.strerror(number)

    def test_it_is_an_error_of_the_system(self, tmp_path: Path, reason: str):
        (tmp_path / "lock").touch()
        with pytest.raises(OSError, match=reason), lock.held(tmp_path / "lock"):
            pass
        with pytest.raises(OSError, match=reason):
            lock.check(tmp_path / "lock")

    def test_a_run_says_so_in_one_line(self, tmp_path: Path, reason: str):
        said = f"`out_dir` {tmp_path} cannot be written: {reason}; name another"
        with pytest.raises(UsageError) as refused, run_folder.locked(tmp_path):
            pass
        assert str(refused.value) == said
        with pytest.raises(UsageError) as refused:
            run_folder.check_free(tmp_path)
        assert str(refused.value) == said


def race(folder: Path) -> tuple[list[int], dict[int, str]]:
    """Let processes take a folder at the same moment: the numbers of those who got it, and the others' errors."""
    waiting, release = os.pipe()
    results, tell = os.pipe()
    go_on, done = os.pipe()
    racers = []
    for _ in range(RACERS):
        number = os.fork()
        if number == 0:
            os.close(release)
            os.close(done)
            try:
                os.read(waiting, 1)  # until the other end is closed, for all of them at once
                with run_folder.locked(folder):
                    os.write(tell, f"{os.getpid()} holds\n".encode())
                    os.read(go_on, 1)
            except UsageError as error:
                os.write(tell, f"{os.getpid()} {error}\n".encode())
            finally:
                os._exit(0)
        racers.append(number)
    os.close(tell)
    os.close(release)
    lines: list[str] = []
    with os.fdopen(results, closefd=True) as file:
        while len(lines) < RACERS and (line := file.readline()):
            lines.append(line.rstrip("\n"))
        os.close(done)  # only now does the winner let go
        assert file.read() == ""
    for number in racers:
        os.waitpid(number, 0)
    for end in (waiting, go_on):
        os.close(end)
    told = {int(number): words for number, _, words in (line.partition(" ") for line in lines)}
    assert told.keys() == set(racers)
    return [n for n, words in told.items() if words == "holds"], {n: w for n, w in told.items() if w != "holds"}


@pytest.mark.parametrize("races", [5, pytest.param(20, marks=pytest.mark.slow)])
def test_raced_starts_have_one_winner_each_whom_every_loser_names(tmp_path: Path, races: int):
    folder = tmp_path / "out"
    for _ in range(races):  # from the second on, the file holds the number of a dead owner
        winners, losers = race(folder)
        assert len(winners) == 1, (winners, losers)
        said = f"`out_dir` {folder} is in use by process {winners[0]}; wait for it, or name another `out_dir`"
        assert list(losers.values()) == [said] * (RACERS - 1)
    with run_folder.locked(folder):
        pass


@pytest.mark.usefixtures("workplace")
class TestRaceOfRuns:
    @pytest.mark.slow
    def test_of_three_starts_at_once_one_trains_and_is_resumed_after_its_death(self):
        self.race("out", others=(["--overwrite"],))

    @pytest.mark.slow
    def test_20_races_of_whole_programs(self):
        for number in range(20):
            self.race(f"out-{number}")

    def race(self, out_dir: str, others: tuple[list[str], ...] = ()) -> None:
        """Start three trainings of one folder; then kill the winner, and go on with its run."""
        flags = f"{ENDLESS} --eval_interval 4 --out_dir {out_dir}"
        runs = [spawn(flags) for _ in range(3)]
        try:
            (winner,) = wait_for_losers(runs)
            for loser in runs:
                if loser is not winner:
                    out, err = loser.communicate(timeout=60)
                    assert loser.returncode == 2, err
                    assert out == ""
                    *said, error = err.splitlines()
                    assert all(line.startswith(("preset ", "prepared ", "reused ")) for line in said)
                    assert error == (
                        f"error: --out_dir {out_dir} is in use by process {winner.pid}; "
                        "wait for it, or name another --out_dir"
                    )
            wait_for(lambda: (Path(out_dir) / "latest").exists())
            for more in others:  # one that comes late
                assert cli.run(train.main, [*FLAGS, "--out_dir", out_dir, *more]) == 2
            assert winner.poll() is None
        finally:
            for process in runs:
                process.kill()
                process.communicate(timeout=60)
        assert winner.returncode == -signal.SIGKILL
        step = int(store.find(Path(out_dir), "latest").name[5:])
        assert resume(f"--max_iters {step + 2}", out_dir) == 0
        store.verify(store.find(Path(out_dir), "latest"))
        assert store.find(Path(out_dir), "latest").name == f"step-{step + 2:06d}"

    def test_a_refused_start_leaves_the_owners_folder_as_it_is(self, capsys):
        """Also with --overwrite, which would delete it."""
        with child(lambda pipe: self.own(Path("out"), pipe)) as (number, pipe):
            os.read(pipe, 1)
            before = contents(Path("out"))
            for flags in ("", "--overwrite"):
                assert cli.run(train.main, [*FLAGS, *shlex.split(flags)]) == 2
                assert f"is in use by process {number}; " in capsys.readouterr().err.splitlines()[-1]
                assert contents(Path("out")) == before

    @staticmethod
    def own(folder: Path, pipe: int) -> None:
        with run_folder.locked(folder):
            (folder / ".fastgpt-tmp-step-000001-7").mkdir()  # as in the middle of a save
            (folder / ".fastgpt-tmp-step-000001-7" / "model.safetensors").write_bytes(b"half")
            os.write(pipe, b"!")
            time.sleep(60)


def wait_for(holds: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def wait_for_losers(runs: list[subprocess.Popen]) -> list[subprocess.Popen]:
    """Wait until all but one have ended; those that have not."""
    wait_for(lambda: sum(run.poll() is None for run in runs) <= 1)
    return [run for run in runs if run.poll() is None]
