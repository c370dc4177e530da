"""Parts of the benchmarks: limits, counts, buffers that go round, live bytes, and a case for every operation."""

import importlib
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import DeviceType

from bench import tune
from bench.bench_kernels import agreeing
from bench.peers import loop_order
from bench.peers.kernels import CHUNKED, backend, contenders, distance, prepared
from bench.tools import generation
from bench.tools.allocation import draw_allocation, thinned
from bench.tools.kernel_cases import DIRECTIONS, SHAPES, Case, cases, inputs
from bench.tools.timing import Clock, buffers_needed, rotating, spread
from fastgpt.model import workloads
from fastgpt.ops import table
from fastgpt.ops.counts import COUNTS, count
from tests.helpers.fake_gpu import FakeGpu

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_a_launch_that_is_tuned_is_timed_without_launching_it(monkeypatch):
    gpu = FakeGpu(monkeypatch)
    cleared = torch.zeros(3)
    monkeypatch.setattr(tune, "_clock", lambda: (tune.GpuClock(), cleared.fill_(1)))
    assert tune.seconds_of(gpu.call(60e-6, 3e-6)) == pytest.approx(3e-6)
    assert not cleared.any()


@pytest.mark.parametrize(("quantize", "compiled"), [("none", False), ("int8", False), ("none", True)])
def test_a_generator_says_what_it_will_do_so_that_every_column_can_be_timed(monkeypatch, quantize: str, compiled: bool):
    asked, resolve, model = [], table.resolve, generation.untrained("baby", CPU)

    def noted(kernels, device, **rest):
        asked.append((kernels, rest["choose"].args[0]))
        return resolve(kernels, device, **rest)

    monkeypatch.setattr(table, "resolve", noted)
    monkeypatch.setattr(generation.TextGenerator, "compile", lambda self: None)
    generation.generator_of(model, torch.bfloat16, quantize=quantize, compiled=compiled, batch=8)
    expected = workloads.generation(model.config, torch.bfloat16, 8, int8=quantize == "int8", compile=compiled)
    assert asked == [("auto", expected)]


def test_a_profile_counts_each_kernel_once():
    rows = [
        SimpleNamespace(key=key, device_type=device, is_user_annotation=range_, self_cpu_time_total=7.0, **times)
        for key, device, range_, times in [
            ("aten::mm", DeviceType.CPU, False, {"self_device_time_total": 5.0}),
            ("sm90_gemm", DeviceType.CUDA, False, {"self_device_time_total": 5.0}),
            ("a range", DeviceType.CUDA, True, {"self_device_time_total": 5.0}),
        ]
    ]
    assert generation.own_times(rows, on_gpu=True) == {"sm90_gemm": 5.0}
    assert generation.own_times(rows[:1], on_gpu=False) == {"aten::mm": 7.0}


@pytest.mark.parametrize("name", ["attention", "attention_backward"])
def test_the_other_order_of_attentions_loops_is_its_own_source_with_a_line_changed(name):
    pytest.importorskip("triton")
    module = importlib.import_module(f"fastgpt_kernels.{name}")

    source = Path(module.__file__ or "").read_text(encoding="utf-8")
    source = source.replace(loop_order.DIAGONAL_LAST, loop_order.DIAGONAL_FIRST)
    before, after = source.splitlines(), loop_order.changed(source).splitlines()
    differing = [(a.strip(), b.strip()) for a, b in zip(before, after, strict=True) if a != b]
    orders = [(f"for DIAGONAL {loop_order.DIAGONAL_FIRST}", f"for DIAGONAL {loop_order.DIAGONAL_LAST}")]
    assert [pair for pair in differing if "DIAGONAL" in pair[0]] == orders
    assert all("fastgpt::" in a or "ops.fastgpt." in a for a, b in differing if "DIAGONAL" not in a)
    assert not any("fastgpt::" in line or "ops.fastgpt." in line for line in after)
    with pytest.raises(RuntimeError, match="has not one loop"):
        loop_order.changed(source.replace(loop_order.DIAGONAL_FIRST, "in (0, 1):"))


@pytest.mark.parametrize("op", table.TABLE)
def test_count_holds_every_input_and_output_once(op: str):
    shape, dtype = SHAPES["cpu"][op][0][0], torch.float32
    case = Case(op, "forward", "reference", shape, "float32", 0)
    args = inputs(case, CPU)
    result = backend(op, "reference")(*args)()
    outs = [result] if isinstance(result, torch.Tensor) else list(result or [])
    moved = sum(t.nbytes for t in (*args, *outs))
    if op == "kv_write":  # the pages are written at the slots alone
        moved = sum(t.nbytes for t in (*args[:2], args[4])) + sum(t.nbytes for t in args[:2])
    counted = count(op, "forward", shape, dtype.itemsize).bytes
    assert counted == pytest.approx(moved, rel=0.01)


