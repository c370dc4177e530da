"""How kernels are launched: one table of tiles, warps and stages, and the checks of what comes in.

A row is found by (kernel, architecture, dtype, width), where the width is a head size or a number of columns and each
row serves widths up to its own. The same rows are what `python -m fastgpt_kernels.aot` compiles, so no row is launched
that was not compiled before. Nothing here asks the device, tunes or waits: a device is looked up once.
"""

import contextlib
import functools
import os
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from triton import knobs

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
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


def _everywhere(rows: Rows, *tuned: tuple[str, str, Rows], **others: Rows) -> dict[tuple[str, str], Rows]:
    """The same rows for every target and dtype, but for some widths of the targets named.

    tuned: (target, dtype, rows) that bench/tune.py found to be faster, for one target and dtype.
    """
    table = {(target, kind): rows | others.get(target, {}) for target in TARGETS for kind in ("16-bit", "float32")}
    for target, kind, faster in tuned:
        table[target, kind] |= faster
    return table


HEAD_SIZES = (32, 64, 128, 256)
ROW_COUNTS = (16, 64, 1 << 31)


def _tiles(widths: tuple[int, ...], tiles: tuple[str, ...]) -> Rows:
    """Rows for the last of these widths, written as `str` writes them: rows x columns, warps, stages."""
    numbers = ([int(n) for n in re.findall(r"\d+", tile)] for tile in tiles)
    return {width: Config(*n) for width, n in zip(widths[-len(tiles) :], numbers, strict=True)}


def _by_head(*tiles: str) -> Rows:
    """For the last of HEAD_SIZES: queries x keys."""
    return _tiles(HEAD_SIZES, tiles)


def _by_rows(*tiles: str) -> Rows:
    """For the last of ROW_COUNTS: rows x output channels."""
    return _tiles(ROW_COUNTS, tiles)


