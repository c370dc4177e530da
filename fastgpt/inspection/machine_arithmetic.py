"""Facts about arithmetic on the machine: each dtype tried in a product, and the dtypes that a setting leads to."""

import time
from collections.abc import Mapping

import torch

from fastgpt.inspection.facts import Fact, Section, first_line
from fastgpt.inspection.machine_facts import cpu_flags
from fastgpt.ops.ceilings import dtype_name
from fastgpt.system.device import cpu_has_bfloat16, resolve_dtype, resolve_weights_dtype, synchronize

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MUCH_SLOWER = 0.8  # times the speed of float32
PRODUCT = {"cpu": 512, "cuda": 4096, "mps": 1024}  # rows and columns of the factors of a timed product
HARDWARE = {True: "in hardware", False: "emulated", None: "hardware unknown"}


def arithmetic(device: torch.device, asked: str, interpreted: bool) -> Section:
    """The dtypes: tried in a product, and those that the setting `dtype`, as asked, leads to."""
    facts: dict[str, str | Fact] = {}
    speeds = {dtype: _product_speed(device, dtype) for dtype in DTYPES}
    for dtype, speed in speeds.items():
        hardware = _in_hardware(device, dtype)
        said = speed if isinstance(speed, str) else f"runs, about {_flops(speed)}"
        value = {"runs": not isinstance(speed, str), "flops": None if isinstance(speed, str) else speed}
        facts[dtype_name(dtype)] = Fact(f"{said}; {HARDWARE[hardware]}", value | {"in_hardware": hardware})
    works = {"training": resolve_dtype, "generation": resolve_weights_dtype}
    for work, resolve in works.items():
        taken = resolve(asked, device, interpreted=interpreted)
        hint = _faster(taken, speeds) if work == "training" else ""
        why = _why(taken, asked, device, interpreted, work) + hint
        facts[work] = Fact(f"{dtype_name(taken)}: {why}", dtype_name(taken))
    facts["TF32"] = _tf32(device)
    return facts


def _product_speed(device: torch.device, dtype: torch.dtype) -> float | str:
    """FLOP/s of a square product, the best of three; or the reason why it does not run."""
    n = PRODUCT[device.type]
    try:
        a = torch.ones(n, n, device=device, dtype=dtype)
        torch.matmul(a, a)
        taken = []
        for _ in range(3):
            synchronize(device)
            began = time.perf_counter()
            torch.matmul(a, a)
            synchronize(device)
            taken.append(time.perf_counter() - began)
    except (RuntimeError, TypeError) as error:
        return f"does not run: {first_line(error)}"
    return 2 * n**3 / min(taken)


def _faster(taken: torch.dtype, speeds: Mapping[torch.dtype, float | str]) -> str:
    """A hint where products are much faster in float32 than in the dtype that is taken."""
    own, full = speeds[taken], speeds[torch.float32]
    slow = isinstance(own, float) and isinstance(full, float) and own < MUCH_SLOWER * full
    return "; products in float32 are faster here, so try dtype float32" if slow else ""


def _flops(speed: float) -> str:
    return f"{speed / 1e12:,.0f} TFLOP/s" if speed >= 2e12 else f"{speed / 1e9:,.0f} GFLOP/s"


def _in_hardware(device: torch.device, dtype: torch.dtype) -> bool | None:
    """True if the chip has instructions for products in this dtype; None if that is unknown."""
    if dtype == torch.float32:
        return True
    if device.type == "cuda":
        if dtype == torch.bfloat16:
            return torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (7, 0)
    if device.type != "cpu":
        return None
    if dtype == torch.bfloat16:
        return cpu_has_bfloat16()
    return bool(cpu_flags() & {"avx512_fp16", "amx_fp16", "asimdhp"})


def _why(taken: torch.dtype, asked: str, device: torch.device, interpreted: bool, work: str) -> str:
    """The reason why a kind of work has this dtype."""
    if asked != "auto":
        return f"dtype {asked}, as given"
    if interpreted:
        return "dtype auto, as Triton's interpreter computes bfloat16 wrongly"
    if work == "generation" and device.type == "cpu":
        return "dtype auto, as float32 gives the same tokens with and without a cache on a CPU"
    return f"dtype auto, as the chip has {'' if taken == torch.bfloat16 else 'no '}bfloat16 in hardware"


def _tf32(device: torch.device) -> str:
    if device.type != "cuda":
        return "for CUDA GPUs only"
    on = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "on: float32 products are rounded to TF32" if on else "off: float32 products are exact float32"
