"""Peak memory against the context and against the vocabulary, and the allocation over one training step.

Peaks are of one forward and backward pass, beyond its inputs; of the loss, beyond the gradients too, which every
backend has to make. `extra_info` holds `T` or `V`, and `peak_bytes` by backend, and by peer where there is one.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.peers.kernels import Contender, backend, chunked, prepared
from bench.tools.allocation import draw_allocation, thinned
from bench.tools.kernel_cases import Case, backends, inputs
from fastgpt.config.training import PRESETS
from fastgpt.model.gpt import GPT
from fastgpt.ops import table
from fastgpt.system.device import autocast
from fastgpt.system.live_bytes import LiveBytes
from fastgpt.training.optimizer import make_optimizer

# Contexts and vocabularies double from one to the next; each is large enough for its own memory to be most of it.
CONTEXTS = {"cpu": (256, 512, 1024, 2048), "cuda": (1024, 2048, 4096, 8192, 16384)}
VOCABULARIES = {"cpu": (2048, 4096, 8192, 16384), "cuda": (16384, 32768, 65536, 131072)}
ATTENTION = {"cpu": {"B": 1, "H": 2, "D": 64}, "cuda": {"B": 1, "H": 4, "D": 64}}
LOSS = {"cpu": {"N": 512, "C": 64}, "cuda": {"N": 16384, "C": 768}}
DTYPES = {"cpu": "float32", "cuda": "bfloat16"}
LINEAR, QUADRATIC = 2.4, 3.4  # growth from one context to the next: below the first, above the second


def peak(contender: Contender, case: Case, device: torch.device) -> int:
    """Bytes of one forward and backward pass beyond its arguments; of the loss, beyond the gradients too."""
    args = inputs(case, device)
    call = prepared(contender, args, case.direction)
    if device.type == "cuda":
        call()  # a first call may allocate workspaces that stay
    with LiveBytes(device) as memory:
        before = memory.live
        call()
        most = memory.peak - before
    return most - (sum(t.nbytes for t in args if t.requires_grad) if case.op == "linear_cross_entropy" else 0)


def compare(
    against: Callable[..., Any],
    op: str,
    axis: str,
    shapes: list[dict[str, int]],
    device: torch.device,
    peers: Mapping[str, Contender],
) -> dict[str, list[int]]:
    """Record the peaks of every backend and peer along an axis, and time them at its end. Returns the peaks by name."""
    cases = [Case(op, "both", "torch", shape, DTYPES[device.type], tier=0) for shape in shapes]
    all_of_them = {name: backend(op, name) for name in backends(op, device)} | dict(peers)
    peaks = {name: [peak(one, case, device) for case in cases] for name, one in all_of_them.items()}
    args = inputs(cases[-1], device)
    calls = {name: prepared(one, args, "both") for name, one in all_of_them.items()}
    main, *others = peaks
    with torch.enable_grad():
        against(
            calls[main],
            {name if name in peers else f"{name} backend": calls[name] for name in others},
            rounds=3,
            units=shapes[-1].get("N") or shapes[-1]["T"],
            launching=False,
            peak_bytes=peaks,
            dtype=DTYPES[device.type],
            backend=main,
            **{axis: [shape[axis] for shape in shapes]},
        )
    return peaks


def test_attention_against_the_context(against, benchmark, device: torch.device):
    """Linear in T for the kernel and for PyTorch's own; the readable math holds T x T weights."""
    benchmark.group = "memory"
    shapes = [ATTENTION[device.type] | {"T": T} for T in CONTEXTS[device.type]]
    peaks = compare(against, "causal_attention", "T", shapes, device, {})
    growth = {name: sizes[-1] / sizes[-2] for name, sizes in peaks.items()}
    assert growth["reference"] > QUADRATIC, f"the reference's memory grew {growth['reference']:.2f} times"
    for name in growth.keys() - {"reference"}:
        assert growth[name] < LINEAR, f"{name}: twice the context took {growth[name]:.2f} times the memory"


def test_loss_against_the_vocabulary(against, benchmark, device: torch.device):
    """One more word costs a backend that holds all logits a number a row; the kernel, which works by chunks, less."""
    benchmark.group = "memory"
    shapes = [LOSS[device.type] | {"V": V} for V in VOCABULARIES[device.type]]
    peaks = compare(against, "linear_cross_entropy", "V", shapes, device, chunked())
    words = shapes[-1]["V"] - shapes[-2]["V"]
    logit = getattr(torch, DTYPES[device.type]).itemsize * shapes[-1]["N"]  # bytes of one word's logits
    cost = {name: (sizes[-1] - sizes[-2]) / words for name, sizes in peaks.items()}
    assert cost["reference"] >= logit, f"the reference holds all logits; a word cost it {cost['reference']:.0f} bytes"
    if "triton" in cost:
        assert cost["triton"] < logit, f"a word cost triton {cost['triton']:.0f} bytes, its logits are {logit}"


def test_training_step(benchmark, request: pytest.FixtureRequest, device: torch.device):
    """The allocations of a step, by backend; the gradients are freed at its end."""
    benchmark.group = "memory"
    preset, vocabulary = ("gpt2", 50257) if device.type == "cuda" else ("cpu", 256)
    config = dataclasses.replace(PRESETS[preset], vocab_size=vocabulary)
    steps = {name: training_step(config, name, device) for name in backends("causal_attention", device)}
    traced = {name: trace(*step, device) for name, step in steps.items()}
    _, _, step = steps[next(iter(steps))]
    benchmark.pedantic(lambda: step(lambda name: None), rounds=3)
    allocation = {name: thinned(memory.series) for name, memory in traced.items()}
    phases = {name: memory.phases for name, memory in traced.items()}
    benchmark.extra_info |= {
        "preset": preset,
        "allocation": allocation,
        "allocation_phases": phases,
        "peak_bytes": {name: memory.peak for name, memory in traced.items()},
    }
    folder: Path | None = request.config.getoption("--pictures")
    if folder is not None:
        draw_allocation(allocation, phases, folder / "allocation-over-one-step.png")
    for name, memory in traced.items():
        assert memory.series[-1][1] < memory.peak, f"{name}: the step freed nothing"


Step = Callable[[Callable[[str], None]], None]


def training_step(
    config: Any, kernels: str, device: torch.device
) -> tuple[torch.nn.Module, torch.optim.Optimizer, Step]:
    """A model on one backend, its optimizer, and a step that says which phase begins; made once, so that it is warm."""
    torch.manual_seed(0)
    model = GPT(config, table.resolve(kernels, device)).to(device)
    optimizer = make_optimizer(model, config)
    x, y = torch.randint(config.vocab_size, (2, config.batch_size, config.block_size), device=device)
    dtype = getattr(torch, DTYPES[device.type])

    def step(begin: Callable[[str], None]) -> None:
        begin("forward")
        with autocast(device, dtype):
            loss = model(x, y)
        begin("backward")
        loss.backward()
        begin("optimizer")
        optimizer.step()
        optimizer.zero_grad()

    step(lambda name: None)
    return model, optimizer, step


def trace(model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: Step, device: torch.device) -> LiveBytes:
    """One step, counted."""
    with LiveBytes(device) as memory:
        state = (t for values in optimizer.state.values() for t in values.values() if isinstance(t, torch.Tensor))
        memory.hold([*model.parameters(), *state])
        step(lambda name: setattr(memory, "phase", name))
    memory.series.append((len(memory.series), memory.live))
    return memory
