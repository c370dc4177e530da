"""Faster rows for the launch table: sweeps tiles, warps and stages around the rows of one kernel.

    python bench/tune.py KERNEL [--target sm_90] [--dtype 16-bit|tf32|float32] [--width N] [--seconds S]
                         [--filter-only] [--write]

For each row it compiles every configuration near it for the chip, on the CPU and in as many processes as there are
processors. A configuration that does not compile, spills, uses stack, asks for more shared memory than a block can
have, fits no multiprocessor, loses the tensor cores or makes them wait for each product is never timed. Without a GPU
of that kind it stops here, and prints what would be timed. On one it times the others at the shapes of the benchmarks,
in turn with the present row, so that no drift decides; promising ones come first, then the nearest, and the best three
are timed again, more often. A winner has to be at least 2% faster by the geometric mean over the shapes, faster in
three rounds of four, and give the present row's outputs within the dtype's rounding. `--write` puts its row into
launch_table.toml, and changes nothing else there.

Then: python -m fastgpt_kernels.compile_report tests/golden/compile, tests/test_aot.py, and parity with pytest -m gpu.
Exit code 2 with one line for a kernel, target, dtype or width that is not in the table.
"""

import difflib
import functools
import itertools
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, where modules are named bench.*

import torch
from rich.console import Console
from rich.progress import track
from triton import knobs
from triton.runtime.errors import OutOfResources

from bench.tools import command_line, tune_table
from bench.tools.tune_cases import Workload, workloads
from fastgpt import cli
from fastgpt.errors import UsageError
from fastgpt.ops.gpu_clock import GpuClock
from fastgpt.system.files import write_atomic
from fastgpt_kernels import aot, launch
from fastgpt_kernels.launch import ANY, INTERPRETED, KINDS, TABLE, TABLE_FILE, TARGETS, Config, Launch, Tuning, trial
from fastgpt_kernels.machine_code import CHIPS

SMALLER_CHIPS = 99 * 1024  # bytes of shared memory of sm_86, sm_89 and sm_120, which run sm_80's rows of 16 bits
ROUNDS, FINAL_ROUNDS, FINALISTS = 3, 12, 3
TIMED_SECONDS, FEWEST_LAPS, MOST_LAPS = 0.008, 3, 32  # of one measurement
LARGER_THAN_A_CACHE = 256 << 20  # bytes
MOST = 48  # configurations around a row: those that are furthest from it seldom win, and take minutes to compile
LEAST_GAIN = 1.02
# The largest difference from the present row's outputs, as a share of their largest number: a few roundings.
TOLERANCE = {"16-bit": 2**-6, "tf32": 2**-8, "float32": 2**-15}


class Space(NamedTuple):
    """The changes that a kernel's row allows: the least of each side of its tile, None where that side has to stay."""

    rows: int | None
    columns: int | None
    stages: bool = False
    reach: int = 4  # how many times smaller or larger a number may become
    elements: int = 16384  # of a tile, at the most


PRODUCTS = Space(16, 16, True, 2, 256 * 256)  # tensor cores multiply 16 or more
DROPOUT = PRODUCTS._replace(columns=32)  # its random bits are made for 32 columns at a time
ONE_ROW = Space(None, 128)
WHOLE_ROWS = Space(1, None)
SPACES = {
    "norm_forward": WHOLE_ROWS,  # but ONE_ROW where a row is gone over in tiles
    "norm_backward": WHOLE_ROWS,
    "norm_weight_partials": Space(1, 32),
    "sum_partials": Space(1, 16),
    "rms_norm_forward": WHOLE_ROWS,
    "rms_norm_backward": WHOLE_ROWS,
    "rms_norm_weight_partials": Space(1, 32),
    "swiglu_forward": Space(1, 128),
    "swiglu_backward": Space(1, 128),
    "relu2_forward": ONE_ROW,
    "relu2_backward": ONE_ROW,
    "cross_entropy": ONE_ROW,
    "scale": ONE_ROW,
    "attention_forward": PRODUCTS,
    "attention_forward_dropout": DROPOUT,
    "attention_backward_queries": PRODUCTS,
    "attention_backward_queries_dropout": DROPOUT,
    "attention_backward_keys": PRODUCTS,
    "attention_backward_keys_dropout": DROPOUT,
    "paged_decode": Space(None, 4, True),
    "paged_decode_grouped": Space(None, 16, True),
    "paged_merge": WHOLE_ROWS,
    "paged_prefill": PRODUCTS,
    "kv_write": WHOLE_ROWS,
    "int8_rows": Space(1, 32, True, 2),
    "int8_product": PRODUCTS,
}

