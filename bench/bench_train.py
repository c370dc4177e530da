"""A training step of `fastgpt.train`, its loader included, against other ways to train the same GPT on like batches.

Peers: a plain GPT in stock PyTorch, eager in float32, and on a GPU also as nanoGPT runs it (compiled, bfloat16, fused
AdamW); and transformers' GPT2LMHeadModel. All take one optimizer step a call, with float32 weights.
"""

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from bench.peers.training import Batch, PlainGPT, has_transformers, plain_optimizer, plain_step, transformers_gpt2
from fastgpt.config.training import PRESETS, TrainConfig
from fastgpt.data.loader import Loader
from fastgpt.model import workloads
from fastgpt.model.gpt import GPT
from fastgpt.ops import autotune, table
from fastgpt.system.device import peak_flops, resolve_dtype
from fastgpt.training.speed import flops_per_token
from fastgpt.training.step import TrainStep

ON_GPU = torch.cuda.is_available()
PLAIN, AS_NANOGPT, TRANSFORMERS = "plain eager float32", "plain compiled bfloat16", "transformers"
WITHOUT = "without log_stats"
LOSS_TOLERANCE = 0.02
VOCABULARY = 65  # tiny Shakespeare's characters, where the preset does not say

# Each preset keeps its own batch, on which the ratio depends. On two cores a round of baby takes half a minute, so
# there is one, with the plain GPT alone; for a spread, repeat the run.
CPU_ROUNDS = {"cpu": 8, "baby": 1}
# Training takes one step after another: of the small preset, each takes so many in its turn, so that what the others
# leave in the caches matters as little as it does there.
CPU_STEPS = {"cpu": 10, "baby": 1}
# On a GPU the next step is launched while the last still runs.
GPU_ROUNDS = {"cpu": 20, "baby": 15, "gpt2": 8, "gpt2-medium": 5}
GPU_STEPS = {"cpu": 10, "baby": 5, "gpt2": 3, "gpt2-medium": 2}

# preset, kernels, dtype, compile, dropout, ratio aimed at against the plain GPT
CPU_CASES = [
    ("cpu", "auto", "float32", False, 0.0, 1.0),
    ("cpu", "auto", "auto", False, 0.0, None),
    ("cpu", "auto", "auto", True, 0.0, 2.3),
    ("baby", "auto", "auto", False, 0.0, 2.4),
    ("baby", "auto", "auto", True, 0.0, 3.0),
]
GPU_CASES = [
    (preset, kernels, dtype, compiled, 0.0, None)
    for preset in GPU_ROUNDS
    for dtype in ("auto", "float32")
    for kernels in ("torch", "triton", "auto")
    for compiled in (False, True)
    if dtype == "auto" or not compiled
]


@pytest.mark.parametrize(
    ("preset", "kernels", "dtype", "compiled", "dropout", "aim"), GPU_CASES if ON_GPU else CPU_CASES
)
def test_training_step(
    against,
    benchmark,
    ceilings,
    device: torch.device,
    preset: str,
    kernels: str,
    dtype: str,
    compiled: bool,
    dropout: float,
    aim: float | None,
):
    config = configured(preset, kernels=kernels, dtype=dtype, compile=compiled, dropout=dropout)
    arithmetic = resolve_dtype(dtype, device)
    step = engine_step(config, device, arithmetic)
    began = time.perf_counter()
    call = calls(step, make_loader(config, device), config.batch_size)
    call().item()
    first = time.perf_counter() - began
    flops = flops_per_token(config, step.model.num_parameters()) * config.tokens_per_step
    against(
        call,
        make_peers(config, device, arithmetic, alone=not ON_GPU and preset == "baby"),
        rounds=(GPU_ROUNDS if ON_GPU else CPU_ROUNDS)[preset],
        in_a_row=(GPU_STEPS if ON_GPU else CPU_STEPS)[preset],
        units=config.tokens_per_step,
        flops=flops,
        arithmetic=arithmetic,
        aim=aim,
        aim_peer=PLAIN,
        batch=config.batch_size,
        arithmetic_used=str(arithmetic).removeprefix("torch."),
        backends=dict(step.model.ops.backends),
        parameters=step.model.num_parameters(),
        first_step_seconds=first,  # compiles
    )
    seconds = benchmark.stats.stats.median
    # Of the chip's data sheet, or where that says nothing of this machine's own matrix products.
    peak = peak_flops(device, arithmetic) or ceilings.matmul[str(arithmetic).removeprefix("torch.")]
    benchmark.extra_info |= {"ms_a_step": seconds * 1e3, "mfu": flops / seconds / peak}


