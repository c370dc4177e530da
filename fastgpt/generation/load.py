"""Loads a model, from any source, into a generator."""

import functools
from pathlib import Path

import torch

from fastgpt.checkpoint import run_folder, store
from fastgpt.checkpoint.source import Source, open_model
from fastgpt.config.fields import validate_fields
from fastgpt.config.generation import QUANTIZATION, GenerateConfig
from fastgpt.errors import UsageError
from fastgpt.generation.generator import TextGenerator
from fastgpt.model import memory, workloads
from fastgpt.model.gpt import GPT
from fastgpt.model.int8 import quantize_model
from fastgpt.ops import autotune, table
from fastgpt.system.device import resolve_device, resolve_weights_dtype

TIMED_TOKENS = 1 << 16  # of all contexts together; timing kernels at more would take too much memory


def load(
    source: str | Path = "out",
    *,
    checkpoint_name: str = "best",
    download: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    kernels: str = "auto",
    quantize: str = "none",
    batch: int = 1,
    compile: bool = False,
    threads: int | None = None,
    setting: str = "source",
) -> TextGenerator:
    """The generator of a model: of a run's best checkpoint unless told otherwise, or of another program's file.

    Args:
        source, download, setting: see `fastgpt.checkpoint.source.open_model`.
        checkpoint_name: of a run's folder: best, latest, or a step's folder name.
        quantize: "int8" keeps matrices in 8 bits; see `fastgpt.model.int8`.
        batch, compile: the number of continuations that will run at once, and whether the engine will compile. With
            `kernels` "auto", a GPU's fastest backends for that are chosen.
        threads: CPU threads that PyTorch uses from now on in the whole process; None leaves their number as it is.

    Raises:
        UsageError: no model there, one that is damaged or not supported, an unknown device, or no such number of
            threads.
    """
    if threads is not None:
        validate_fields(GenerateConfig, {"threads": threads})
        torch.set_num_threads(threads)
    if quantize not in QUANTIZATION:
        raise UsageError(f"`quantize` {quantize!r} is not one of {', '.join(QUANTIZATION)}")
    where = resolve_device(device)
    opened = open_model(source, checkpoint=checkpoint_name, download=download, setting=setting)
    resolve = functools.partial(table.resolve, kernels, where, recorded=_recorded(opened, where))
    weights_dtype = resolve_weights_dtype(dtype, where, interpreted=resolve().interpreted)
    tokenizer, config = opened.required_tokenizer(), opened.config
    memory.check_position_table(config, where)
    B = max(1, min(batch, TIMED_TOKENS // config.block_size))
    planned = workloads.generation(config, weights_dtype, B, int8=quantize == "int8", compile=compile)
    ops = resolve(choose=autotune.chooser(planned))
    with store.naming(opened.file):
        model = GPT.from_weights(config, ops, opened.weights(config), where, weights_dtype)
    if quantize == "int8":
        quantize_model(model)
    return TextGenerator(model, tokenizer, run_folder.packed(opened.about))


def _recorded(source: Source, where: torch.device) -> dict[str, str] | None:
    """The backends that a run recorded, if they were chosen by a flag on such a device.

    The fastest backends for training may not be the fastest for generation.
    """
    about = source.about
    named = about and about["config"].get("kernels", "auto") != "auto" and about.get("device") == where.type
    return about.get("columns") if named else None
