"""Which machine and arithmetic the flags mean, with what this machine lacks played by monkeypatch."""

import pytest
import torch

from fastgpt import device as module
from fastgpt.device import autocast, describe, peak_flops, peak_memory, resolve_device, resolve_dtype, synchronize
from fastgpt.errors import UsageError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def machine(monkeypatch):
    """Pretend to have so many GPUs, and perhaps an Apple one."""

    def pretend(gpus: int = 0, mps: bool = False) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return pretend


@pytest.mark.parametrize(
    ("gpus", "mps", "kind"), [(1, True, "cuda"), (1, False, "cuda"), (0, True, "mps"), (0, False, "cpu")]
)
def test_auto_takes_cuda_then_mps_then_the_cpu(machine, gpus: int, mps: bool, kind: str):
    machine(gpus, mps)
    assert resolve_device("auto") == torch.device(kind)


@pytest.mark.parametrize(("name", "wanted"), [("cpu", CPU), ("cuda", CUDA), ("cuda:1", torch.device("cuda", 1))])
def test_a_named_device_is_taken(machine, name: str, wanted: torch.device):
    machine(gpus=2)
    assert resolve_device(name) == wanted


@pytest.mark.parametrize(
    "name", ["tpu", "", "CPU", "cuda:", "cuda:x", "cuda:-1", "gpu", "cpu0", "cpu:1", "mps:0", "cuda:²"]
)
def test_an_unknown_device_is_refused_with_the_choices(machine, name: str):
    machine(gpus=1)
    with pytest.raises(UsageError, match=r"--device .*auto, cpu, mps, cuda, cuda:N"):
        resolve_device(name)


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "mps"])
def test_a_device_that_is_not_here_is_refused_with_a_way_out(machine, name: str):
    machine()
    with pytest.raises(UsageError, match=f"--device {name}.*use --device auto or cpu"):
        resolve_device(name)


def test_a_gpu_number_too_high_names_the_last(machine):
    machine(gpus=2)
    with pytest.raises(UsageError, match="--device cuda:2: the last GPU here is cuda:1"):
        resolve_device("cuda:2")


@pytest.mark.parametrize("fast", [True, False])
def test_auto_dtype_is_bfloat16_only_where_the_chip_has_it(monkeypatch, fast: bool):
    wanted = torch.bfloat16 if fast else torch.float32
    monkeypatch.setattr(module, "cpu_has_bfloat16", lambda: fast)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: fast)
    assert resolve_dtype("auto", CPU) == resolve_dtype("auto", CUDA) == wanted
    assert resolve_dtype("auto", torch.device("mps")) == torch.float32


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_a_named_dtype_is_taken_and_products_have_it(name: str):
    dtype = resolve_dtype(name, CPU)
    assert dtype == getattr(torch, name)
    x = torch.randn(4, 4)
    with autocast(CPU, dtype):
        assert (x @ x).dtype == dtype
    assert (x @ x).dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "dtype", "peak"),
    [
        ("NVIDIA H200", torch.bfloat16, 989e12),
        ("NVIDIA A100-SXM4-80GB", torch.float16, 312e12),
        ("NVIDIA H200", torch.float32, None),
        ("Some GPU", torch.bfloat16, None),
    ],
)
def test_peaks_are_the_data_sheets_or_unknown(monkeypatch, name: str, dtype: torch.dtype, peak: float | None):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(CUDA, dtype) == peak
    assert peak_flops(CPU, dtype) is None
    assert describe(CUDA) == name


def test_peak_memory_counts_what_this_process_used():
    before = peak_memory(CPU)
    grown = torch.ones(before // 4 + (64 << 20) // 4)  # more than the peak so far, by 64 MiB
    assert before + (64 << 20) <= peak_memory(CPU) <= before + grown.nbytes + (64 << 20)


def test_the_cpu_is_described_by_its_threads_and_needs_no_wait():
    assert describe(CPU) == f"CPU, {torch.get_num_threads()} threads"
    assert synchronize(CPU) is None
