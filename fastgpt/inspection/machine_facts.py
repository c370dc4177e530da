"""Facts about the machine: versions, processor, GPU, compilers, cache. What can be tried is tried."""

import importlib.metadata
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy
import torch

import fastgpt
from fastgpt.errors import UsageError
from fastgpt.generation.cuda_graphs import GraphPool
from fastgpt.inspection.facts import Fact, Section, first_line
from fastgpt.ops import table
from fastgpt.system import caches, cpus
from fastgpt.system.device import (
    free_memory,
    memory_limit,
    synchronize,
    total_memory,
)
from fastgpt.system.units import counted, format_bytes

MAPS = Path("/proc/self/maps")
CPUINFO = Path("/proc/cpuinfo")
DRIVER = Path("/proc/driver/nvidia/version")
# Settings of others on which speed or choice depends; numbers and words, never paths.
ENVIRONMENT = (
    *(
        "OMP_NUM_THREADS",
        "MKL_NUM_THREADS",
        "OMP_WAIT_POLICY",
        "KMP_BLOCKTIME",
        "TRITON_INTERPRET",
        "ATEN_CPU_CAPABILITY",
    ),
    *("CUDA_VISIBLE_DEVICES", "CUDA_LAUNCH_BLOCKING", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"),
    *("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"),
)
PATIENCE = 20  # seconds for another program
PROGRAM = '#include <vector>\nextern "C" int answer() { std::vector<int> v(42); return v.size(); }\n'


def versions(device: torch.device) -> Section:
    gpu = torch.version.cuda or torch.version.hip
    return {
        "fastgpt": fastgpt.__version__,
        "Python": f"{platform.python_version()} ({platform.python_implementation()})",
        "OS": _system(),
        "torch": torch.__version__,
        "triton": _version("triton") or "not installed",
        "numpy": numpy.__version__,
        "CUDA": f"{gpu}{' (HIP)' if torch.version.hip else ''}" if gpu else "none in this PyTorch",
        "cuDNN": _cudnn(),  # whether it is loaded by now: after all that may need it
        "driver": _driver(device) or "no NVIDIA driver found",
    }


def processor(device: torch.device, asked: str, threads: int) -> Section:
    """The device that computes, and the machine around it."""
    limit, quota = memory_limit(), cpus.quota()
    cores = _cores()
    facts: dict[str, str | Fact] = {
        "takes": Fact(f"{device} (device {asked})", str(device)),
        "CPU": _cpu_name(),
        "instructions": f"{torch.backends.cpu.get_cpu_capability()}{_matrix_instructions()}",
        "cores": Fact(
            f"{counted(cores, 'core')}, {counted(os.cpu_count() or 1, 'logical CPU')}, of which this process may use "
            f"{cpus.allowed()}",
            {"cores": cores, "logical": os.cpu_count(), "allowed": cpus.allowed()},
        ),
        "threads": Fact(str(threads), threads),
        "memory": _memory(torch.device("cpu")),
        "container": Fact(
            f"{f'{quota:g} CPUs' if quota < float('inf') else 'no limit of CPUs'}, "
            f"{format_bytes(limit) if limit else 'no limit of memory'} (cgroup)",
            {"cpus": quota if quota < float("inf") else None, "memory": limit},
        ),
        "GPU": _gpu(device),
    }
    if device.type == "cuda":
        facts |= {"GPU memory": _memory(device), "CUDA graphs": _graphs(device)}
    else:
        facts["CUDA graphs"] = "no CUDA"
    if given := [f"{name}={os.environ[name]}" for name in ENVIRONMENT if name in os.environ]:
        facts["environment"] = " ".join(given)
    return facts


def compilers(device: torch.device) -> Section:
    """The compilers that `compile` and Triton's kernels need."""
    return {"C++": _compiler(), "Triton": _triton(device)}


def cache(paths: bool) -> Section:
    """The size of the project's cache, and of the parts of it."""
    try:
        folder = caches.cache_dir()
    except UsageError as error:
        return {"folder": str(error)}
    where: dict[str, str | Fact] = (
        {"folder": f"{folder}{'' if folder.exists() else ' (not made yet)'}"} if paths else {}
    )
    parts: dict[str, int] = {}
    for path, count in _files(folder):
        part = path.relative_to(folder).parts[0]
        parts[part] = parts.get(part, 0) + count
    named = ", ".join(f"{part} {format_bytes(count)}" for part, count in sorted(parts.items()))
    whole = sum(parts.values())
    return {**where, "size": Fact(f"{format_bytes(whole)}{f': {named}' if named else ', empty'}", whole)}


# Versions


def _system() -> str:
    name = f"{platform.system()} {platform.release()} {platform.machine()}"
    try:
        return f"{platform.freedesktop_os_release()['PRETTY_NAME']}, {name}"
    except (OSError, KeyError):
        return name


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cudnn() -> str | Fact:
    """The version of cuDNN, and whether this process has loaded it."""
    loaded = "libcudnn" in _mapped()  # before its version is asked for, which loads it
    number = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    if number is None:
        return Fact("not loaded: this PyTorch has none, or no GPU for it", {"version": None, "loaded": False})
    digits = 10_000 if number >= 90_000 else 1_000  # of the major version's unit, since version 9
    version = f"{number // digits}.{number % digits // 100}.{number % 100}"
    return Fact(
        f"{version}, {'loaded' if loaded else 'not loaded: nothing needed it'}", {"version": version, "loaded": loaded}
    )


def _mapped() -> str:
    """The files that this process has loaded; empty where the system does not tell."""
    try:
        return MAPS.read_text()
    except OSError:
        return ""


def _driver(device: torch.device) -> str | None:
    """The version of NVIDIA's driver: from the system's file, or where a container hides that, from its program."""
    try:
        said = DRIVER.read_text()
    except OSError:
        said = _output("nvidia-smi") or "" if device.type == "cuda" else ""
    found = re.search(r"(?:Kernel Module|Driver Version:).*?(\d+\.[\d.]+)", said)
    return found and found[1]


# Processor


def _cpu_name() -> str:
    for key in ("model name", "Hardware", "Model"):
        if found := next(_cpuinfo(key), None):
            return found
    if sys.platform == "darwin" and (found := _output("sysctl", "-n", "machdep.cpu.brand_string")):
        return found
    return platform.processor() or platform.machine()


def _cpuinfo(key: str) -> Iterator[str]:
    """The values of a name in Linux's list of CPUs; none elsewhere."""
    try:
        lines = CPUINFO.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() == key:
            yield value.strip()


def _cores() -> int:
    """Cores, of which each may have several logical CPUs; where they are unknown, the logical CPUs."""
    cores = {*zip(_cpuinfo("physical id"), _cpuinfo("core id"), strict=False)}
    return len(cores) or os.cpu_count() or 1


def cpu_flags() -> set[str]:
    """The names of the CPU's features, as Linux lists them; none elsewhere."""
    return {*next(_cpuinfo("flags"), "").split(), *next(_cpuinfo("Features"), "").split()}


def _matrix_instructions() -> str:
    """The instructions that make 16-bit products fast."""
    found = sorted(cpu_flags() & {"avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16", "bf16", "asimdhp", "sve"})
    return f" with {', '.join(found)}" if found else ""


def _memory(device: torch.device) -> Fact:
    free, total = free_memory(device), total_memory(device)
    of = f" of {format_bytes(total)}" if total is not None else ""
    return Fact(f"{format_bytes(free)} free{of}", {"free": free, "total": total})


def _gpu(device: torch.device) -> str | Fact:
    if torch.backends.mps.is_available():
        return "Apple GPU"
    if not torch.cuda.is_available():
        return "PyTorch finds none"
    index = torch.cuda.current_device() if device.index is None else device.index
    about, count = torch.cuda.get_device_properties(index), torch.cuda.device_count()
    others = f"; one of {count} GPUs" if count > 1 else ""
    capability = f"{about.major}.{about.minor}"
    text = f"{about.name}, compute capability {capability}, {about.multi_processor_count} multiprocessors{others}"
    return Fact(text, {"name": about.name, "capability": capability, "count": count})


def _graphs(device: torch.device) -> str:
    """Capture and replay a small CUDA graph."""
    numbers = torch.ones(8, device=device)
    try:
        graph, doubled = GraphPool(device).capture(lambda: numbers * 2)
        graph.replay()
        synchronize(device)
        return "usable" if bool((doubled == 2).all()) else "not usable: a replay computed something else"
    except RuntimeError as error:
        return f"not usable: {first_line(error)}"


# Compilers


def _compiler() -> str:
    """Compile a small program, as `torch.compile` does on a CPU."""
    usual = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    try:
        command = shlex.split(os.environ.get("CXX", "")) or [usual]
    except ValueError as error:
        return f"none: CXX is not a command: {error}"
    name = Path(command[0]).name
    if shutil.which(command[0]) is None:
        return f"none: {name} is not found; compile needs one on a CPU, install g++"
    if sys.platform == "win32":
        return f"{name} is found, not tried"
    about = (_output(*command, "--version") or name).splitlines()[0]
    if error := _refusal(command, PROGRAM):
        return f"{about}: does not compile: {error}"
    openmp = _refusal([*command, "-fopenmp"], "#include <omp.h>\n" + PROGRAM)
    python = _refusal([*command, f"-I{sysconfig.get_paths()['include']}"], "#include <Python.h>\n" + PROGRAM)
    threads, headers = "does not" if openmp else "works", "is not found: install python3-dev" if python else "is found"
    return f"{about}: compiles; OpenMP {threads}; Python.h {headers}"


def _refusal(compiler: Sequence[str], program: str) -> str | None:
    """The compiler's first error; None where it makes a library of the program."""
    with tempfile.TemporaryDirectory(prefix="fastgpt-") as folder:
        command = [*compiler, "-x", "c++", "-shared", "-fPIC", "-o", f"{folder}/part.so", "-"]
        try:
            done = subprocess.run(command, input=program, capture_output=True, text=True, timeout=PATIENCE, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            return first_line(error)
    if done.returncode == 0:
        return None
    lines = done.stderr.splitlines() or [f"exit code {done.returncode}"]
    return next((line for line in lines if "error" in line), lines[0])


def _triton(device: torch.device) -> str:
    version = _version("triton")
    if version is None:
        return "not installed"
    try:
        interpreted = table.resolve("triton", device).interpreted
    except UsageError as error:
        return f"{version}: {str(error).partition(';')[0].replace('`', '')}"
    return f"{version}: in its interpreter, on the CPU" if interpreted else f"{version}: its kernels run here"


# Others


def _files(folder: Path) -> Iterator[tuple[Path, int]]:
    """Every file in a folder and its bytes; those that go away meanwhile are left out."""
    for place, _, names in os.walk(folder):
        for name in names:
            path = Path(place) / name
            try:
                yield path, path.lstat().st_size
            except OSError:
                continue


def _output(*command: str) -> str | None:
    """The output of a program; None if there is no such program, or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
