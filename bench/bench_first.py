"""Answers the first questions about a new GPU in some three minutes, for GPT-2's shape in bfloat16.

In this order: whether the kernels run and agree with the reference; how fast attention is, against itself with its
loops in the other order and against PyTorch's own kernels; a training step, and decoding, against PyTorch's backend.
bench/survey.py begins with it.
"""

from collections.abc import Callable

import pytest
import torch
from torch.nn.attention import SDPBackend

from bench.bench_kernels import time_case
from bench.bench_train import calls, configured, engine_step, make_loader
from bench.peers import loop_order
from bench.peers.kernels import Contender, as_contender, backend, sdpa
from bench.tools.generation import engine_facts, generator_of, random_tokens, untrained, work
from bench.tools.kernel_cases import Case
from fastgpt.config.generation import SamplingParams
from fastgpt.config.training import PRESETS
from fastgpt.model import workloads
from fastgpt.model.facts import count_parameters
from fastgpt.ops import table
from fastgpt.ops.autotune import checker
from fastgpt.training.speed import flops_per_token

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

GPT2, DTYPE = PRESETS["gpt2"], torch.bfloat16
TRAINING = workloads.training(GPT2, DTYPE)
GENERATING = workloads.generation(GPT2, DTYPE, 8, int8=True)
ATTENTION = {"B": 16, "T": 1024, "H": 12, "D": 64}
PROMPT, NEW_TOKENS = 128, 128
KV_MEMORY = 4 << 30  # of each engine, or the first would take most of the GPU


@pytest.mark.parametrize("op", table.TABLE)
def test_runs(benchmark, device: torch.device, op: str):
    """Forward, and backward where there is one, against the reference; the time is of compiling and checking."""
    problem = checker(op, TRAINING if op in TRAINING.ops else GENERATING, device)
    found: list[str] = []
    benchmark.pedantic(lambda: found.append(problem(table.implementation(op, "triton"))), rounds=1)
    assert found == [""], found[0]


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_attention(against, benchmark, device: torch.device, direction: str):
    case = Case("causal_attention", direction, "triton", ATTENTION, "bfloat16", 0)
    peers: dict[str, Contender] = {
        "torch backend": backend(case.op, "torch"),
        "SDPA flash": sdpa(SDPBackend.FLASH_ATTENTION),
        "SDPA cuDNN": sdpa(SDPBackend.CUDNN_ATTENTION),
    }
    left_out: dict[str, str] = {}
    try:
        peers["diagonal last"] = as_contender(loop_order.diagonal_last())
    except RuntimeError as error:
        left_out["diagonal last"] = str(error)
    benchmark.extra_info["sdpa_takes"] = sdpa_backend(device)
    benchmark.extra_info["cudnn"] = torch.backends.cudnn.version()
    time_case(against, benchmark, device, case, peers, left_out)


def sdpa_backend(device: torch.device) -> str:
    """The kernel that PyTorch's attention chooses by itself."""
    B, T, H, D = ATTENTION.values()
    q = torch.empty(B, T, H, D, dtype=DTYPE, device=device, requires_grad=True).transpose(1, 2)
    return SDPBackend(torch._fused_sdp_choice(q, q, q, is_causal=True)).name  # pyright: ignore[reportPrivateImportUsage]


@pytest.mark.parametrize("sequences", [12, 48])
def test_training_step(against, benchmark, device: torch.device, sequences: int):
    """Not compiled: that takes a minute, and bench_train has it."""

    def step(kernels: str) -> Callable[[], torch.Tensor]:
        config = configured("gpt2", kernels=kernels, dtype="bfloat16", dropout=0.0, batch_size=sequences)
        return calls(engine_step(config, device, DTYPE), make_loader(config, device), sequences)

    config = configured("gpt2", batch_size=sequences)
    against(
        step("triton"),
        {"torch backend": step("torch")},
        rounds=5,
        in_a_row=3,
        units=config.tokens_per_step,
        flops=flops_per_token(config, count_parameters(config)) * config.tokens_per_step,
        arithmetic=DTYPE,
    )
    benchmark.extra_info["ms_a_step"] = benchmark.stats.stats.median * 1e3


@pytest.mark.parametrize("sequences", [1, 64])
def test_decode(against, benchmark, device: torch.device, sequences: int):
    model, lengths = untrained("gpt2", device), [PROMPT] * sequences
    prompts = [random_tokens(length, seed, GPT2.vocab_size or 0) for seed, length in enumerate(lengths)]
    params = SamplingParams(max_new_tokens=NEW_TOKENS, temperature=0.0)
    engines = {
        kernels: generator_of(model, DTYPE, kernels=kernels, batch=sequences).engine(
            max_batch=sequences, prefix_cache=False, kv_memory=KV_MEMORY
        )
        for kernels in ("triton", "torch")
    }
    against(
        lambda: engines["triton"].generate(prompts, params),
        {"torch backend": lambda: engines["torch"].generate(prompts, params)},
        rounds=3,
        units=sequences * NEW_TOKENS,
        arithmetic=DTYPE,
        **work(model, DTYPE, lengths, NEW_TOKENS),
    )
    benchmark.extra_info |= engine_facts(engines["triton"])
