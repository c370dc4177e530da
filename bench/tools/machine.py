"""Reads the facts of a machine that results are recorded with: its instructions, Triton and the GPU's driver."""

import subprocess

import torch

from fastgpt.system.device import cpu_has_bfloat16


def cpu_instructions() -> str:
    """The vector instructions that PyTorch uses, and whether this CPU has bfloat16 products: brands do not tell."""
    return torch.backends.cpu.get_cpu_capability() + (" with bfloat16" if cpu_has_bfloat16() else "")


def triton_version() -> str | None:
    """Triton's version; None where it is not installed."""
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


def gpu_driver() -> str | None:
    """The driver's version; None where its tool is not at hand."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.split("\n")[0].strip() or None
