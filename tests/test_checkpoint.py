"""Checkpoints: whatever is altered is found and named, and a save that dies leaves the one before whole."""

import hashlib
import json
import math
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastgpt import checkpoint
from fastgpt.checkpoint import MANIFEST, MODEL, OPTIMIZER, STATE, verify
from fastgpt.config import TrainConfig
from fastgpt.errors import CorruptCheckpoint, UsageError
from fastgpt.model import GPT
from fastgpt.optim import make_optimizer
from fastgpt.tokenizer import CharTokenizer

FILES = (MODEL, OPTIMIZER, STATE, MANIFEST)
CONFIG = TrainConfig(vocab_size=11, block_size=8, n_layer=1, n_head=2, n_embd=8, learning_rate=0.01)


def trained(steps: int = 2, seed: int = 0) -> tuple[GPT, torch.optim.Optimizer]:
    """A model and optimizer a few steps into a training."""
    torch.manual_seed(seed)
    model = GPT(CONFIG)
    optimizer = make_optimizer(model, CONFIG)
    for _ in range(steps):
        tokens = torch.randint(11, (2, 9))
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return checkpoint.save(tmp_path_factory.mktemp("run"), 2, *trained(), {"val_loss": 1.5, "best_step": 2})


@pytest.fixture
def step_dir(saved: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    shutil.copy(saved.parent / "latest", tmp_path / "latest")
    return Path(shutil.copytree(saved, tmp_path / saved.name))


def damaged(step_dir: Path, name: str) -> None:
    with pytest.raises(CorruptCheckpoint) as caught:
        verify(step_dir)
    assert str(step_dir / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_is_safetensors_and_json_and_nothing_else(saved: Path):
    assert {path.name for path in saved.iterdir()} == set(FILES)
    for name in (STATE, MANIFEST):
        json.loads((saved / name).read_text(encoding="utf-8"))
    for name in (MODEL, OPTIMIZER):
        assert all(isinstance(tensor, torch.Tensor) for tensor in load_file(saved / name).values())
    verify(saved)
    verify(str(saved))


def test_the_manifest_has_every_files_size_and_sha256(saved: Path):
    files = {
        name: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name in (MODEL, OPTIMIZER, STATE)
        if (content := (saved / name).read_bytes())
    }
    assert json.loads((saved / MANIFEST).read_text()) == {"format": 1, "files": files}


def test_the_vocabularys_padding_is_not_saved(saved: Path):
    assert load_file(saved / MODEL)["wte.weight"].shape == (11, 8)
    moments = load_file(saved / OPTIMIZER)
    assert moments["exp_avg.wte.weight"].shape == moments["exp_avg_sq.wte.weight"].shape == (11, 8)


def test_loading_gives_back_every_bit(saved: Path):
    model, optimizer = trained()
    other, others = trained(steps=1, seed=9)
    other.load_weights(checkpoint.load_weights(saved))
    checkpoint.load_optimizer(saved, other, others)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        state, loaded = optimizer.state[mine], others.state[theirs]
        assert state.keys() == loaded.keys()
        assert all(torch.equal(state[kind], loaded[kind]) for kind in state)
        assert all(state[kind].dtype == loaded[kind].dtype for kind in state)
    assert checkpoint.load_state(saved) == {"format": 1, "step": 2, "val_loss": 1.5, "best_step": 2}


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_found(step_dir: Path, name: str):
    path = step_dir / name
    content, draw = path.read_bytes(), random.Random(name)
    for _ in range(60):
        place, bit = draw.randrange(len(content)), draw.randrange(8)
        flipped = bytearray(content)
        flipped[place] ^= 1 << bit
        path.write_bytes(flipped)
        with pytest.raises(CorruptCheckpoint):
            verify(step_dir)
        if name != MANIFEST:  # a digit of a digest in the manifest accuses the file it belongs to
            damaged(step_dir, name)
    path.write_bytes(content)
    verify(step_dir)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("zeroed", [True, False])
def test_a_truncated_file_or_a_zeroed_tail_is_found(step_dir: Path, name: str, share: float, zeroed: bool):
    content = (step_dir / name).read_bytes()
    kept = min(int(share * len(content)), len(content) - 3)
    (step_dir / name).write_bytes(content[:kept] + bytes(len(content) - kept) * zeroed)
    damaged(step_dir, name)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_found(step_dir: Path, name: str):
    (step_dir / name).unlink()
    damaged(step_dir, name)
    (step_dir / name).mkdir()
    damaged(step_dir, name)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "3",
        "[]",
        "{}",
        "\xff",
        '{"files": null}',
        '{"format": 1, "files": {}}',
        '{"format": 1, "files": []}',
        '{"format": 1, "files": {"model.safetensors": 1, "optim.safetensors": 1}}',
        "[" * 100_000,
    ],
    ids=lambda text: text[:20],
)
def test_a_nonsense_manifest_is_found(step_dir: Path, text: str):
    (step_dir / MANIFEST).write_text(text, encoding="latin-1")
    damaged(step_dir, MANIFEST)


