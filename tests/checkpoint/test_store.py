"""Checkpoints: whatever is altered is found and named, and a save that dies leaves the one before whole."""

import errno
import hashlib
import itertools
import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastgpt.checkpoint import store
from fastgpt.checkpoint.store import MANIFEST, MODEL, OPTIMIZER, STATE, capture, verify
from fastgpt.checkpoint.writer import BackgroundWriter, Writer
from fastgpt.config.training import TrainConfig
from fastgpt.errors import CorruptCheckpoint, UsageError
from fastgpt.model.gpt import GPT
from fastgpt.system import files, safetensors_file
from fastgpt.tokenizer.char import CharTokenizer
from fastgpt.training.optimizer import make_optimizer

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
    return store.save(tmp_path_factory.mktemp("run"), capture(2, *trained(), {"val_loss": 1.5, "best_step": 2}))


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
    other.load_weights(store.load_weights(saved))
    store.load_optimizer(saved, other, others)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        state, loaded = optimizer.state[mine], others.state[theirs]
        assert state.keys() == loaded.keys()
        assert all(torch.equal(state[kind], loaded[kind]) for kind in state)
        assert all(state[kind].dtype == loaded[kind].dtype for kind in state)
    assert store.load_state(saved) == {"format": 1, "step": 2, "val_loss": 1.5, "best_step": 2}


