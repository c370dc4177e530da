"""Runs on disks that refuse: a stand-in for the disk, runs in child processes, and what they leave."""

import os
import resource
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastgpt import cli, train
from fastgpt.checkpoint import store
from fastgpt.loggers.jsonl import read_metrics
from fastgpt.training.run import Run
from tests.helpers.runs import FLAGS, tensors

STEPS = "--max_iters 12 --eval_interval 3 --dropout 0.1"
DISK = {"open", "os.mkdir", "os.rename", "fastgpt.write", "fastgpt.sync"}


def in_child(action: Callable[[], int]) -> int:
    """The exit code of an action in a process of its own, whose streams are files here: out.txt and err.txt."""
    number = os.fork()
    if number == 0:
        for stream, name in ((1, "out.txt"), (2, "err.txt")):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        code = 99
        try:
            code = action()
        except BaseException as error:
            print(f"Traceback: {error!r}", file=sys.stderr)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


def err() -> list[str]:
    """The lines of the last child's stderr."""
    text = Path("err.txt").read_text()
    assert "Traceback" not in text, text
    return text.splitlines()


def train_here(flags: str = "", out_dir: str = "out") -> int:
    return cli.run(train.main, [*FLAGS, "--out_dir", out_dir, *shlex.split(flags)])


class Disk:
    """A disk that refuses, by an audit hook: while `number` is set, the events in a folder that `wants` names."""

    def __init__(self, folder: str, wants: Callable[[str, str], bool]):
        self.folder, self.wants, self.number = str(Path(folder).absolute()), wants, None
        self.refused: list[str] = []
        sys.addaudithook(self.hook)

    def hook(self, event: str, arguments: tuple) -> None:
        if self.number is None or event not in DISK or not isinstance(arguments[0], str | os.PathLike):
            return
        path = str(Path(arguments[0]).absolute())
        if event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        if (path + "/").startswith(self.folder + "/") and self.wants(event, path):
            self.refused.append(f"{event} {Path(path).name}")
            raise OSError(self.number, os.strerror(self.number), path)


def between_steps(patch: pytest.MonkeyPatch, what: Callable[[int], None]) -> None:
    """Let something happen before each step that is taken, and after the save before it; it is given the number."""
    step = Run.take_step

    def stepped(self) -> None:
        self.checkpoints.wait()
        what(self.state.progress.step + 1)
        step(self)

    patch.setattr(Run, "take_step", stepped)


def whole_run(out: Path = Path("out")) -> None:
    """Every checkpoint there is, and those that the pointers name, must be whole, and so every line of metrics."""
    for folder in store.folders(out):
        store.verify(folder)
    for name in ("latest", "best"):
        if (out / name).exists():
            store.verify(store.find(out, name))
    text = (out / "metrics.jsonl").read_text()
    assert text == "" or text.endswith("\n")
    assert len(read_metrics(out / "metrics.jsonl")) == text.count("\n")


def same(out: Path, other: Path) -> bool:
    theirs = tensors(other)
    return all(torch.equal(tensor, theirs[name]) for name, tensor in tensors(out).items())


def limited(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
