"""Converts a model: opens it, writes it in another format, proves that it computes the same, and names it.

The result is written in a hidden folder beside its place, synced, verified there, and renamed. So there is either the
whole result or nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from fastgpt.checkpoint.source import Source, open_model
from fastgpt.config.conversion import ConvertConfig
from fastgpt.config.sources import STEP_NAME
from fastgpt.conversion import formats, proof
from fastgpt.conversion.formats import FORMATS, Format
from fastgpt.errors import UsageError
from fastgpt.interchange.exported import DTYPES
from fastgpt.model.facts import count_parameters
from fastgpt.system import files
from fastgpt.system.scratch_folder import scratch_folder
from fastgpt.system.units import counted

# The names of what conversions write: a folder that holds others is never replaced.
OURS = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "README.md", "ckpt.pt",
    "meta.pkl", "model*.safetensors", "model.safetensors.index.json", "latest", "best", "step-*",
)  # fmt: skip

# The largest number of each dtype; q8_0 has a float16 scale for whole numbers up to 127.
LARGEST = {name: torch.finfo(dtype).max for name, dtype in DTYPES.items()} | {"q8_0": 127 * 65_504.0}


def convert(config: ConvertConfig) -> None:
    """Convert as the settings say, and print to stdout what was written and how it compares.

    Raises:
        UsageError: the model cannot be opened, the format cannot hold it, or the target is taken or not writable.
        RunFailed: the other program computes something else from the result, which is deleted.
    """
    form, target = FORMATS[config.format or ""], Path(config.dst or "")
    with _explained(target):
        files.recover(target.absolute().parent, target.name)
    _check_target(config, form, target)
    proof.check_peer(config)
    original = open_model(config.src or "", checkpoint=config.checkpoint, download=config.download, setting="src")
    for path in (original.path.resolve(), original.file.resolve()):
        if target.resolve() in (path, *path.parents):
            raise UsageError(f"`dst` {target} is, or holds, the model that is converted; name another")
    source = formats.check(config.format or "", original, config.approximate)
    _check_range(config.dtype, source)
    with _explained(target), scratch_folder(target.absolute()) as scratch:
        form.write(source, scratch, target.absolute(), config.dtype)
        for file in scratch.rglob("*"):
            files.sync(file)
        said = proof.prove(config, source, scratch / target.name if form.is_file else scratch)
        _publish(scratch, target.absolute(), form)
    parameters = counted(count_parameters(source.config), "parameter")
    print(f"wrote {target}: {parameters}, {config.dtype}, {source.required_tokenizer().kind} vocabulary")
    if source is not original:
        print(f"approximated: {proof.approximation(original, source)}")
    if said:
        print(said)


@contextmanager
def _explained(target: Path) -> Iterator[None]:
    """Turn the errors of writing into a `UsageError` that names the target."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"`dst` {target} cannot be written: {error.strerror or error}; name another") from None


def _check_range(dtype: str, source: Source) -> None:
    """Raise `UsageError` if a weight would become an infinity."""
    if dtype == "float32":
        return
    for name, tensor in source.weights(source.config).items():
        low, high = map(float, tensor.aminmax())
        if (largest := max(-low, high)) > LARGEST[dtype]:
            raise UsageError(
                f"`dtype` {dtype} holds numbers up to {LARGEST[dtype]:.6g}, and {name} has one of {largest:.6g}; use "
                "`dtype` float32"
            )


def _check_target(config: ConvertConfig, form: Format, target: Path) -> None:
    """Raise `UsageError` if the target is taken, or is no name for the format."""
    if form.is_file != (target.suffix == ".gguf"):
        wanted = "a file, whose name ends in .gguf" if form.is_file else "a folder"
        raise UsageError(f"`dst` {target}: `format` {config.format} is {wanted}")
    if STEP_NAME.fullmatch(target.name):
        raise UsageError(f"`dst` {target} has the name of a checkpoint of a run; name another")
    if not target.exists() and not target.is_symlink():
        return
    if not config.overwrite:
        raise UsageError(f"`dst` {target} exists; name another, or replace it with `overwrite=True`")
    if form.is_file != target.is_file() or target.is_symlink():
        raise UsageError(f"`dst` {target} exists and is no {'file' if form.is_file else 'folder'}; name another")
    for path in target.iterdir() if target.is_dir() else ():
        if not any(path.match(name) for name in OURS):
            raise UsageError(f"`dst` {target} holds {path.name}, which no conversion writes; name another")


def _publish(scratch: Path, target: Path, form: Format) -> None:
    """Rename the result, a folder or the only file in it, to the target."""
    if form.is_file:
        (scratch / target.name).replace(target)
        files.sync(target.parent)
    else:
        files.sync(scratch)
        files.replace_folder(scratch, target)
