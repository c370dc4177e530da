"""Every operation of the table, in every backend, at the shapes of GPT-2: forward and backward apart.

The cases stand in `kernel_cases`, the peers in `kernel_peers`, the counts behind each limit in `counts`. Each case goes
round several buffers of fresh random numbers, and each peer's result is compared with ours before it is timed.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._functorch import config as functorch

from bench.peers.kernels import Contender, backend, contenders, distance, prepared
from bench.tools.kernel_cases import BATCHES, CONTEXTS, Case, backends, cases, inputs
from bench.tools.timing import Clock, buffers_needed, rotating
from fastgpt.ops import table
from fastgpt.ops.counts import count
from fastgpt.system.device import resolve_device

CASES = {case.key: case for case in cases(resolve_device("auto"))}
MOST_ROUNDS, FEWEST_ROUNDS = {"cuda": 30, "cpu": 15}, 5
SECONDS = 0.6  # of a case's rounds, if there are more than the fewest
APART = {"float32": 1e-3, "bfloat16": 0.05, "float16": 0.05}  # how far results may lie apart, in norm
LARGE = 64 << 20  # bytes of keys and values from which on the memory alone should be the limit
CHUNKS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Each case compiles for itself, keeps its graph for several backward passes, and gives its memory back."""
    torch.manual_seed(0)
    torch.compiler.reset()
    with functorch.patch(donated_buffer=False):  # or a compiled backward pass could run only once
        yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@pytest.mark.parametrize("key", CASES)
def test_kernel(against, benchmark, device: torch.device, key: str):
    case = CASES[key]
    peers, left_out = contenders(case, device, backends(case.op, device)[0])
    time_case(against, benchmark, device, case, peers, left_out)


def time_case(
    against: Callable[..., Any],
    benchmark: Any,
    device: torch.device,
    case: Case,
    peers: dict[str, Contender],
    left_out: dict[str, str],
) -> None:
    """Time a case against its peers, those that do not run or compute something else aside."""
    benchmark.group = f"{case.op} {case.direction}"
    counted = count(case.op, case.direction, case.shape, getattr(torch, case.dtype).itemsize)
    buffers = [inputs(case, device) for _ in range(buffers_needed(int(counted.bytes), device))]
    with torch.set_grad_enabled(case.direction != "forward"):
        ours = backend(case.op, case.backend)
        fit, apart = agreeing(ours, peers, case, buffers[0], left_out)
        # Nobody is to find in the cache what another has just read.
        apart_by = max(1, len(buffers) // (1 + len(fit)))
        call = calls(ours, case, buffers, 0)
        against(
            call,
            {name: calls(peer, case, buffers, (i + 1) * apart_by) for i, (name, peer) in enumerate(fit.items())},
            rounds=rounds_within(SECONDS, call, 1 + len(fit), device),
            units=case.shape.get("N") or case.shape["B"] * case.shape.get("T", 1),
            flops=counted.flops,
            bytes=counted.bytes,
            arithmetic=case.dtype,
            launching=False,
            op=case.op,
            direction=case.direction,
            backend=case.backend,
            shape=dict(case.shape),
            dtype=case.dtype,
            buffers=len(buffers),
            left_out=left_out,
            apart=apart,
        )


def calls(contender: Contender, case: Case, buffers: list[tuple[torch.Tensor, ...]], start: int) -> Callable[[], Any]:
    """A call that goes round the buffers."""
    return rotating([prepared(contender, args, case.direction) for args in buffers], start % len(buffers))


def rounds_within(seconds: float, call: Callable[[], Any], contenders: int, device: torch.device) -> int:
    """The rounds in which all contenders can be timed in so many seconds, if each takes as long as this call."""
    call()  # warm up
    once = Clock(device).wall(call) * contenders
    return max(FEWEST_ROUNDS, min(MOST_ROUNDS[device.type], int(seconds / once)))


def agreeing(
    ours: Contender,
    peers: dict[str, Contender],
    case: Case,
    args: tuple[torch.Tensor, ...],
    left_out: dict[str, str],
) -> tuple[dict[str, Contender], dict[str, float]]:
    """The peers that run here, each having computed what ours does, and how far their results lie apart.

    Those that do not run are noted in `left_out` with what they raised.
    """
    result = prepared(ours, args, case.direction)()
    fit, apart = {}, {}
    for name, peer in peers.items():
        try:
            theirs = prepared(peer, args, case.direction)()
        except Exception as error:  # others' code may raise anything; it is noted, and nothing stands in for it
            left_out[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
            continue
        apart[name] = distance(result, theirs)
        dtype = "bfloat16" if "bfloat16" in name else case.dtype
        assert apart[name] <= APART[dtype], f"{name} computes something else than {case.op}: {apart[name]:.3g} apart"
        fit[name] = peer
    return fit, apart


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("B", BATCHES)
def test_decode_split(against, benchmark, device: torch.device, B: int, context: int):
    """The split that the decode kernel chooses, against every other one: at least 1 / 1.15 of the best."""
    benchmark.group = "paged_attention split"
    shape = {"B": B, "context": context, "H": 12, "D": 64, "shuffled": 1}
    case = Case("paged_attention", "forward", "triton", shape, "bfloat16", 2)
    counted = count(case.op, case.direction, shape, 2)
    buffers = [inputs(case, device) for _ in range(buffers_needed(int(counted.bytes), device))]
    table.implementation("paged_attention", "triton")  # registers the op

    def split(chunk: int) -> Callable[[], Any]:
        """By the keys of a piece; 0 lets the kernel choose."""
        decode, scale = torch.ops.fastgpt.paged_decode, shape["D"] ** -0.5
        return rotating([lambda args=args: decode(*args, scale, chunk) for args in buffers])

    against(
        split(0),
        {f"pieces of {chunk}": split(chunk) for chunk in CHUNKS if chunk <= context},
        rounds=MOST_ROUNDS["cuda"],
        units=B,
        flops=counted.flops,
        bytes=counted.bytes,
        arithmetic=torch.bfloat16,
        aim=1 / 1.15,
        launching=False,
        shape=shape,
        aim_percent_of_limit=85 if counted.bytes >= LARGE else None,
    )