# Configurations that look good compiled, of which some are too far from their row to be found around it: tiles of
# attention at GPT-2's head size whose products overlap, with two blocks a multiprocessor or with fewer, larger loads.
PROMISING = {
    ("attention_forward", "sm_90", "16-bit", 64): (Config(64, 128, 4, 2), Config(128, 128, 8, 2)),
    ("attention_backward_queries", "sm_90", "16-bit", 64): (Config(64, 128, 4, 2),),
    ("attention_backward_keys", "sm_90", "16-bit", 64): (Config(64, 64, 4, 3),),
    # By Triton up to 3.7 these spill nothing.
    ("attention_forward", "sm_90", "16-bit", 256): (Config(128, 32, 8, 3),),
    ("attention_backward_keys", "sm_90", "16-bit", 256): (Config(16, 64, 8, 2),),
}


@dataclass(frozen=True)
class Row:
    """A row of the launch table, and its place."""

    kernel: str
    tuning: Tuning
    width: int
    config: Config

    def __str__(self) -> str:
        width = "any" if self.width == ANY else self.width
        return f"{self.kernel} {self.tuning.target} {self.tuning.kind} {width}"


@dataclass(frozen=True)
class Timing:
    """The speed relative to the present row: the geometric mean over the workloads, round by round."""

    config: Config
    gains: tuple[float, ...]

    @property
    def gain(self) -> float:
        return statistics.median(self.gains)

    @property
    def is_better(self) -> bool:
        return self.gain >= LEAST_GAIN and statistics.quantiles(self.gains, n=4)[0] > 1.0


def space(row: Row) -> Space:
    """The changes that this row allows. Raises `LookupError` for a kernel that SPACES does not hold."""
    if row.kernel not in SPACES:
        raise LookupError(f"bench/tune.py does not know how a row of {row.kernel} may change; add it to SPACES")
    tiled = row.kernel.endswith(("norm_forward", "norm_backward")) and row.config.columns < row.width
    return ONE_ROW if tiled else SPACES[row.kernel]


def candidates(row: Row) -> list[Config]:
    """The PROMISING configurations of a row, then those around it, the nearest first; at most MOST."""
    kind, now, chip = space(row), row.config, CHIPS[row.tuning.target]
    most_warps = 1024 // chip.compiler.warp_size
    sides = [
        [side] if least is None else [n for n in _around(side, kind.reach) if n >= least]
        for side, least in ((now.rows, kind.rows), (now.columns, kind.columns))
    ]
    warps = [n for n in _around(now.warps, kind.reach) if n <= most_warps]
    stages = [n for n in range(now.stages - 1, now.stages + 3) if n >= 1] if kind.stages else [now.stages]
    around = [Config(*numbers) for numbers in itertools.product(*sides, warps, stages)]
    fitting = [c for c in around if c.rows * c.columns <= kind.elements]
    promising = PROMISING.get((row.kernel, row.tuning.target, row.tuning.kind, row.width), ())
    found = dict.fromkeys([*promising, *sorted(fitting, key=lambda c: distance(c, now))])
    return [c for c in found if c != now][:MOST]


def _around(number: int, reach: int) -> list[int]:
    """The powers of two from number / reach to number * reach, for a power of two."""
    return [n for n in (2**power for power in range(17)) if number <= n * reach and n <= number * reach]


def distance(a: Config, b: Config) -> float:
    """The number of doublings and stages between two configurations."""
    return sum(abs(math.log2(x / y)) for x, y in zip(a[:3], b[:3], strict=True)) + abs(a.stages - b.stages)


def compile_candidate(row: Row, config: Config) -> dict[str, Any] | str:
    """The facts of the compiled kernel, the worse of its variants; or why it does not compile."""
    target = row.tuning.target
    with trial(row.kernel, row.tuning, row.width, config):
        launches = [
            (variant, aot.example(row.kernel, row.tuning, row.width, variant == "heaviest")) for variant in aot.VARIANTS
        ]
        try:
            lines = aot.compile_launches(target, row.kernel, launches)
        except RuntimeError as error:
            return str(error).strip().splitlines()[-1]
    worst = {name: max(line[name] or 0 for line in lines) for name in ("registers", "stack", "spills", "shared")}
    worst["warnings"] = " ".join(sorted({line["warnings"] for line in lines if line["warnings"]})) or None
    return worst | {name: min(line[name] for line in lines) for name in ("blocks_per_sm", "tensor_core")}


