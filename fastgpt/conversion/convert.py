"""Converts a model: opens it, writes it in another format, proves that it computes the same, and names it.

The result is written in a hidden folder beside its place, synced, verified there, and renamed. So there is either the
whole result or nothing.
"""

from pathlib import Path

from fastgpt.checkpoint.source import open_model
from fastgpt.config.conversion import ConvertConfig
from fastgpt.conversion import formats, proof
from fastgpt.conversion.formats import FORMATS, Format
from fastgpt.errors import UsageError
from fastgpt.model.facts import count_parameters
from fastgpt.system import files
from fastgpt.system.scratch_folder import scratch_folder
from fastgpt.system.units import counted

# The names of what conversions write: a folder that holds others is never replaced.
OURS = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "README.md", "ckpt.pt",
    "meta.pkl", "model*.safetensors", "model.safetensors.index.json", "latest", "best", "step-*",
)  # fmt: skip


def convert(config: ConvertConfig) -> None:
    """Convert as the settings say, and print to stdout what was written and how it compares.

    Raises:
        UsageError: the model cannot be opened, the format cannot hold it, or the target is taken or not writable.
        RunFailed: the other program computes something else from the result, which is deleted.
    """
    form, target = FORMATS[config.format or ""], Path(config.dst or "")
    _check_target(config, form, target)
    proof.check_peer(config)
    original = open_model(config.src or "", checkpoint=config.checkpoint, download=config.download, setting="src")
    if target.exists() and target.resolve() in (original.path.resolve(), original.file.resolve()):
        raise UsageError(f"`dst` {target} is the model itself; name another")
    source = formats.check(config.format or "", original, config.approximate)
    try:
        with scratch_folder(target.absolute()) as scratch:
            form.write(source, scratch, target.absolute(), config.dtype)
            for file in scratch.rglob("*"):
                files.sync(file)
            said = proof.prove(config, source, scratch / target.name if form.is_file else scratch)
            _publish(scratch, target.absolute(), form)
    except OSError as error:
        raise UsageError(f"`dst` {target} cannot be written: {error.strerror or error}; name another") from None
    parameters = counted(count_parameters(source.config), "parameter")
    print(f"wrote {target}: {parameters}, {config.dtype}, {source.required_tokenizer().kind} vocabulary")
    if source is not original:
        print(f"approximated: {proof.approximation(original, source)}")
    print(said)


def _check_target(config: ConvertConfig, form: Format, target: Path) -> None:
    """Raise `UsageError` if the target is taken, or is no name for the format."""
    if form.is_file != (target.suffix == ".gguf"):
        wanted = "a file, whose name ends in .gguf" if form.is_file else "a folder"
        raise UsageError(f"`dst` {target}: `format` {config.format} is {wanted}")
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