def test_entries_that_are_no_digests_are_found(step_dir: Path):
    manifest = json.loads((step_dir / MANIFEST).read_text())
    for entry in (None, [], "x", {}, {"size": -1}, {"sha256": manifest["files"][STATE]["sha256"]}):
        changed = manifest | {"files": manifest["files"] | {STATE: entry}}
        (step_dir / MANIFEST).write_text(json.dumps(changed))
        damaged(step_dir, STATE)


def test_swapped_files_are_found(step_dir: Path):
    (step_dir / MODEL).rename(step_dir / "other")
    (step_dir / OPTIMIZER).rename(step_dir / MODEL)
    (step_dir / "other").rename(step_dir / OPTIMIZER)
    damaged(step_dir, MODEL)


def test_another_steps_file_is_found(step_dir: Path, tmp_path: Path):
    other = checkpoint.save(tmp_path / "other", 2, *trained(seed=5), {"val_loss": 1.5, "best_step": 2})
    assert (other / MODEL).stat().st_size == (step_dir / MODEL).stat().st_size
    shutil.copy(other / MODEL, step_dir / MODEL)
    damaged(step_dir, MODEL)


def test_weights_of_another_shape_are_named(saved: Path):
    with pytest.raises(CorruptCheckpoint, match=r"wte\.weight is \(11, 8\).*need \(12, 8\)"):
        GPT(TrainConfig(**(vars(CONFIG) | {"vocab_size": 12}))).load_weights(checkpoint.load_weights(saved))
    with pytest.raises(CorruptCheckpoint, match=r"h\.1\."):
        GPT(TrainConfig(**(vars(CONFIG) | {"n_layer": 2}))).load_weights(checkpoint.load_weights(saved))


class Killed(Exception):
    """The process ends here."""


@pytest.fixture
def killer(monkeypatch):
    """Let the process "die" at the n-th call that reaches the disk."""
    calls = [math.inf]

    def deadly(call):
        def wrapped(*arguments, **named):
            calls[0] -= 1
            if calls[0] < 0:
                raise Killed
            return call(*arguments, **named)

        return wrapped

    monkeypatch.setattr(os, "fsync", deadly(os.fsync))
    monkeypatch.setattr(Path, "rename", deadly(Path.rename))
    monkeypatch.setattr(Path, "replace", deadly(Path.replace))
    monkeypatch.setattr(checkpoint, "save_file", deadly(checkpoint.save_file))
    return calls


def test_a_save_killed_anywhere_leaves_a_whole_checkpoint(tmp_path: Path, killer: list[float]):
    seen, parts = set(), trained()
    for survived in range(100):
        run = tmp_path / str(survived)
        killer[0] = math.inf
        checkpoint.save(run, 1, *parts, {})
        checkpoint.point(run, "best", run / "step-000001")
        killer[0] = survived
        try:
            checkpoint.save(run, 2, *parts, {})
            checkpoint.point(run, "best", run / "step-000002")
            done = True
        except Killed:
            done = False
        killer[0] = math.inf
        for name in ("latest", "best"):
            verify(checkpoint.find(run, name))
        seen.add((checkpoint.find(run, "latest").name, checkpoint.find(run, "best").name))
        checkpoint.save(run, 2, *parts, {})  # what a resume does
        checkpoint.prune(run)
        assert not [path for path in run.iterdir() if path.is_dir() and path.name.startswith(".tmp-")]
        if done:
            break
    assert done
    one, two = "step-000001", "step-000002"
    assert seen == {(one, one), (two, one), (two, two)}