def test_every_operation_of_the_table_has_its_cases():
    assert set(table.TABLE) == set(DIRECTIONS) <= {op for op, _ in COUNTS}
    for kind in SHAPES:
        assert set(SHAPES[kind]) == set(DIRECTIONS)
    here = cases(CPU)
    assert len({case.key for case in here}) == len(here)
    assert {case.op for case in here} == set(table.TABLE)
    assert [case.tier for case in here] == sorted(case.tier for case in here)
    assert {case.backend for case in here} == {"torch", "reference"}  # no GPU: Triton is not measured


def test_calls_rotate():
    seen: list[int] = []
    calls = [lambda i=i: seen.append(i) for i in range(3)]
    first, second = rotating(calls), rotating(calls, 2)
    for _ in range(4):
        first(), second()
    assert seen == [0, 2, 1, 0, 2, 1, 0, 2]


def test_buffers_exceed_the_cache():
    assert buffers_needed(16 << 20, CPU) * (16 << 20) >= 64 << 20
    assert buffers_needed(1 << 40, CPU) == 2
    assert buffers_needed(1, CPU) == 64  # many, and not without end


def test_clock_times_one_call_and_reads_what_is_counted():
    clock, slept = Clock(CPU), 0.02
    assert clock.wall(lambda: time.sleep(slept)) >= slept
    assert clock.kernels(lambda: time.sleep(slept)) >= slept
    assert clock.read() == 0
    clock.count(0.5)
    clock.count(0.25)
    assert clock.read() == 0.75


def test_a_gpus_clock_counts_no_launching_however_long_it_takes(monkeypatch):
    gpu = FakeGpu(monkeypatch)
    assert Clock(CUDA).kernels(gpu.call(5e-3, 40e-6)) == pytest.approx(40e-6)


def test_spread_is_the_middle_half():
    assert spread([1.0]) == 0
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]) == 4


@pytest.mark.parametrize(
    "op", ["causal_attention", "linear_cross_entropy", "linear_int8", "add_rms_norm", "swiglu", "relu2"]
)
def test_peers_compute_what_the_column_does(op: str):
    direction = DIRECTIONS[op][-1]
    shapes = {
        "causal_attention": {"B": 1, "T": 9, "H": 2, "D": 8},
        "linear_cross_entropy": {"N": 5, "C": 8, "V": 11},
        "linear_int8": {"N": 1, "C": 32, "out": 6},
        "add_rms_norm": {"N": 3, "C": 8},
        "swiglu": {"N": 3, "C": 8},
        "relu2": {"N": 3, "C": 8},
    }
    case = Case(op, direction, "torch", shapes[op], "float32", 1)
    args = inputs(case, CPU)
    peers, left_out = contenders(case, CPU, "torch")
    with torch.set_grad_enabled(direction != "forward"):
        fit, apart = agreeing(backend(op, "torch"), peers, case, args, left_out)
        assert fit
        assert apart.keys() == fit.keys()
        assert left_out.keys() >= {"compiled reference"}
        if op == "linear_cross_entropy":
            assert CHUNKED in (fit if hasattr(F, "linear_cross_entropy") else left_out)
        broken = {"broken": lambda *args: lambda: 1 / 0, "wrong": lambda *args: lambda: [3 * t for t in args[:3]]}
        with pytest.raises((AssertionError, ValueError, RuntimeError)):
            agreeing(backend(op, "torch"), broken, case, args, left_out)
    assert left_out["broken"] == "ZeroDivisionError: division by zero"


def test_distance_is_of_the_worst_tensor():
    a, b = torch.ones(4), torch.full((4,), 2.0)
    assert distance([a, b], [a, a]) == 1.0
    assert distance(None, None) == 0.0


def test_backward_gives_every_gradient():
    case = Case("layer_norm", "backward", "torch", {"N": 3, "C": 4}, "float32", 0)
    args = inputs(case, CPU)
    call = prepared(backend("layer_norm", "torch"), args, "backward")
    first, second = call(), call()
    assert [t.shape for t in first] == [t.shape for t in args]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_thinned_series_keeps_the_peak_and_is_drawn(tmp_path):
    series = [(i, (i * 7919) % 1000) for i in range(5000)]
    short = thinned(series, 400)
    assert len(short) == 400
    assert max(size for _, size in short) == max(size for _, size in series)
    assert short == sorted(short)
    assert thinned(series[:3], 400) == series[:3]
    path = tmp_path / "pictures" / "step.png"
    draw_allocation({"torch": short}, {"torch": [("forward", 0), ("backward", 2500)]}, path)
    assert path.read_bytes().startswith(b"\x89PNG")