def rejection(row: Row, found: dict[str, Any] | str, present: dict[str, Any] | str) -> str | None:
    """Why a configuration is not timed, None if it is; `present` is what the row shows as it stands in the table."""
    if isinstance(found, str):
        return "does not compile"
    target, kind = row.tuning
    largest = SMALLER_CHIPS if (target, kind) == ("sm_80", "16-bit") else CHIPS[target].largest_block
    if found["stack"] or found["spills"]:
        return "spills or uses stack"
    if found["shared"] > largest:
        return "too much shared memory"
    if found["blocks_per_sm"] == 0:
        return "fits no multiprocessor"
    if isinstance(present, dict) and present["tensor_core"] and not found["tensor_core"]:
        return "loses the tensor cores"
    if found["warnings"] and not (isinstance(present, dict) and present["warnings"]):
        return f"ptxas warns ({found['warnings']})"
    return None


def compile_all(row: Row, configs: Sequence[Config], cache: str, console: Console) -> list[dict[str, Any] | str]:
    """`compile_candidate` of each, in as many processes as there are processors."""
    workers = min(len(os.sched_getaffinity(0)), len(configs))
    start = {"mp_context": multiprocessing.get_context("spawn"), "initializer": aot.start_worker, "initargs": (cache,)}
    with ProcessPoolExecutor(workers, **start) as pool:
        parts = [pool.submit(compile_candidate, row, config) for config in configs]
        hidden = not console.is_terminal
        return [part.result() for part in track(parts, "compiling", console=console, transient=True, disable=hidden)]


def own(case: Workload, row: Row, config: Config) -> Launch:
    """Run the workload's chain with this configuration, so that every input is there; the kernel's own launch."""
    with trial(row.kernel, row.tuning, row.width, config):
        chain = case.launches(row.tuning)
    for step in chain:
        step()
    return next(step for step in chain if step.name == row.kernel)


def agrees(row: Row, config: Config, cases: Sequence[Workload]) -> bool:
    """Whether every output is the present row's, within the dtype's rounding."""
    for case in cases:
        own(case, row, row.config)
        expected = [output.float() for output in case.outputs]
        own(case, row, config)
        for before, after in zip(expected, case.outputs, strict=True):
            allowed = TOLERANCE[row.tuning.kind] * before.abs().max()
            if not bool(((after.float() - before).abs() <= allowed).all()):  # NaN is not below it either
                return False
    return True


@functools.cache
def _clock() -> tuple[GpuClock, torch.Tensor]:
    """The clock, and memory that leaves nothing else in the GPU's cache once it is written."""
    return GpuClock(), torch.empty(LARGER_THAN_A_CACHE, dtype=torch.uint8, device="cuda")


def seconds_of(step: Launch) -> float:
    """The median time of a launch on the GPU, whose cache is emptied before each."""
    clock, memory = _clock()
    laps = round(TIMED_SECONDS / max(clock.seconds(step), 1e-9))
    return statistics.median(clock.laps(step, max(FEWEST_LAPS, min(laps, MOST_LAPS)), before=memory.zero_))


def gains(row: Row, config: Config, cases: Sequence[Workload], rounds: int) -> Timing | None:
    """The present row's time divided by the configuration's, in turn; None where it cannot be launched."""
    try:
        pairs = [(own(case, row, row.config), own(case, row, config)) for case in cases]
    except OutOfResources:
        return None
    found = []
    for turn in range(rounds):
        logs = []
        for pair in pairs:
            both = pair if turn % 2 == 0 else pair[::-1]
            times = [seconds_of(one) for one in both]
            present, other = times if turn % 2 == 0 else times[::-1]
            logs.append(math.log(present / other))
        found.append(math.exp(statistics.fmean(logs)))
    return Timing(config, tuple(found))


def time_all(row: Row, configs: Sequence[Config], seconds: float, console: Console) -> Config | None:
    """The configuration that is faster than the present row beyond doubt, None where there is none."""
    cases = workloads(row.kernel, row.tuning, row.width, torch.device("cuda"))
    end, timings = time.monotonic() + seconds, []
    for place, config in enumerate(configs):
        if time.monotonic() > end:
            console.print(f"  --seconds are over: the {len(configs) - place} furthest were not timed", highlight=False)
            break
        if (timing := gains(row, config, cases, ROUNDS)) is not None:
            timings.append(timing)
    best = sorted(timings, key=lambda timing: timing.gain, reverse=True)[:FINALISTS]
    finals = [final for t in best if (final := gains(row, t.config, cases, FINAL_ROUNDS)) is not None]
    for final in sorted(finals, key=lambda timing: timing.gain, reverse=True):
        first, _, third = statistics.quantiles(final.gains, n=4)
        verdict = "faster" if final.is_better else "not beyond doubt"
        if final.is_better and not agrees(row, final.config, cases):
            verdict = "its output differs"
        spread = f"{first:.3f} to {third:.3f}"
        console.print(f"  {final.config}: {final.gain:.3f} times as fast ({spread}): {verdict}", highlight=False)
        if verdict == "faster":
            return final.config
    return None


