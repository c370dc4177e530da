"""Launches kernels: one table of tiles, warps and stages, and the checks of what comes in.

The table stands in launch_table.toml. A row is found by (kernel, architecture, dtype, width), where the width is a head
size or a number of columns and each row serves widths up to its own. The same rows are what
`python -m fastgpt_kernels.aot` compiles, so no row is launched that was not compiled before. Nothing here asks the
device, tunes or waits: a device is looked up once.
"""

import contextlib
import functools
import itertools
import os
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from triton import knobs

from fastgpt_kernels import INSTEAD

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
KINDS = ("16-bit", "tf32", "float32")
# Waits for the GPU in order to check what only the data can show, such as targets out of range.
DEBUG = os.environ.get("FASTGPT_DEBUG") == "1"
# Whether the kernels run in Triton's interpreter, on the CPU: settled when triton is imported.
INTERPRETED = knobs.runtime.interpret


class Config(NamedTuple):
    """A row of the launch table: the tile that one program works on, and with how many warps and stages."""

    rows: int
    columns: int
    warps: int
    stages: int = 1

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns} w{self.warps} s{self.stages}"

    def constants(self) -> dict[str, int]:
        """The arguments that every kernel takes.

        A product and a sum become one instruction, rounded once, whatever the default of the installed Triton.
        """
        tile = {"ROWS": self.rows, "COLUMNS": self.columns}
        return tile | {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


class Launch(NamedTuple):
    """A kernel with everything that it is called with. Calling it launches it."""

    name: str  # in the table
    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: dict[str, Any]

    def __call__(self) -> None:
        device = next(arg.device for arg in self.args if isinstance(arg, torch.Tensor))
        # Triton launches on the current device, which need not be the tensors'.
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            self.kernel[self.grid](*self.args, **self.constants)


Rows = dict[int, Config]
Table = dict[str, dict[tuple[str, str], Rows]]  # kernel -> (target, kind) -> width -> row

ANY = 1 << 62  # the width that is written `any`
TABLE_FILE = Path(__file__).with_name("launch_table.toml")
# What the names in that file stand for. Of two that stand for the same row, the later one counts.
SECTIONS = {"all": ("16-bit", "float32"), **{kind: (kind,) for kind in KINDS}}
COLUMNS = {"all": TARGETS, **{target: (target,) for target in TARGETS}}


def read_table(text: str) -> Table:
    """The table that launch_table.toml holds, from its text, which begins with a description of the notation.

    Raises:
        ValueError: names the entry that is not as described there.
    """
    try:
        read = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{TABLE_FILE.name}: {error}") from None
    table: Table = {}
    for kernel, sections in read.items():
        rows: dict[tuple[str, str], Rows] = {(target, kind): {} for target in TARGETS for kind in KINDS}
        for section in _known(f"[{kernel}]", sections, SECTIONS):
            for width, tiles in sections[section].items():
                place = f"[{kernel}.{section}] {width}"
                number = ANY if width == "any" else _number(place, width)
                for column in _known(place, tiles, COLUMNS):
                    for key in itertools.product(COLUMNS[column], SECTIONS[section]):
                        rows[key][number] = _config(f"{place} {column}", tiles[column])
        table[kernel] = {key: dict(sorted(by_width.items())) for key, by_width in rows.items() if by_width}
    return table


def _known(place: str, given: Any, known: dict[str, tuple[str, ...]]) -> list[str]:
    """The given names, in the order of the known ones."""
    unknown = given.keys() - known.keys() if isinstance(given, dict) else [given]
    if unknown:
        raise _bad(place, min(map(str, unknown)), ", ".join(known))
    return [name for name in known if name in given]


def _number(place: str, width: str) -> int:
    if not (width.isdecimal() and int(width) > 0):
        raise _bad(place, width, "a width above 0, or any")
    return int(width)


def _config(place: str, tile: Any) -> Config:
    """A row from how `str` writes it. Triton's tiles and warps are powers of two."""
    found = re.fullmatch(r"(\d+)x(\d+) w(\d+) s(\d+)", str(tile), re.ASCII)
    config = Config(*map(int, found.groups())) if found else None
    if config is None or 0 in config or any(n & (n - 1) for n in config[:3]):
        raise _bad(place, tile, "ROWSxCOLUMNS wWARPS sSTAGES, powers of two but for the stages, as in 128x64 w8 s3")
    return config


def _bad(place: str, value: Any, expected: str) -> ValueError:
    return ValueError(f"{TABLE_FILE.name}: {place}: {value!r} is not known; expected {expected}")


TABLE = read_table(TABLE_FILE.read_text(encoding="utf-8"))

# Programs that share the rows of a backward pass: about two a multiprocessor. A constant, because it fixes the order
# in which the partial sums of the weight's gradient are added, and so its bits.
PROGRAMS = {"sm_80": 216, "sm_90": 264, "sm_100": 296, "gfx942": 608}
# Programs that share the keys of a decode step, at the most, beside one a sequence: about eight a multiprocessor. As it
# waits for memory alone, what counts is that as many blocks as find room are reading at any time.
DECODE_PROGRAMS = {"sm_80": 864, "sm_90": 1056, "sm_100": 1184, "gfx942": 2432}


class Tuning(NamedTuple):
    """The part of the table for one target and one kind of dtype."""

    target: str
    kind: str

    def row(self, kernel: str, width: int) -> Config:
        """The narrowest row that serves this width: a head size or a number of columns."""
        return _row(kernel, self.target, self.kind, width)

    @property
    def programs(self) -> int:
        return PROGRAMS[self.target]

    @property
    def decode_programs(self) -> int:
        return DECODE_PROGRAMS[self.target]


@functools.cache
def _row(kernel: str, target: str, kind: str, width: int) -> Config:
    rows = TABLE[kernel][target, kind]
    return rows[min(ceiling for ceiling in rows if ceiling >= width)]


@contextlib.contextmanager
def trial(kernel: str, tuning: Tuning, width: int, row: Config) -> Iterator[None]:
    """Within the block, launch with this row in the place of the one that serves the width. For bench/tune.py alone."""
    rows = TABLE[kernel][tuning]
    ceiling = min(ceiling for ceiling in rows if ceiling >= width)
    own = rows[ceiling]
    try:
        rows[ceiling] = row
        _row.cache_clear()
        yield
    finally:
        rows[ceiling] = own
        _row.cache_clear()


@functools.cache
def tuning(device: torch.device, dtype: torch.dtype) -> Tuning:
    """The rows of the table for tensors like these; dtypes of 16 bits share their rows."""
    return Tuning(architecture(device), "float32" if dtype == torch.float32 else "16-bit")


def matmul_tuning(device: torch.device, dtype: torch.dtype) -> Tuning:
    """As `tuning`, for kernels that multiply matrices: in tf32 where PyTorch's own float32 products are."""
    asked = torch.backends.cuda.matmul.fp32_precision == "tf32"
    if asked and dtype == torch.float32 and device.type == "cuda" and not torch.version.hip:
        return Tuning(architecture(device), "tf32")
    return tuning(device, dtype)


@functools.cache
def architecture(device: torch.device) -> str:
    """The target whose rows this device runs; in the interpreter those of sm_90.

    Those of sm_80 also serve other NVIDIA chips from compute capability 8.0 on, whose blocks have 99 KiB of shared
    memory, for which only tf32 with a head size above 128 asks too much.
    """
    if device.type == "cpu":
        return "sm_90"
    if torch.version.hip:
        return "gfx942"
    major = torch.cuda.get_device_capability(device)[0]
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


def check_tensors(op: str, dims: dict[str, int | None], **tensors: torch.Tensor | None) -> None:
    """Tensors that kernels can work on: floating, on one device that runs them, of the given number of dimensions.

    Args:
        op: the public function's name.
        dims: how many dimensions each tensor has; None for any from 1 on.

    Raises:
        ValueError: names the argument, what it is and what was expected.
    """
    given = {name: t for name, t in tensors.items() if t is not None}
    first = next(iter(given))
    device = given[first].device
    for name, t in given.items():
        wanted = dims[name]
        if t.dim() != wanted if wanted is not None else t.dim() == 0:
            expected = f"{wanted} dimensions" if wanted is not None else "at least 1 dimension"
            raise ValueError(f"{op}: {name} has shape {tuple(t.shape)}; expected {expected}")
        if t.dtype not in DTYPES:
            raise ValueError(f"{op}: {name} {tuple(t.shape)} is {t.dtype}; expected float32, float16 or bfloat16")
        if t.device != device:
            raise ValueError(f"{op}: {name} {tuple(t.shape)} is on {t.device}; expected {device}, as {first}")
        if t.dtype == torch.bfloat16 and device.type == "cpu" and INTERPRETED:
            raise ValueError(
                f"{op}: {name} {tuple(t.shape)} is bfloat16, which Triton's interpreter computes wrongly; "
                "expected float32 or float16"
            )
    if device.type != "cuda" and not (device.type == "cpu" and INTERPRETED):
        raise ValueError(
            f"{op}: {first} {tuple(given[first].shape)} is on {device}; expected a CUDA GPU "
            f"(or TRITON_INTERPRET=1 in the environment, set before triton is imported, for a CPU); {INSTEAD}"
        )


def tiles(length: int, tile: int) -> int:
    """The number of tiles that cover a length."""
    return -(-length // tile)


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """(..., C) -> (rows, C) with neighbouring columns side by side; a view wherever one exists."""
    rows = x.flatten(0, -2) if x.dim() > 1 else x[None]
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of autocast here, None where it is off. Raises `ValueError` where that is computed wrongly."""
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    if device.type == "cpu" and dtype == torch.bfloat16 and INTERPRETED:
        raise ValueError("autocast is in bfloat16, which Triton's interpreter computes wrongly; expected float16")
    return dtype
