"""Loads a trained run into a generator."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path

import torch

from fastgpt.checkpoint import run_folder, store
from fastgpt.config.fields import validate_fields
from fastgpt.config.generation import QUANTIZATION, GenerateConfig
from fastgpt.config.model import ModelConfig
from fastgpt.errors import CorruptCheckpoint, UsageError
from fastgpt.generation.generator import TextGenerator
from fastgpt.model import memory, workloads
from fastgpt.model.facts import count_parameters
from fastgpt.model.gpt import GPT
from fastgpt.model.int8 import quantize_model
from fastgpt.ops import autotune, table
from fastgpt.system.device import resolve_device, resolve_weights_dtype
from fastgpt.system.units import counted
from fastgpt.tokenizer import saved

TIMED_TOKENS = 1 << 16  # of all contexts together; timing kernels at more would take too much memory


def load(
    out_dir: str | Path = "out",
    *,
    checkpoint_name: str = "best",
    device: str = "auto",
    dtype: str = "auto",
    kernels: str = "auto",
    quantize: str = "none",
    batch: int = 1,
    compile: bool = False,
    threads: int | None = None,
) -> TextGenerator:
    """The generator of a trained run, from its best checkpoint unless told otherwise.

    Args:
        quantize: "int8" keeps matrices in 8 bits; see `fastgpt.model.int8`.
        batch, compile: the number of continuations that will run at once, and whether the engine will compile. With
            `kernels` "auto", a GPU's fastest backends for that are chosen.
        threads: CPU threads that PyTorch uses from now on in the whole process; None leaves their number as it is.

    Raises:
        UsageError: no run there, a corrupt checkpoint, an unknown device, or no such number of threads.
    """
    if threads is not None:
        validate_fields(GenerateConfig, {"threads": threads})
        torch.set_num_threads(threads)
    if quantize not in QUANTIZATION:
        raise UsageError(f"`quantize` {quantize!r} is not one of {', '.join(QUANTIZATION)}")
    out_dir, where = Path(out_dir), resolve_device(device)
    step_dir = store.find(out_dir, checkpoint_name)
    config, about = run_folder.load(out_dir)
    # The fastest backends for training may not be the fastest for generation, so only those that a flag named are kept.
    kept = about.get("columns") if config.kernels != "auto" and about.get("device") == where.type else None
    resolve = functools.partial(table.resolve, kernels, where, recorded=kept)
    weights_dtype = resolve_weights_dtype(dtype, where, interpreted=resolve().interpreted)
    vocabulary = saved.load(out_dir / "tokenizer.json")
    store.verify(step_dir, (store.MODEL, store.STATE))
    store.check_vocabulary(step_dir, vocabulary)
    config = dataclasses.replace(config, vocab_size=vocabulary.vocab_size)
    weights = store.load_weights(step_dir)
    _check_size(out_dir, step_dir, config, weights)
    memory.check_position_table(config, where)
    B = max(1, min(batch, TIMED_TOKENS // config.block_size))
    planned = workloads.generation(config, weights_dtype, B, int8=quantize == "int8", compile=compile)
    ops = resolve(choose=autotune.chooser(planned))
    with store.naming(step_dir / store.MODEL):
        model = GPT.from_weights(config, ops, weights, where, weights_dtype)
    if quantize == "int8":
        quantize_model(model)
    return TextGenerator(model, vocabulary)


def _check_size(out_dir: Path, step_dir: Path, config: ModelConfig, weights: Mapping[str, torch.Tensor]) -> None:
    """Raise `CorruptCheckpoint` if the configuration has another size than the weights; no model is built then."""
    described, held = count_parameters(config), sum(tensor.numel() for tensor in weights.values())
    if described != held:
        raise CorruptCheckpoint(
            f"{out_dir / 'config.json'} describes {counted(described, 'parameter')}, and "
            f"{step_dir / store.MODEL} holds {held:,}; put the run's own config.json back"
        )