def rows_of(kernel: str, target: str, kind: str | None, width: int | None) -> list[Row]:
    """The rows that the flags ask for. Raises `UsageError`, naming the nearest, for one that is not in the table."""
    if kernel not in TABLE:
        raise UsageError(f"KERNEL {kernel!r} is not in the launch table{cli.nearest(kernel, TABLE)}")
    kinds = [k for t, k in TABLE[kernel] if t == target and kind in (None, k)]
    if not kinds:
        raise UsageError(f"--dtype {kind}: {kernel} has no rows of it for {target}")
    rows = []
    for tuning in (Tuning(target, k) for k in kinds):
        ceilings = TABLE[kernel][tuning]
        if width is not None and width > max(ceilings):
            raise UsageError(f"--width {width}: the widest row of {kernel} serves {max(ceilings)}")
        chosen = ceilings if width is None else [min(c for c in ceilings if c >= width)]
        rows += [Row(kernel, tuning, ceiling, ceilings[ceiling]) for ceiling in chosen]
    return rows


def sweep(rows: Sequence[Row], seconds: float, timing: bool, console: Console) -> Iterator[tuple[Row, Config]]:
    """Filter, and time, around each row; yields what is faster."""
    with tempfile.TemporaryDirectory() as cache:
        knobs.cache.dir = cache  # what the filter compiled is what is timed
        for row in rows:
            configs = candidates(row)
            present, *found = compile_all(row, [row.config, *configs], cache, console)
            reasons = [rejection(row, one, present) for one in found]
            kept = zip(configs, found, reasons, strict=True)
            left = [(config, one) for config, one, why in kept if why is None and isinstance(one, dict)]
            counts = Counter(reason for reason in reasons if reason)
            counted = f" ({', '.join(f'{n} {reason}' for reason, n in counts.items())})" if counts else ""
            console.print(
                f"{row}, now {row.config}: {len(left)} of {len(configs)} to be timed{counted}", highlight=False
            )
            if timing:
                faster = time_all(row, [config for config, _ in left], seconds / len(rows), console)
                if faster is not None:
                    yield row, faster
                continue
            for config, one in left:
                facts = ", ".join(f"{name} {value}" for name, value in one.items() if name not in ("stack", "spills"))
                console.print(f"  {config}: {facts}", highlight=False)


def main(argv: Sequence[str] | None = None) -> int:
    parser = command_line.Parser(prog="python bench/tune.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("kernel", metavar="KERNEL", help=", ".join(TABLE))
    parser.add_argument("--target", help=f"{', '.join(TARGETS)}; default: the GPU's, or sm_90")
    parser.add_argument("--dtype", choices=KINDS, help="default: every one that the kernel has rows for")
    parser.add_argument(
        "--width", type=int, metavar="N", help="only the row that serves this width; default: every row"
    )
    parser.add_argument("--seconds", type=command_line.positive, default=300.0, help="for timing, in all; default 300")
    parser.add_argument("--filter-only", action="store_true", help="time nothing, also where there is a GPU")
    parser.add_argument("--write", action="store_true", help="put the faster rows into launch_table.toml")
    flags = parser.parse_args(argv)
    if INTERPRETED:
        parser.error("TRITON_INTERPRET is set, and an interpreter compiles nothing; unset it for this command")
    here = launch.architecture(torch.device("cuda")) if torch.cuda.is_available() else None
    target = flags.target or here or "sm_90"
    if target not in TARGETS:
        near = difflib.get_close_matches(target, TARGETS, n=1)
        parser.error(
            f"--target {target!r} is not one of {', '.join(TARGETS)}{f'; did you mean {near[0]}?' if near else ''}"
        )
    if flags.width is not None and flags.width < 1:
        parser.error(f"--width {flags.width} is not a width; give at least 1")
    console = Console()
    timing = here == target and not flags.filter_only
    if not timing and flags.write:
        parser.error(f"--write needs timings, and nothing is timed {'with --filter-only' if here else 'without a GPU'}")
    rows = rows_of(flags.kernel, target, flags.dtype, flags.width)
    faster = 0
    for row, config in sweep(rows, flags.seconds, timing, console):
        faster += 1
        console.print(f"  {row}: {row.config} -> {config}", highlight=False)
        if flags.write:
            text = TABLE_FILE.read_text(encoding="utf-8")
            write_atomic(TABLE_FILE, tune_table.replace(text, row.kernel, *row.tuning, row.width, config))
            console.print(f"  written into {TABLE_FILE.name}", highlight=False)
    if timing:
        console.print(f"{faster} of {len(rows)} rows have a faster one", highlight=False)
    else:
        console.print(
            f"nothing was timed: {'--filter-only' if here == target else f'no {target} GPU here'}", highlight=False
        )
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