@pytest.mark.parametrize("compiled", [False, True])
def test_log_stats(against, benchmark, device: torch.device, compiled: bool):
    """Training with `log_stats`, a measured step in ten and the reading of its record included, against without."""
    benchmark.group = "log_stats"
    config = configured("baby", compile=compiled, log_stats=True)
    arithmetic = resolve_dtype("auto", device)
    on = engine_step(config, device, arithmetic)
    off = engine_step(dataclasses.replace(config, log_stats=False), device, arithmetic, on.model.ops)
    measured = calls(on, make_loader(config, device), config.batch_size)

    def ours() -> None:
        measured()
        if on.statistics:
            on.statistics.read()

    peer = calls(off, make_loader(config, device), config.batch_size)
    against(
        ours,
        {WITHOUT: peer},
        rounds=GPU_ROUNDS["baby"] if ON_GPU else 4,  # of ten steps each
        in_a_row=config.log_interval,
        units=config.tokens_per_step,
        aim=0.97,
        log_interval=config.log_interval,
    )


def test_loss_at_equal_steps(against, benchmark, device: torch.device):
    """Compiled in 16 bits, training goes where the plain GPT in float32 goes, from the same weights and batches."""
    preset, steps = ("baby", 500) if ON_GPU else ("cpu", 100)
    config = configured(preset, compile=True, dropout=0.0, schedule="constant", warmup_iters=0)
    arithmetic = resolve_dtype("auto", device)
    step = engine_step(config, device, arithmetic)
    plain = make_plain(config, device)
    plain.load(step.model.weights())
    loader = make_loader(config, device)
    ours, losses = remembering(calls(step, loader, config.batch_size))
    peer, plain_losses = remembering(make_plain_step(plain, config, device))
    against(ours, {PLAIN: peer}, rounds=steps - len(losses), units=config.tokens_per_step, steps=steps)
    ends = [statistics.mean(loss.item() for loss in taken[-10:]) for taken in (losses, plain_losses)]
    gaps = [abs(a.item() - b.item()) for a, b in zip(losses, plain_losses, strict=True)]
    benchmark.extra_info |= {"loss": ends[0], "plain_loss": ends[1], "loss_tolerance": LOSS_TOLERANCE}
    benchmark.extra_info["largest_gap_of_a_step"] = max(gaps)
    assert len(losses) == len(plain_losses)
    assert ends[1] < losses[0].item() - 1, "the plain GPT has not learned, so that equal losses say nothing"
    assert abs(ends[0] - ends[1]) <= LOSS_TOLERANCE


def configured(preset: str, **settings: Any) -> TrainConfig:
    """The preset with one micro-batch a step."""
    config = PRESETS[preset]
    sizes = {"gradient_accumulation_steps": 1, "vocab_size": config.vocab_size or VOCABULARY}
    return dataclasses.replace(config, **(sizes | settings))


def engine_step(
    config: TrainConfig, device: torch.device, arithmetic: torch.dtype, ops: table.Ops | None = None
) -> TrainStep:
    """The model and its step, as `fastgpt.train` puts them together, with its own choice of `ops`."""
    planned = workloads.training(config, arithmetic)
    ops = ops or table.resolve(config.kernels, device, choose=autotune.chooser(planned))
    torch.manual_seed(config.seed)
    with device:
        model = GPT(config, ops)
    return TrainStep(model, config, device, arithmetic)


