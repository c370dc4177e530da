"""Models by their names on Hugging Face's hub: found in the user's cache, and one line where they are not."""

import builtins
from pathlib import Path

import pytest
import torch

from fastgpt import cli, convert, generate, train
from fastgpt.checkpoint.source import open_model
from fastgpt.errors import UsageError
from tests.helpers.gpt2_folders import folder_of

HASH = "607a30d783dfa663caf39e06633721c8d4cfcd7e"


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch) -> Path:
    """The cache of huggingface_hub, with the model gpt2 and, without its weights, someone/half."""
    constants = pytest.importorskip("huggingface_hub.constants", reason="needs the extra hf")
    folder = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    for name in ("gpt2", "someone--half"):
        model = folder / f"models--{name}"
        (model / "refs").mkdir(parents=True)
        (model / "refs" / "main").write_text(HASH)
        snapshot, blobs = model / "snapshots" / HASH, model / "blobs"
        folder_of(snapshot)
        blobs.mkdir()
        for number, file in enumerate(sorted(snapshot.iterdir())):  # links to blobs, as the library keeps them
            file.rename(blobs / str(number))
            file.symlink_to(Path("../../blobs") / str(number))
    (folder / "models--someone--half" / "snapshots" / HASH / "model.safetensors").unlink()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return folder


def said(capsys, main, *argv: str) -> str:
    """The one line with which a command refuses; nothing is written."""
    capsys.readouterr()
    assert cli.run(main, argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    *before, error = err.splitlines()
    assert not before
    assert list(Path.cwd().iterdir()) == []
    return error


def test_a_model_in_the_cache_is_opened_by_its_name(hub_cache: Path, tmp_path: Path):
    model = folder_of(tmp_path / "same")
    source = open_model("gpt2")
    assert source.path == hub_cache / "models--gpt2" / "snapshots" / HASH
    assert source.format == "huggingface"
    assert all(torch.equal(source.tensors[name], tensor) for name, tensor in model.weights().items())


def test_a_folder_of_that_name_comes_first(hub_cache: Path):
    folder_of(Path("gpt2"), n_layer=1)
    assert open_model("gpt2").shape.n_layer == 1
    assert open_model(str(Path("gpt2").absolute())).path == Path("gpt2").absolute()


def test_a_path_is_no_name(hub_cache: Path):
    with pytest.raises(UsageError, match="gpt2 holds no run"):
        open_model(Path("gpt2"))
    with pytest.raises(UsageError, match="some/folder/gpt2 holds no run"):
        open_model("some/folder/gpt2")


@pytest.mark.parametrize(
    ("main", "flags", "setting"),
    [
        (generate.main, ("--model", "someone/gpt9"), "--model"),
        (convert.main, ("someone/gpt9", "new", "--format", "huggingface"), "--src"),
        (train.main, ("--init_from", "someone/gpt9", "--device", "cpu"), "--init_from"),
    ],
)
def test_what_is_not_there_is_one_line_that_names_the_cache(hub_cache: Path, capsys, main, flags, setting: str):
    assert said(capsys, main, *flags) == (
        f"error: {setting} someone/gpt9 is no file or folder here, and {hub_cache} has no such model in safetensors; "
        "fetch it with --download, or name a path"
    )


def test_a_download_without_a_network_is_one_line(hub_cache: Path, capsys, monkeypatch):
    error = said(capsys, generate.main, "--model", "someone/gpt9", "--download")
    assert error.startswith(f"error: --model someone/gpt9 cannot be downloaded to {hub_cache}: ")
    assert error.endswith("; download it elsewhere and name its folder")


def test_a_half_of_a_model_is_named(hub_cache: Path, capsys):
    error = said(capsys, generate.main, "--model", "someone/half")
    assert f"{hub_cache} has no such model in safetensors; fetch it with --download" in error


def test_only_settings_weights_and_vocabularies_are_fetched(hub_cache: Path, tmp_path: Path, monkeypatch):
    """No code, no pickle, and of what the library may do, a download only where it was asked for."""
    import huggingface_hub

    calls = []
    here = folder_of(tmp_path / "fetched")
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **named: calls.append((name, named)) or tmp_path / "fetched"
    )
    assert open_model("someone/gpt9", download=True).shape.n_embd == here.config.n_embd
    open_model("gpt2")
    assert [(name, named["local_files_only"]) for name, named in calls] == [("someone/gpt9", False), ("gpt2", True)]
    assert all(pattern.endswith((".json", ".safetensors", "merges.txt")) for pattern in calls[0][1]["allow_patterns"])


@pytest.mark.parametrize(
    "text",
    ["a..b", "a--b", "-x", ".hidden", "a/b/c", "a b", "gpt2/", "a" * 97, "a" * 5000, "a\0b", "ä", "b/" + "a" * 300],
)
def test_what_is_no_name_is_one_line_all_the_same(hub_cache: Path, text: str):
    with pytest.raises(UsageError) as error:
        open_model(text)
    assert "\n" not in str(error.value)


def test_without_the_library_the_extra_is_named(capsys, tmp_path: Path, monkeypatch):
    load = builtins.__import__

    def refuse(name: str, *rest, **named):
        if name.startswith("huggingface_hub"):
            raise ImportError(name)
        return load(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", refuse)
    monkeypatch.chdir(tmp_path)
    assert said(capsys, generate.main, "--model", "gpt2") == (
        "error: --model gpt2 is no file or folder here; to look for a model of that name in Hugging Face's cache, "
        "pip install 'fastgpt-engine[hf]'"
    )
