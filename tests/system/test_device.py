"""The device and arithmetic that flags choose; devices that are absent are played by monkeypatch."""

import contextlib
import os
import sys
from pathlib import Path

import pytest
import torch

from fastgpt.errors import UsageError
from fastgpt.system import device as module
from fastgpt.system.device import (
    autocast,
    describe,
    free_memory,
    parse_memory,
    peak_flops,
    peak_memory,
    resolve_device,
    resolve_dtype,
    synchronize,
)
from fastgpt.system.units import counted

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
    with pytest.raises(UsageError, match=r"`device` .*auto, cpu, mps, cuda, cuda:N"):
        resolve_device(name)


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "mps"])
def test_a_device_that_is_not_here_is_refused_with_a_way_out(machine, name: str):
    machine()
    with pytest.raises(UsageError, match=f"`device` {name}.*use `device` auto or cpu"):
        resolve_device(name)


def test_a_gpu_number_too_high_names_the_last(machine):
    machine(gpus=2)
    with pytest.raises(UsageError, match="`device` cuda:2: the last GPU here is cuda:1"):
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
    assert describe(CPU) == f"CPU, {counted(torch.get_num_threads(), 'thread')}"
    assert synchronize(CPU) is None


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("1000000", 1000000),
        ("7b", 7),
        ("3kB", 3000),
        ("3 KiB", 3072),
        ("500 MB", 500_000_000),
        ("2GiB", 2 << 30),
        ("2gb", 2_000_000_000),
        (" 1.5 GiB ", 3 << 29),
        ("1TiB", 1 << 40),
        ("1TB", 10**12),
    ],
)
def test_an_amount_of_memory_is_read(text: str, size: int):
    assert parse_memory(text, CPU) == size


@pytest.mark.parametrize(("text", "size"), [("30%", 300), ("12.5 %", 125), ("100%", 1000), ("0%", 0)])
def test_a_share_is_of_the_devices_free_memory(monkeypatch, text: str, size: int):
    monkeypatch.setattr(module, "free_memory", {CPU: 1000, CUDA: 5000}.__getitem__)
    assert parse_memory(text, CPU) == size
    assert parse_memory(text, CUDA) == 5 * size


@pytest.mark.parametrize(
    "text",
    ["", " ", "GB", "%", "-1", "-5%", "1e9", "1,000", "2 PiB", "2g", "1.GB", ".5GB", "2GiB!", "1 2", "nan", "inf"],
)
def test_what_is_no_amount_is_refused_with_examples(text: str):
    with pytest.raises(UsageError, match=r"`kv_memory` .* is not an amount .*2GiB, 500MB or 30%") as refused:
        parse_memory(text, CPU)
    assert repr(text) in str(refused.value)


@pytest.mark.parametrize("text", ["101%", "100.5 %"])
def test_more_than_all_of_the_memory_is_refused(text: str):
    with pytest.raises(UsageError, match=f"`kv_memory` '{text}' is more than all .* at most 100%"):
        parse_memory(text, CPU)


@pytest.mark.parametrize("text", ["5ib", "9" * 400])
def test_odd_amounts_are_refused_too(text: str):
    with pytest.raises(UsageError, match="`kv_memory`"):
        parse_memory(text, CPU)


@pytest.fixture
def linux(monkeypatch, tmp_path: Path):
    """Pretend that Linux says this in its files."""
    monkeypatch.setattr(module, "Path", lambda path: tmp_path / path.lstrip("/"))

    def pretend(**files: str) -> None:
        names = {"meminfo": "proc/meminfo", "v2": "sys/fs/cgroup/memory.{}", "v1": "sys/fs/cgroup/memory/memory.{}"}
        for name, text in files.items():
            key, _, end = name.partition("_")
            path = tmp_path / names[key].format(end)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    return pretend


