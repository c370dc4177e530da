"""The least memory that a model needs, known from its configuration before anything is allocated.

These are lower bounds: a configuration that is refused could not run, and one that passes may still run out of memory.
"""

import torch

from fastgpt.config.model import ModelConfig
from fastgpt.config.training import TrainConfig
from fastgpt.errors import UsageError
from fastgpt.model.facts import count_parameters, position_table_bytes
from fastgpt.model.moments import count_moments
from fastgpt.system.device import free_memory
from fastgpt.system.units import counted

FLOAT32 = 4  # bytes
TOKEN = 8  # bytes: int64
CPU = torch.device("cpu")


def check_training(config: TrainConfig, device: torch.device) -> None:
    """Raise `UsageError` for a run that cannot fit; the size of its vocabulary must be known.

    On the device: the parameters with their gradients and moments, and the tokens of a micro-batch with their targets.
    What layers keep for their gradients does not count, as a micro-batch that does not fit is split. On the host: where
    each sequence of a step begins, which the loader draws at once.
    """
    L, C, T, B = config.n_layer, config.n_embd, config.block_size, config.batch_size
    count = count_parameters(config)
    values = 2 * count + count_moments(config, count)  # weights, gradients, moments
    model = FLOAT32 * values + position_table_bytes(config)
    _check(
        model,
        device,
        f"`n_layer` {L}, `n_embd` {C} and `block_size` {T} make {counted(count, 'parameter')}, which take",
    )
    _check(model + B * T * 2 * TOKEN, device, f"`batch_size` {B} with `block_size` {T} takes, with the model,")
    steps = config.gradient_accumulation_steps
    _check(B * steps * TOKEN, CPU, f"`gradient_accumulation_steps` {steps} with `batch_size` {B} takes")


def lacking(where: str, config: ModelConfig, message: str | None) -> str:
    """The message of a run that has no memory left: where, what a smaller one would have less of, what was raised."""
    reason = next((line for line in (message or "").splitlines() if line.strip()), "")
    return (
        f"out of memory {where}; lower `block_size` {config.block_size}, `n_layer` {config.n_layer} or "
        f"`n_embd` {config.n_embd} in a new run, or free memory{f' ({reason:.120})' if reason else ''}"
    )


def check_position_table(config: ModelConfig, device: torch.device) -> None:
    """Raise `UsageError` for a context whose table of positions cannot fit: no weight tells that it is so long."""
    _check(position_table_bytes(config), device, f"`block_size` {config.block_size} takes")


def _check(need: int, device: torch.device, what: str) -> None:
    free = free_memory(device)
    if need > free:
        raise UsageError(f"{what} at least {_gib(need)} of memory, and {device} has {_gib(free)} free; pass less")


def _gib(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB"