def test_files_are_on_the_disk_before_they_are_renamed_and_the_rename_before_latest(tmp_path: Path, monkeypatch):
    synced, seen, rename, replace = set(), [], Path.rename, Path.replace

    def watched_rename(self: Path, target: Path):
        assert {path.stat().st_ino for path in [self, *self.iterdir()]} <= synced
        synced.discard(tmp_path.stat().st_ino)
        seen.append(target.name)
        return rename(self, target)

    def watched_replace(self: Path, target: Path):
        if target.name == "latest":
            assert {self.stat().st_ino, tmp_path.stat().st_ino} <= synced
            seen.append(target.name)
        return replace(self, target)

    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: synced.add(os.fstat(file).st_ino) or fsync(file))
    monkeypatch.setattr(Path, "rename", watched_rename)
    monkeypatch.setattr(Path, "replace", watched_replace)
    checkpoint.save(tmp_path, 1, *trained(), {})
    assert seen == ["step-000001", "latest"]


def test_only_the_steps_that_are_named_are_kept_and_foreign_folders(tmp_path: Path):
    parts = trained()
    foreign = ["step-000001-backup", "step-by-step", "mine"]
    for name in foreign:
        (tmp_path / name).mkdir()
    for step in (1, 2, 3):
        folder = checkpoint.save(tmp_path, step, *parts, {})
        if step == 1:
            checkpoint.point(tmp_path, "best", folder)
    checkpoint.prune(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == sorted(
        ["step-000001", "step-000003", *foreign]
    )
    assert (tmp_path / "latest").read_text() == "step-000003\n"
    assert (tmp_path / "best").read_text() == "step-000001\n"


def test_steps_are_found_by_name_and_unknown_ones_listed(step_dir: Path):
    run = step_dir.parent
    assert checkpoint.find(run, "latest") == checkpoint.find(run, "step-000002") == step_dir
    assert checkpoint.find(run, "best") == step_dir  # not evaluated yet
    with pytest.raises(UsageError, match=r"--checkpoint 'step-000007'.*latest, best, step-000002"):
        checkpoint.find(run, "step-000007")


@pytest.mark.parametrize("content", ["", "\n", "step-000009\n", "..\n", ".", "\0", "/etc"])
def test_a_pointer_to_nothing_is_corrupt(step_dir: Path, content: str):
    (step_dir.parent / "latest").write_text(content)
    with pytest.raises(CorruptCheckpoint):
        verify(checkpoint.find(step_dir.parent, "latest"))


def test_only_the_named_files_are_checked(step_dir: Path):
    (step_dir / OPTIMIZER).write_bytes(b"")
    verify(step_dir, (MODEL, STATE))
    damaged(step_dir, OPTIMIZER)
    with pytest.raises(CorruptCheckpoint, match=OPTIMIZER):
        verify(step_dir, (OPTIMIZER,))


def test_a_checkpoint_knows_its_vocabulary(tmp_path: Path):
    ours, theirs = CharTokenizer("abc"), CharTokenizer("abd")
    folder = checkpoint.save(tmp_path, 1, *trained(), {"vocabulary": ours.sha256()})
    checkpoint.check_vocabulary(folder, ours)
    with pytest.raises(CorruptCheckpoint, match=r"another vocabulary than .*tokenizer\.json"):
        checkpoint.check_vocabulary(folder, theirs)


def test_what_was_loaded_is_no_map_of_the_file(step_dir: Path):
    model, optimizer = trained()
    other, others = trained(steps=1, seed=9)
    other.load_weights(checkpoint.load_weights(step_dir))
    checkpoint.load_optimizer(step_dir, other, others)
    for name in (MODEL, OPTIMIZER):
        with (step_dir / name).open("r+b") as file:
            file.write(bytes((step_dir / name).stat().st_size))
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        assert all(torch.equal(value, others.state[theirs][kind]) for kind, value in optimizer.state[mine].items())