TABLE: dict[str, dict[tuple[str, str], Rows]] = {
    # Widths are columns; above 8192 the kernels go over a row in tiles.
    "norm_forward": _everywhere(
        {
            128: Config(8, 128, 4),
            256: Config(4, 256, 4),
            512: Config(2, 512, 4),
            1024: Config(1, 1024, 1),
            2048: Config(1, 2048, 2),
            4096: Config(1, 4096, 4),
            8192: Config(1, 8192, 8),
            65536: Config(1, 4096, 8),
        },
        sm_80={8192: Config(1, 8192, 32)},
        gfx942={128: Config(8, 128, 2), 256: Config(4, 256, 2), 512: Config(2, 512, 2)},  # its warps are twice as wide
    ),
    "norm_backward": _everywhere(
        {
            128: Config(16, 128, 4),
            256: Config(8, 256, 4),
            512: Config(4, 512, 4),
            1024: Config(2, 1024, 4),
            2048: Config(2, 2048, 8),
            4096: Config(1, 4096, 8),
            8192: Config(1, 8192, 16),
            65536: Config(1, 4096, 8),
        }
    ),
    "norm_weight_partials": _everywhere({65536: Config(8, 256, 4)}),
    "sum_partials": _everywhere({65536: Config(32, 32, 4)}),
    # One row of logits a program, gone over in tiles; widths are the vocabulary's.
    "cross_entropy": _everywhere(
        {1024: Config(1, 1024, 4), 1 << 31: Config(1, 4096, 8)}, gfx942={1024: Config(1, 1024, 2)}
    ),
    "scale": _everywhere({1 << 62: Config(1, 1024, 4)}),
    "attention_forward": {
        ("sm_80", "16-bit"): _by_head("128x128 w8 s2", "128x64 w8 s3", "128x32 w8 s3", "64x32 w8 s2"),
        ("sm_80", "tf32"): _by_head("128x32 w8 s2", "64x32 w8 s2", "32x32 w8 s1"),
        ("sm_80", "float32"): _by_head("32x32 w8 s1", "16x32 w8 s1"),
        ("sm_90", "16-bit"): _by_head("128x64 w8 s3", "128x64 w8 s3", "128x64 w8 s3", "64x32 w8 s3"),
        ("sm_90", "tf32"): _by_head("128x32 w8 s3", "128x32 w8 s3", "64x32 w8 s2"),
        ("sm_90", "float32"): _by_head("32x32 w8 s1", "16x32 w8 s1"),
        ("sm_100", "16-bit"): _by_head("128x64 w8 s3", "128x64 w8 s3", "128x64 w8 s3", "128x32 w8 s3"),
        ("sm_100", "tf32"): _by_head("128x32 w8 s3", "128x32 w8 s3", "64x32 w8 s2"),
        ("sm_100", "float32"): _by_head("32x32 w8 s1", "16x32 w8 s1"),
        ("gfx942", "16-bit"): _by_head("32x64 w4 s2", "128x64 w4 s3", "64x32 w4 s2", "64x32 w4 s2"),
        ("gfx942", "float32"): _by_head("32x32 w4 s1", "16x32 w4 s1"),
    },
    "attention_forward_dropout": {
        ("sm_80", "16-bit"): _by_head("128x128 w8 s2", "128x64 w8 s3", "128x32 w8 s3", "64x32 w8 s2"),
        ("sm_80", "tf32"): _by_head("128x32 w8 s2", "64x32 w8 s2", "32x32 w8 s1"),
        ("sm_80", "float32"): _by_head("16x32 w8 s2", "16x32 w8 s2"),
        ("sm_90", "16-bit"): _by_head("128x64 w8 s3", "128x64 w8 s3", "128x64 w8 s3", "64x32 w8 s3"),
        ("sm_90", "tf32"): _by_head("128x32 w8 s3", "128x32 w8 s3", "32x32 w8 s2"),
        ("sm_90", "float32"): _by_head("16x32 w8 s2", "16x32 w8 s2"),
        ("sm_100", "16-bit"): _by_head("128x64 w8 s3", "128x64 w8 s3", "128x32 w8 s3", "64x32 w8 s2"),
        ("sm_100", "tf32"): _by_head("128x32 w8 s3", "128x32 w8 s3", "32x32 w8 s2"),
        ("sm_100", "float32"): _by_head("16x32 w8 s2", "16x32 w8 s2"),
        ("gfx942", "16-bit"): _by_head("16x64 w4 s2", "128x64 w4 s3", "64x32 w4 s2", "64x32 w4 s2"),
        ("gfx942", "float32"): _by_head("32x32 w4 s1", "16x32 w4 s1"),
    },
    "attention_backward_queries": {
        ("sm_80", "16-bit"): _by_head("128x64 w8 s3", "128x64 w8 s3", "64x64 w8 s2", "32x32 w4 s2"),
        ("sm_80", "tf32"): _by_head("64x32 w8 s2", "32x32 w8 s2", "16x32 w8 s2"),
        ("sm_80", "float32"): _by_head("32x32 w8 s2", "16x32 w8 s2"),
        ("sm_90", "16-bit"): _by_head("128x64 w8 s3", "128x64 w8 s3", "128x64 w8 s3", "128x32 w8 s2"),
        ("sm_90", "tf32"): _by_head("128x32 w8 s2", "128x32 w8 s2", "32x32 w8 s2"),
        ("sm_90", "float32"): _by_head("32x32 w8 s2", "16x32 w8 s2"),
        ("sm_100", "16-bit"): _by_head("128x64 w8 s3", "128x64 w8 s3", "128x64 w8 s3", "128x32 w8 s2"),
        ("sm_100", "tf32"): _by_head("128x32 w8 s2", "128x32 w8 s2", "32x32 w8 s2"),
        ("sm_100", "float32"): _by_head("32x32 w8 s2", "16x32 w8 s2"),
        ("gfx942", "16-bit"): _by_head("64x64 w4 s2", "64x32 w4 s2", "64x32 w4 s2", "32x32 w4 s1"),
        ("gfx942", "float32"): _by_head("32x32 w4 s1", "16x32 w4 s1"),
    },
    "attention_backward_queries_dropout": {
        ("sm_80", "16-bit"): _by_head("128x64 w8 s3", "128x32 w8 s2", "64x32 w8 s2", "32x32 w4 s2"),
        ("sm_80", "tf32"): _by_head("64x32 w8 s2", "32x32 w8 s2", "16x32 w8 s2"),
        ("sm_80", "float32"): _by_head("32x32 w8 s2", "16x32 w8 s2"),
        ("sm_90", "16-bit"): _by_head("64x32 w4 s2", "128x32 w8 s2", "128x32 w8 s3", "128x32 w8 s3"),
        ("sm_90", "tf32"): _by_head("128x32 w8 s2", "128x32 w8 s2", "32x32 w8 s2"),
        ("sm_90", "float32"): _by_head("32x32 w8 s2", "16x32 w8 s2"),
        ("sm_100", "16-bit"): _by_head("128x64 w8 s3", "128x64 w8 s3", "128x64 w8 s3", "128x32 w8 s2"),
        ("sm_100", "tf32"): _by_head("128x32 w8 s2", "128x32 w8 s2", "32x32 w8 s2"),
        ("sm_100", "float32"): _by_head("32x32 w8 s2", "16x32 w8 s2"),
        ("gfx942", "16-bit"): _by_head("64x64 w4 s2", "64x32 w4 s2", "64x32 w4 s2", "16x32 w4 s2"),
        ("gfx942", "float32"): _by_head("32x32 w4 s1", "16x32 w4 s1"),
    },
    "attention_backward_keys": {
        ("sm_80", "16-bit"): _by_head("32x64 w4 s2", "32x128 w8 s2", "32x64 w8 s2", "32x32 w8 s2"),
        ("sm_80", "tf32"): _by_head("32x64 w8 s2", "32x32 w8 s2", "16x32 w8 s2"),
        ("sm_80", "float32"): _by_head("32x32 w8 s2", "16x32 w8 s2"),
        ("sm_90", "16-bit"): _by_head("64x64 w4 s2", "64x128 w8 s2", "32x128 w8 s2", "32x32 w8 s2"),
        ("sm_90", "tf32"): _by_head("32x128 w8 s2", "32x32 w4 s2", "32x32 w8 s2"),
        ("sm_90", "float32"): _by_head("32x32 w8 s2", "16x32 w8 s2"),
        ("sm_100", "16-bit"): _by_head("64x128 w8 s2", "64x128 w8 s2", "64x128 w8 s2", "32x64 w4 s2"),
        ("sm_100", "tf32"): _by_head("32x128 w8 s2", "32x32 w4 s2", "32x32 w8 s2"),
        ("sm_100", "float32"): _by_head("32x32 w8 s2", "16x32 w8 s2"),
        ("gfx942", "16-bit"): _by_head("32x64 w4 s2", "32x64 w4 s2", "32x32 w4 s2", "16x32 w4 s1"),
        ("gfx942", "float32"): _by_head("32x32 w4 s1", "16x32 w4 s1"),
    },
    "attention_backward_keys_dropout": {
        ("sm_80", "16-bit"): _by_head("32x64 w4 s2", "32x128 w8 s2", "32x32 w8 s2", "32x32 w8 s2"),
        ("sm_80", "tf32"): _by_head("32x64 w8 s2", "32x32 w8 s2", "16x32 w8 s2"),
        ("sm_80", "float32"): _by_head("32x32 w8 s2", "16x32 w8 s2"),
        ("sm_90", "16-bit"): _by_head("32x64 w4 s2", "32x128 w8 s2", "16x128 w8 s2", "32x32 w8 s2"),
        ("sm_90", "tf32"): _by_head("32x128 w8 s2", "32x32 w4 s2", "32x32 w8 s2"),
        ("sm_90", "float32"): _by_head("32x32 w8 s2", "16x32 w8 s2"),
        ("sm_100", "16-bit"): _by_head("64x128 w8 s2", "64x128 w8 s2", "32x128 w8 s2", "32x64 w8 s2"),
        ("sm_100", "tf32"): _by_head("32x128 w8 s2", "32x32 w4 s2", "32x32 w8 s2"),
        ("sm_100", "float32"): _by_head("32x32 w8 s2", "16x32 w8 s2"),
        ("gfx942", "16-bit"): _by_head("32x64 w4 s2", "32x64 w4 s2", "32x32 w4 s2", "16x32 w4 s1"),
        ("gfx942", "float32"): _by_head("32x32 w4 s1", "16x32 w4 s1"),
    },
    # Over pages, tiles are small and blocks many: a step is bound by memory, and what counts is bytes on their way.
    "paged_decode": _everywhere({64: Config(1, 32, 4, 4), 128: Config(1, 32, 8, 3), 256: Config(1, 8, 4, 4)}),
    "paged_decode_grouped": {
        ("sm_80", "16-bit"): _by_head("16x64 w4 s3", "16x64 w4 s2", "16x32 w4 s2"),
        ("sm_80", "tf32"): _by_head("16x32 w4 s2"),
        ("sm_80", "float32"): _by_head("16x32 w8 s2"),
        ("sm_90", "16-bit"): _by_head("16x64 w4 s5", "16x32 w4 s5", "16x32 w4 s3"),
        ("sm_90", "tf32"): _by_head("16x32 w4 s2"),
        ("sm_90", "float32"): _by_head("16x32 w8 s2"),
        ("sm_100", "16-bit"): _by_head("16x64 w4 s5", "16x32 w4 s5", "16x32 w4 s3"),
        ("sm_100", "tf32"): _by_head("16x32 w4 s2"),
        ("sm_100", "float32"): _by_head("16x32 w8 s2"),
        ("gfx942", "16-bit"): _by_head("16x64 w4 s2", "16x64 w4 s2", "16x32 w4 s2"),
        ("gfx942", "float32"): _by_head("16x32 w4 s1"),
    },
    "paged_merge": _everywhere({64: Config(32, 64, 4), 256: Config(8, 256, 4)}),
    "paged_prefill": {
        ("sm_80", "16-bit"): _by_head("64x64 w4 s3", "64x32 w4 s2", "32x32 w4 s2"),
        ("sm_80", "tf32"): _by_head("32x32 w4 s2", "16x32 w8 s2"),
        ("sm_80", "float32"): _by_head("16x32 w8 s2"),
        ("sm_90", "16-bit"): _by_head("128x64 w8 s3", "128x64 w8 s3", "64x32 w8 s3"),
        ("sm_90", "tf32"): _by_head("32x32 w4 s2", "16x32 w8 s2"),
        ("sm_90", "float32"): _by_head("16x32 w8 s2"),
        ("sm_100", "16-bit"): _by_head("128x32 w8 s3", "128x64 w8 s3", "64x32 w8 s3"),
        ("sm_100", "tf32"): _by_head("32x32 w4 s2", "16x32 w8 s2"),
        ("sm_100", "float32"): _by_head("16x32 w8 s2"),
        ("gfx942", "16-bit"): _by_head("64x32 w4 s2", "64x32 w4 s2", "32x32 w4 s2"),
        ("gfx942", "float32"): _by_head("16x32 w4 s1"),
    },
    "kv_write": _everywhere({64: Config(32, 64, 4), 256: Config(8, 256, 4)}),
    # Output channels x inputs, whatever a layer has of both.
    "int8_rows": _everywhere({1 << 31: Config(4, 256, 1, 3)}, gfx942={1 << 31: Config(4, 256, 1, 2)}),
    # Widths are numbers of rows. From 64 output channels on, Triton takes tf32 for float32 on sm_100, unasked.
    "int8_product": {
        ("sm_80", "16-bit"): _by_rows("16x32 w2 s4", "64x32 w4 s4", "64x128 w4 s3"),
        ("sm_80", "tf32"): _by_rows("64x64 w4 s3"),
        ("sm_80", "float32"): _by_rows("64x32 w8 s2"),
        ("sm_90", "16-bit"): _by_rows("16x32 w2 s4", "64x32 w4 s4", "128x128 w8 s3"),
        ("sm_90", "tf32"): _by_rows("64x64 w4 s3"),
        ("sm_90", "float32"): _by_rows("64x32 w8 s2"),
        ("sm_100", "16-bit"): _by_rows("16x32 w2 s4", "64x32 w4 s4", "64x128 w4 s4"),
        ("sm_100", "tf32"): _by_rows("64x64 w4 s3"),
        ("sm_100", "float32"): _by_rows("64x32 w8 s2"),
        ("gfx942", "16-bit"): _by_rows("16x32 w2 s2", "64x32 w4 s2", "64x128 w4 s2"),
        ("gfx942", "float32"): _by_rows("64x32 w4 s1"),
    },
}

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
    """What the table holds for tensors like these; dtypes of 16 bits share their rows."""
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
        if t.dtype == torch.bfloat16 and device.type == "cpu":
            raise ValueError(
                f"{op}: {name} {tuple(t.shape)} is bfloat16, which Triton's interpreter computes wrongly; "
                "expected float32 or float16"
            )
    if device.type != "cuda" and not (device.type == "cpu" and INTERPRETED):
        raise ValueError(
            f"{op}: {first} {tuple(given[first].shape)} is on {device}; expected a CUDA GPU "
            "(or TRITON_INTERPRET=1 in the environment, set before triton is imported, for a CPU)"
        )


def tiles(length: int, tile: int) -> int:
    """How many tiles cover a length."""
    return -(-length // tile)


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """(..., C) -> (rows, C) with neighbouring columns side by side; a view wherever one exists."""
    rows = x.flatten(0, -2) if x.dim() > 1 else x[None]
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast computes in here, None where it is off. Raises `ValueError` where that is computed wrongly."""
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    if device.type == "cpu" and dtype == torch.bfloat16:
        raise ValueError("autocast is in bfloat16, which Triton's interpreter computes wrongly; expected float16")
    return dtype
