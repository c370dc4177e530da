"""Saving GPT-2's smallest size with its optimizer, 1.5 GB: against the same bytes written plainly, and beside training.

A save writes into a new folder, hashes, syncs, renames, and then deletes the folder before. The plain peer writes the
same bytes into a new file, syncs and hashes them, and then replaces the file before; its fellow without the sync shows
what the disk costs. torch.save over the file that is there, neither synced nor hashed, is what nanoGPT does.

All are called a few times first: memory for the file cache is handed to a virtual machine slowly the first time, which
is up to twice the time of a save, and delays the next writer.
"""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastgpt.checkpoint import store
from fastgpt.checkpoint.store import Snapshot
from fastgpt.checkpoint.writer import BackgroundWriter, Writer
from fastgpt.config.training import PRESETS
from fastgpt.model.gpt import GPT
from fastgpt.system import safetensors_file
from fastgpt.training.optimizer import make_optimizer

ROUNDS = 5
WARMUP = 3
PLAIN = "write, sync, hash"


@pytest.fixture(scope="module")
def snapshot(device: torch.device) -> Snapshot:
    config = PRESETS["gpt2"]
    with device:
        model = GPT(config)
    return store.capture(1, model, make_optimizer(model, config), {})


def save(writer: Writer, snapshot: Snapshot) -> None:
    writer.save(snapshot, 1, lambda: None)


def finish(writer: Writer) -> None:
    outcome = writer.wait()
    assert outcome is None or outcome.saved


def blocks(snapshot: Snapshot) -> Iterator[bytes | memoryview]:
    for tensors in snapshot.tensors.values():
        yield from safetensors_file.parts(tensors)


def plain(path: Path, snapshot: Snapshot, sync: bool) -> None:
    """The bytes of the snapshot, one after the other, then their hash, in the place of those of the last time."""
    new = path.with_suffix(".new")
    with new.open("wb") as file:
        for block in blocks(snapshot):
            file.write(block)
        file.flush()
        if sync:
            os.fsync(file.fileno())
    digest = hashlib.sha256()
    for block in blocks(snapshot):
        digest.update(block)
    assert digest.hexdigest()
    new.replace(path)


def with_torch(path: Path, snapshot: Snapshot) -> None:
    torch.save({name: dict(tensors) for name, tensors in snapshot.tensors.items()}, path)


def size(snapshot: Snapshot) -> int:
    return sum(map(len, blocks(snapshot)))


def test_save(against, tmp_path: Path, snapshot: Snapshot):
    ours = Writer(tmp_path / "out", 1)
    peers = {
        PLAIN: lambda: plain(tmp_path / "plain", snapshot, sync=True),
        "write, hash, without sync": lambda: plain(tmp_path / "unsynced", snapshot, sync=False),
        "torch.save, neither synced nor hashed": lambda: with_torch(tmp_path / "torch", snapshot),
    }

    def wait() -> None:
        save(ours, snapshot)
        finish(ours)

    for call in [wait, *peers.values()] * WARMUP:
        call()
    against(
        wait,
        peers,
        rounds=ROUNDS,
        units=size(snapshot) / 1e6,
        unit="MB",
        aim=1 / 1.5,
        aim_peer=PLAIN,
    )


def test_async_save_blocks(against, tmp_path: Path, snapshot: Snapshot):
    """The time that training waits for a background save, against one that is not."""
    ours, waiting = BackgroundWriter(tmp_path / "out", 1), Writer(tmp_path / "out", 1)

    def wait() -> None:
        save(waiting, snapshot)
        finish(waiting)

    for _ in range(WARMUP):
        wait()
    against(
        lambda: save(ours, snapshot),
        {"save that training waits for": wait},
        rounds=ROUNDS,
        units=size(snapshot) / 1e6,
        unit="MB",
        aim=10,
        settle=lambda: finish(ours),
    )
