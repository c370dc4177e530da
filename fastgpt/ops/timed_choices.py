"""The choices of `fastgpt.ops.autotune`, the environment that they depend on, and the file that keeps them."""

import hashlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import fastgpt_kernels
from fastgpt.ops.workload import Workload
from fastgpt.system.files import write_atomic

CANDIDATES = ("torch", "triton")
FORMAT = 4  # 1 was timed with what Python takes to launch; 2 named the backend otherwise, and 3 the workload


@dataclass(frozen=True)
class Choice:
    """The backend of one operation.

    Attributes:
        backend: one of `CANDIDATES`.
        seconds: of one call, for each backend that was timed.
        left_out: the reason for each backend that was not timed.
        lasting: False if the reason may be gone the next time, such as a lack of memory; then it is not kept.
    """

    backend: str
    seconds: Mapping[str, float] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    lasting: bool = True


@dataclass(frozen=True)
class Environment:
    """All that a choice depends on beside the workload.

    Attributes:
        kernels: a hash of the sources of `fastgpt_kernels`, the launch table among them.
        products: how float32 matrices are multiplied: "ieee" or "tf32".
    """

    gpu: str
    torch: str
    triton: str
    kernels: str
    products: str

    def __str__(self) -> str:
        return f"{self.gpu}, torch {self.torch}, triton {self.triton}, kernels {self.kernels}, {self.products} products"


def environment_of(device: torch.device) -> Environment:
    """The environment of a CUDA device of this machine."""
    import triton

    return Environment(
        gpu=torch.cuda.get_device_name(device),
        torch=torch.__version__,
        triton=triton.__version__,
        kernels=source_hash(Path(fastgpt_kernels.__file__).parent),
        products="tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee",
    )


def source_hash(folder: Path) -> str:
    """A hash of a folder's Python and TOML files and their names."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.py"), *folder.glob("*.toml")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


class ChoiceFile:
    """Choices as JSON: environment -> workload -> operation -> choice, or null for one that is not lasting.

    A file that cannot be read counts as empty, and one that cannot be written stays as it is, each with a warning. The
    file is always whole. If two processes write at once, one may lose its choices, which are then timed again.
    """

    def __init__(self, path: Path):
        self.path = path

    def read(self, environment: Environment, workload: Workload) -> dict[str, Choice | None]:
        """The choices that are known, by operation; None for one that was not lasting."""
        try:
            known = self._content()
        except (OSError, ValueError) as error:
            warnings.warn(f"{self.path} cannot be read and is made anew: {error}", stacklevel=2)
            return {}
        choices = known.get(str(environment), {}).get(str(workload), {})
        return {op: choice and Choice(**choice) for op, choice in choices.items()}

    def add(self, environment: Environment, workload: Workload, choices: Mapping[str, Choice]) -> None:
        """Keep these choices beside what the file holds now."""
        try:
            content = self._content()
        except (OSError, ValueError):  # `read` has warned of it
            content = {}
        known = content.setdefault(str(environment), {}).setdefault(str(workload), {})
        for op, choice in choices.items():
            kept = {"backend": choice.backend, "seconds": choice.seconds, "left_out": choice.left_out}
            known[op] = kept if choice.lasting else None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(self.path, json.dumps({"format": FORMAT, "choices": content}, indent=1) + "\n")
        except OSError as error:
            warnings.warn(
                f"{self.path} cannot be written ({error.strerror}), so the backends are timed at every start; "
                "set FASTGPT_CACHE to another folder",
                stacklevel=2,
            )

    def _content(self) -> dict[str, dict[str, dict[str, Any | None]]]:
        """The content of the file; empty if there is none, or one of another version.

        Raises:
            OSError, ValueError: it cannot be read, or holds something else.
        """
        try:
            content = json.loads(self.path.read_bytes())
        except FileNotFoundError:
            return {}
        try:
            if content["format"] != FORMAT:
                return {}
            for workloads in content["choices"].values():
                for choices in workloads.values():
                    for choice in choices.values():
                        if choice is not None:
                            _check(**choice)
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"it is not a table of choices ({type(error).__name__}: {error})") from None
        return content["choices"]


def _check(*, backend: str, seconds: Mapping[str, float], left_out: Mapping[str, str]) -> None:
    """Raises ValueError, or AttributeError, for what is not a choice."""
    timed = all(isinstance(value, float) for value in seconds.values())
    reasons = all(isinstance(why, str) for why in left_out.values())
    if backend not in CANDIDATES or not timed or not reasons:
        raise ValueError(f"no choice has backend {backend!r}, seconds {seconds!r} and left_out {left_out!r}")
