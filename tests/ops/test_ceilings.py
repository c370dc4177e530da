"""The limits of a machine: by hand of made ceilings, and measured on a GPU that is pretended."""

import pytest
import torch

from fastgpt.ops import ceilings
from fastgpt.ops.ceilings import Ceilings, Limit, best_seconds, buffer_bytes, dtype_name, float32_products, matmul_rate
from tests.helpers.fake_gpu import FakeGpu

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
MACHINE = Ceilings(copy_bandwidth=80e9, read_bandwidth=100e9, matmul={"float32": 1e12, "bfloat16": 4e12})


def test_limit_is_the_slower_of_memory_and_arithmetic():
    assert MACHINE.limit(bytes=200e9, flops=1e12) == Limit("memory", 2.0)
    assert MACHINE.limit(bytes=200e9, flops=3e12) == Limit("arithmetic", 3.0)
    assert MACHINE.limit(bytes=200e9, flops=3e12, arithmetic=torch.bfloat16) == Limit("memory", 2.0)
    assert MACHINE.limit(bytes=50e9) == Limit("memory", 0.5)
    assert MACHINE.limit(flops=8e12, arithmetic="bfloat16") == Limit("arithmetic", 2.0)


def test_limit_of_nothing_or_of_an_unmeasured_arithmetic_is_refused():
    with pytest.raises(ValueError, match="count its bytes"):
        MACHINE.limit()
    with pytest.raises(ValueError, match="float16 were not measured"):
        MACHINE.limit(flops=1, arithmetic=torch.float16)
    assert dtype_name(torch.float16) == dtype_name("float16") == "float16"


def test_rate_of_products_is_measured_and_the_precision_put_back():
    before = torch.get_float32_matmul_precision()
    with float32_products("high"):
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == before
    assert matmul_rate(CPU, "float32") > 1e8


@pytest.mark.parametrize(("free", "size"), [(140, 4), (24, 3)])
def test_a_gpus_memory_is_measured_over_gigabytes_of_it(monkeypatch, free: int, size: int):
    monkeypatch.setattr(ceilings, "free_memory", lambda device: free << 30)
    monkeypatch.setattr(ceilings, "cache_bytes", lambda device: 60 << 20)
    assert buffer_bytes(CUDA) == size << 30
    assert buffer_bytes(CPU) == 256 << 20


def test_a_gpus_ceilings_are_of_its_own_time(monkeypatch):
    gpu = FakeGpu(monkeypatch)
    calls = iter([gpu.call(50e-6, 400e-6)] * 4 + [gpu.call(50e-6, 300e-6)] + [gpu.call(50e-6, 350e-6)] * 1000)
    assert best_seconds(lambda: next(calls)(), CUDA) == pytest.approx(300e-6)