@pytest.mark.parametrize("flips", [50, pytest.param(250, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", FILES)
def test_flipped_bits_are_found(step_dir: Path, name: str, flips: int):
    path = step_dir / name
    content, draw = path.read_bytes(), random.Random(name)
    for _ in range(flips):
        place, bit = draw.randrange(len(content)), draw.randrange(8)
        flipped = bytearray(content)
        flipped[place] ^= 1 << bit
        path.write_bytes(flipped)
        with pytest.raises(CorruptCheckpoint):
            verify(step_dir)
        if name != MANIFEST:  # a digit of a digest accuses the file it belongs to
            damaged(step_dir, name)
    path.write_bytes(content)
    verify(step_dir)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("zeroed", [True, False])
def test_50_truncated_files_and_zeroed_tails_are_found(step_dir: Path, name: str, zeroed: bool):
    content, draw = (step_dir / name).read_bytes(), random.Random(name)
    longest = len(content.rstrip(b"\0")) - 1  # zeros in the place of zeros are no damage
    for kept in [0, longest, *(draw.randrange(longest) for _ in range(48))]:
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
        (step_dir / MANIFEST).write_text(json.dumps(changed, indent=1) + "\n")
        damaged(step_dir, STATE)


def test_swapped_files_are_found(step_dir: Path):
    (step_dir / MODEL).rename(step_dir / "other")
    (step_dir / OPTIMIZER).rename(step_dir / MODEL)
    (step_dir / "other").rename(step_dir / OPTIMIZER)
    damaged(step_dir, MODEL)


def test_another_steps_file_is_found(step_dir: Path, tmp_path: Path):
    other = store.save(tmp_path / "other", capture(2, *trained(seed=5), {"val_loss": 1.5, "best_step": 2}))
    assert (other / MODEL).stat().st_size == (step_dir / MODEL).stat().st_size
    shutil.copy(other / MODEL, step_dir / MODEL)
    damaged(step_dir, MODEL)


def test_weights_of_another_shape_are_named(saved: Path):
    with pytest.raises(CorruptCheckpoint, match=r"wte\.weight is \(11, 8\).*need \(12, 8\)"):
        GPT(TrainConfig(**(vars(CONFIG) | {"vocab_size": 12}))).load_weights(store.load_weights(saved))
    with pytest.raises(CorruptCheckpoint, match=r"h\.1\."):
        GPT(TrainConfig(**(vars(CONFIG) | {"n_layer": 2}))).load_weights(store.load_weights(saved))


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
    store.save(tmp_path, capture(1, *trained(), {}))
    assert seen == ["step-000001", "latest"]


def kept_steps(run: Path) -> list[int]:
    return [int(folder.name[5:]) for folder in store.folders(run)]


def test_the_last_ones_and_the_best_are_kept_and_foreign_folders(tmp_path: Path):
    parts = trained()
    foreign = ["step-000001-backup", "step-by-step", "mine", "step-0000009", "step-٠٠٠٠٠٩"]
    for name in foreign:
        (tmp_path / name).mkdir()
    for step in range(1, 7):
        store.save(tmp_path, capture(step, *parts, {}), best_step=2)
        store.prune(tmp_path, keep_last=3)
    assert kept_steps(tmp_path) == [2, 4, 5, 6]
    store.prune(tmp_path, keep_last=1)
    assert kept_steps(tmp_path) == [2, 6]
    assert all((tmp_path / name).is_dir() for name in foreign)
    assert (tmp_path / "latest").read_text() == "step-000006\n"
    assert (tmp_path / "best").read_text() == "step-000002\n"


def test_steps_that_keep_every_divides_stay_unless_they_are_beyond_latest(tmp_path: Path):
    parts = trained()
    for step in range(1, 9):
        store.save(tmp_path, capture(step, *parts, {}), best_step=5)
        store.prune(tmp_path, keep_last=2, keep_every=3)
    assert kept_steps(tmp_path) == [3, 5, 6, 7, 8]
    store.save(tmp_path, capture(4, *parts, {}), best_step=0)  # as after a rollback to step 3
    store.prune(tmp_path, keep_last=1, keep_every=3)
    assert kept_steps(tmp_path) == [3, 4]
    store.prune(tmp_path, keep_last=1)
    assert kept_steps(tmp_path) == [4]


def test_steps_of_a_time_that_was_undone_go_with_the_next_save(tmp_path: Path):
    parts = trained()
    for step in (1, 2, 3, 4):
        store.save(tmp_path, capture(step, *parts, {}), best_step=min(step, 3))
    store.save(tmp_path, capture(2, *parts, {}), best_step=3)  # as after a resume from step 1
    store.prune(tmp_path, keep_last=9)
    assert kept_steps(tmp_path) == [1, 2, 3]  # 3 is the best
    assert store.find(tmp_path, "latest").name == "step-000002"


@pytest.mark.parametrize("kind", [Writer, BackgroundWriter])
def test_nothing_old_goes_before_the_new_one_is_whole(tmp_path: Path, monkeypatch, kind: type[Writer]):
    parts, fsync = trained(), os.fsync
    for taken in itertools.count():
        run, calls = tmp_path / str(taken), itertools.count()
        for step in (1, 2, 3):  # of which 2 is neither the latest nor the best
            store.save(run, capture(step, *parts, {}), best_step=1)

        def full(file: int, taken: int = taken, calls: itertools.count = calls) -> None:
            if next(calls) == taken:
                raise OSError(errno.ENOSPC, "No space left on device")
            fsync(file)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            writer = kind(run, keep_last=1)
            writer.save(capture(4, *parts, {}), 4, lambda: None)
            outcome = writer.wait()
        verify(store.find(run, "latest"))
        verify(store.find(run, "best"))
        if outcome.error is None:
            break
        assert not outcome.saved
        assert kept_steps(run)[:3] == [1, 2, 3]
        assert not list(run.glob(".fastgpt-tmp-step*"))  # a full disk needs the room
    assert taken > 5
    assert kept_steps(run) == [4]


def test_a_snapshot_does_not_change_with_the_model(tmp_path: Path):
    model, optimizer = trained()
    memory: dict[str, torch.Tensor] = {}
    shared = capture(2, model, optimizer, {})
    copied = shared.copied(memory)
    before = {name: weight.clone() for name, weight in model.weights().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    folder = store.save(tmp_path, copied)
    assert all(torch.equal(weight, before[name]) for name, weight in store.load_weights(folder).items())
    addresses = {name: tensor.data_ptr() for name, tensor in memory.items()}
    again = capture(3, model, optimizer, {}).copied(memory)
    assert all(torch.equal(again.tensors[MODEL][name], weight) for name, weight in model.weights().items())
    assert {name: tensor.data_ptr() for name, tensor in memory.items()} == addresses


def test_a_checkpoint_in_the_folder_of_another_step_is_found(step_dir: Path):
    moved = step_dir.rename(step_dir.with_name("step-000009"))
    damaged(moved, STATE)


def test_the_library_reads_and_writes_the_same_tensors(tmp_path: Path):
    tensors = {
        "matrix": torch.randn(300, 1000),  # longer than what is joined
        "transposed": torch.randn(3, 4).T,
        "scalar": torch.tensor(2.5),
        "half": torch.randn(3).half(),
        "brain": torch.randn(5).bfloat16(),
        "empty": torch.empty(0, 4),
    }
    path = tmp_path / "tensors"
    identity = files.write(path, safetensors_file.parts(tensors))
    assert identity == {"size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    for name, tensor in load_file(path).items():
        assert torch.equal(tensor, tensors[name])
        assert tensor.dtype == tensors[name].dtype
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "theirs")
    theirs = safetensors_file.read(tmp_path / "theirs")
    assert theirs.keys() == tensors.keys()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in tensors.items())


def test_tensors_that_cannot_be_read_are_named_once(tmp_path: Path):
    path = tmp_path / "tensors"
    with pytest.raises(CorruptCheckpoint) as error:
        safetensors_file.read(path)
    assert str(error.value) == f"{path} cannot be read: No such file or directory"
    save_file({"a": torch.zeros(2)}, path)
    tensors = safetensors_file.read(path)
    path.unlink()
    with pytest.raises(CorruptCheckpoint) as error:
        tensors["a"]
    assert str(error.value) == f"{path} cannot be read: No such file or directory"


def test_steps_are_found_by_name_and_unknown_ones_listed(step_dir: Path):
    run = step_dir.parent
    assert store.find(run, "latest") == store.find(run, "step-000002") == step_dir
    assert store.find(run, "best") == step_dir  # not evaluated yet
    with pytest.raises(UsageError, match=r"`checkpoint` 'step-000007'.*latest, best, step-000002"):
        store.find(run, "step-000007")


@pytest.mark.parametrize("content", ["", "\n", "step-000009\n", "..\n", ".", "\0", "/etc"])
def test_a_pointer_to_nothing_is_corrupt(step_dir: Path, content: str):
    (step_dir.parent / "latest").write_text(content)
    with pytest.raises(CorruptCheckpoint):
        verify(store.find(step_dir.parent, "latest"))


def test_only_the_named_files_are_checked(step_dir: Path):
    (step_dir / OPTIMIZER).write_bytes(b"")
    verify(step_dir, (MODEL, STATE))
    damaged(step_dir, OPTIMIZER)
    with pytest.raises(CorruptCheckpoint, match=OPTIMIZER):
        verify(step_dir, (OPTIMIZER,))


def test_a_checkpoint_knows_its_vocabulary(tmp_path: Path):
    ours, theirs = CharTokenizer("abc"), CharTokenizer("abd")
    folder = store.save(tmp_path, capture(1, *trained(), {"vocabulary": ours.sha256()}))
    store.check_vocabulary(folder, ours)
    with pytest.raises(CorruptCheckpoint, match=r"another vocabulary than .*tokenizer\.json"):
        store.check_vocabulary(folder, theirs)


def test_what_was_loaded_is_no_map_of_the_file(step_dir: Path):
    model, optimizer = trained()
    other, others = trained(steps=1, seed=9)
    other.load_weights(store.load_weights(step_dir))
    store.load_optimizer(step_dir, other, others)
    for name in (MODEL, OPTIMIZER):
        with (step_dir / name).open("r+b") as file:
            file.write(bytes((step_dir / name).stat().st_size))
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        assert all(torch.equal(value, others.state[theirs][kind]) for kind, value in optimizer.state[mine].items())