def make_loader(config: TrainConfig, device: torch.device) -> Loader:
    """Over tokens that can be learned: three in four are followed by the one that always follows them."""
    V, random = config.vocab_size or 0, np.random.default_rng(0)
    follows, given = random.permutation(V), random.integers(V, size=200_000)
    leaps = random.random(len(given)) < 0.25
    tokens = np.empty(len(given), np.uint16)
    token = 0
    for i, leap in enumerate(leaps):
        token = given[i] if leap else follows[token]
        tokens[i] = token
    return Loader(tokens, config.block_size, V, seed=config.seed, device=device, name="the chain")


def batches(loader: Loader, batch_size: int) -> Iterator[Batch]:
    return (loader.batch(number, 0, 1, batch_size) for number in itertools.count())


def calls(step: TrainStep, loader: Loader, batch_size: int) -> Callable[[], torch.Tensor]:
    """One step of the engine a call; returns its loss."""
    numbers = itertools.count()

    def call() -> torch.Tensor:
        number = next(numbers)
        return step(number, [loader.batch(number, 0, 1, batch_size)])[0]

    return call


def remembering(call: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], list[torch.Tensor]]:
    """The same call, and the list of what it has returned."""
    returned: list[torch.Tensor] = []
    return lambda: returned.append(call()), returned


def make_peers(
    config: TrainConfig, device: torch.device, arithmetic: torch.dtype, *, alone: bool
) -> dict[str, Callable[[], torch.Tensor]]:
    """Every peer that can run here, or the plain GPT alone."""
    peers = {PLAIN: make_plain_step(make_plain(config, device), config, device)}
    if ON_GPU:
        peers[AS_NANOGPT] = make_plain_step(make_plain(config, device), config, device, torch.bfloat16)
    if has_transformers() and not alone:
        autocast = arithmetic if arithmetic != torch.float32 and ON_GPU else None
        name = f"{TRANSFORMERS} eager {str(autocast or torch.float32).removeprefix('torch.')}"
        peers[name] = make_transformers_step(config, device, autocast)
    return peers


def make_plain(config: TrainConfig, device: torch.device) -> PlainGPT:
    torch.manual_seed(config.seed)
    return PlainGPT(*shape(config), config.dropout).to(device)


def make_plain_step(
    model: PlainGPT, config: TrainConfig, device: torch.device, arithmetic: torch.dtype | None = None
) -> Callable[[], torch.Tensor]:
    """Eager in float32, or with an arithmetic as nanoGPT runs on a GPU: compiled, with autocast and fused AdamW."""
    tuned = arithmetic is not None
    optimizer = plain_optimizer(
        model, config.learning_rate, (config.beta1, config.beta2), fused=True if tuned else None
    )
    forward = torch.compile(model) if tuned else model
    return plain_step(
        model, forward, optimizer, batches(make_loader(config, device), config.batch_size), autocast=arithmetic
    )


def make_transformers_step(
    config: TrainConfig, device: torch.device, arithmetic: torch.dtype | None
) -> Callable[[], torch.Tensor]:
    model = transformers_gpt2(*shape(config), config.dropout).to(device)
    optimizer = plain_optimizer(
        model, config.learning_rate, (config.beta1, config.beta2), fused=True if ON_GPU else None
    )

    def loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return model(x, labels=x).loss

    return plain_step(
        model, loss, optimizer, batches(make_loader(config, device), config.batch_size), autocast=arithmetic
    )


def shape(config: TrainConfig) -> tuple[int, int, int, int, int]:
    """V, T, L, H, C."""
    return config.vocab_size or 0, config.block_size, config.n_layer, config.n_head, config.n_embd