MEMINFO = "MemTotal:       8000 kB\nMemFree:         100 kB\nMemAvailable:   2000 kB\nHugePages_Total:   0\n"


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, 2000 * 1024),
        ({"v2_max": "max\n", "v2_current": "5\n"}, 2000 * 1024),
        ({"v2_max": "9000000\n", "v2_current": "8500000\n"}, 500_000),
        ({"v2_max": "9000000\n", "v2_current": "1000\n"}, 2000 * 1024),
        ({"v2_max": "1000\n", "v2_current": "1001\n"}, 0),
        ({"v1_limit_in_bytes": "7000\n", "v1_usage_in_bytes": "3000\n"}, 4000),
        ({"v2_max": "9000\n", "v2_current": "8500\n", "v2_stat": "anon 1\ninactive_file 6000\n"}, 6500),
        ({"v1_limit_in_bytes": "70\n", "v1_usage_in_bytes": "70\n", "v1_stat": "total_inactive_file 5\n"}, 5),
    ],
    ids=[
        *("no cgroup", "no limit", "limit", "limit above the machine", "over the limit", "cgroup v1"),
        *("copies of files", "copies of files, v1"),
    ],
)
def test_a_cpu_has_what_machine_and_container_leave(linux, files: dict[str, str], free: int):
    linux(meminfo=MEMINFO, **files)
    assert free_memory(CPU) == free


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({}, None),
        ({"v2_max": "max\n", "v2_current": "5\n"}, None),
        ({"v2_max": "9000000\n", "v2_current": "8500000\n"}, 9_000_000),
        ({"v1_limit_in_bytes": "7000\n", "v1_usage_in_bytes": "3000\n"}, 7000),
        ({"v1_limit_in_bytes": f"{2**63 - 4096}\n", "v1_usage_in_bytes": "3000\n"}, None),
    ],
    ids=["no cgroup", "no limit", "limit", "cgroup v1", "no limit, v1"],
)
def test_a_containers_limit_of_memory_is_found(linux, files: dict[str, str], limit: int | None):
    linux(**files)
    assert module.memory_limit() == limit


def test_without_meminfo_half_of_the_memory_is_free(monkeypatch, linux):
    sizes = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1000}
    monkeypatch.setattr(os, "sysconf", sizes.__getitem__, raising=False)
    assert free_memory(CPU) == 4096 * 500


def test_where_nothing_is_known_four_gib_are_free(monkeypatch, linux):
    monkeypatch.delattr(os, "sysconf", raising=False)
    assert free_memory(CPU) == 4 << 30


@pytest.mark.parametrize("number", [0, 1337, 2**63 + 5, 2**64 - 1])
def test_a_seed_gives_the_numbers_of_torchs_own_and_seeds_only_what_is_used(monkeypatch, number: int):
    torch.manual_seed(number)
    expected = torch.rand(5)
    seeded = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext(seeded.append(device)))
    monkeypatch.setattr(torch.cuda, "manual_seed", seeded.append)
    module.seed(number, torch.device("cpu"))
    assert torch.equal(torch.rand(5), expected)
    assert seeded == []
    module.seed(number, torch.device("cuda", 1))
    assert seeded == [torch.device("cuda", 1), number]
    assert torch.equal(torch.rand(5), expected)


def test_the_meta_device_takes_no_memory():
    assert free_memory(torch.device("meta")) == sys.maxsize


def test_this_machine_has_free_memory():
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < free_memory(CPU) <= total
    assert 0 < parse_memory("50%", CPU) < total


@pytest.mark.parametrize(("fraction", "expected"), [(1.0, 123 + 600), (0.25, 500 - 400), (0.1, 0)])
def test_a_gpu_has_what_is_free_and_what_pytorch_keeps_for_later(monkeypatch, fraction: float, expected: int):
    monkeypatch.setattr(torch.cuda, "mem_get_info", {CUDA: (123, 2000)}.__getitem__)
    monkeypatch.setattr(torch.cuda, "memory_reserved", {CUDA: 1000}.__getitem__)
    monkeypatch.setattr(torch.cuda, "memory_allocated", {CUDA: 400}.__getitem__)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", {CUDA.index: fraction}.__getitem__)
    assert free_memory(CUDA) == expected


@pytest.mark.parametrize(("used", "free"), [(300, 700), (1200, 0)])
def test_an_apple_gpu_has_what_is_recommended_less_what_is_used(monkeypatch, used: int, free: int):
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 1000)
    monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda: used)
    assert free_memory(torch.device("mps")) == free
