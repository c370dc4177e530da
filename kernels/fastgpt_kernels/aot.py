"""Compiles every row of the launch table to machine code, without a GPU, and reports what came out.

    python -m fastgpt_kernels.aot [--target sm_90] [--kernel attention_forward] [--json]

One line for each target, kernel and row, once `plain` and once in its `heaviest` variant, with every optional input.
Triton's own just-in-time path compiles them, so what is reported is what runs. `fastgpt_kernels.aot_table` describes
the columns.

`fastgpt_kernels.compile_report` keeps the report in a file. Exit code 2, with one line on stderr, for a bad flag or in
a process where TRITON_INTERPRET is set.
"""

import argparse
import contextlib
import difflib
import io
import json
import math
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NoReturn, cast

import torch
import triton
from rich.console import Console
from rich.progress import track
from triton import knobs
from triton.backends.compiler import GPUTarget

from fastgpt_kernels import (
    activation,
    attention,
    attention_backward,
    cross_entropy,
    int8,
    norm,
    norm_backward,
    paged,
    paged_decode,
    paged_prefill,
)
from fastgpt_kernels.aot_table import show
from fastgpt_kernels.launch import ANY, INTERPRETED, TABLE, TARGETS, Config, Launch, Tuning
from fastgpt_kernels.machine_code import CHIPS, blocks_per_sm, inspect, ptxas_warnings

VARIANTS = ("plain", "heaviest")
DTYPES = {"16-bit": torch.bfloat16, "float32": torch.float32, "tf32": torch.float32}


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor without memory, aligned as an allocation is."""
    return torch.empty(shape, dtype=dtype, device="meta")


def _other(dtype: torch.dtype) -> torch.dtype:
    """bfloat16 beside float32, and float32 beside 16 bits."""
    return torch.bfloat16 if dtype == torch.float32 else torch.float32


def _norm_launches(tuning: Tuning, C: int, heaviest: bool, centred: bool = True) -> list[Launch]:
    """Forward and backward of layer_norm without a bias; heaviest: add_layer_norm, its inputs in two dtypes."""
    R, dtype = 4096, DTYPES[tuning.kind]
    x, weight, statistic = empty(R, C, dtype=dtype), empty(C, dtype=dtype), empty(R)
    mean = statistic if centred else None
    if not heaviest:
        return [
            norm.forward_launch(None, x, mean, statistic, x, None, weight, None, 1e-5, tuning),
            *norm_backward.backward_launches(x, None, weight, None, None, x, x, mean, statistic, weight, tuning),
        ]
    other = empty(R, C, dtype=_other(dtype))
    total, weight = empty(R, C), empty(C)
    bias = weight if centred else None
    return [
        norm.forward_launch(total, total, mean, statistic, x, other, weight, bias, 1e-5, tuning),
        *norm_backward.backward_launches(x, other, weight, bias, x, x, x, mean, statistic, weight, tuning),
    ]


def _rms_norm_launches(tuning: Tuning, C: int, heaviest: bool) -> list[Launch]:
    """The same of rms_norm with a weight, and of add_rms_norm."""
    return _norm_launches(tuning, C, heaviest, centred=False)


def _swiglu_launches(tuning: Tuning, width: int, heaviest: bool) -> list[Launch]:
    """Up to 3072 columns of a half; heaviest: its gradients in another dtype than x."""
    R, width, dtype = 4096, min(width, 3072), DTYPES[tuning.kind]
    x, y = empty(R, 2 * width, dtype=dtype), empty(R, width, dtype=_other(dtype) if heaviest else dtype)
    return [activation.swiglu_forward_launch(y, x, tuning), activation.swiglu_backward_launch(x, y, x, tuning)]


def _relu2_launches(tuning: Tuning, N: int, heaviest: bool) -> list[Launch]:
    """Up to 2^20 numbers; heaviest: more than 2^31, their gradients in another dtype than x."""
    N, dtype = min(N, 2**32 if heaviest else 2**20), DTYPES[tuning.kind]
    x, y = empty(N, dtype=dtype), empty(N, dtype=_other(dtype) if heaviest else dtype)
    return [activation.relu2_launch(y, None, x, tuning), activation.relu2_launch(x, y, x, tuning)]


def _attention_launches(tuning: Tuning, D: int, heaviest: bool, dropout_p: float = 0.0) -> list[Launch]:
    """Forward and backward over 1024 positions; heaviest: documents, and four queries for a key."""
    B, T, H, dtype = 4, 1024, 12, DTYPES[tuning.kind]
    q, lse = empty(B, T, H, D, dtype=dtype), empty(B, H, T)
    k = empty(B, T, H // 4 if heaviest else H, D, dtype=dtype)
    dk = empty(B, T, H, D, dtype=torch.float32 if heaviest else dtype)
    seed = empty(dtype=torch.int64) if dropout_p else None
    doc_ids = empty(B, T, dtype=torch.int64) if heaviest else None
    rest = (seed, doc_ids, dropout_p, 1 / math.sqrt(D), tuning)
    return [
        attention.forward_launch(q, lse, q, k, k, *rest),
        *attention_backward.backward_launches(q, dk, dk, lse, q, q, lse, q, k, k, *rest),
    ]


def _dropout_launches(tuning: Tuning, D: int, heaviest: bool) -> list[Launch]:
    """As without dropout, but with it."""
    return _attention_launches(tuning, D, heaviest, dropout_p=0.1)


def _cross_entropy_launches(tuning: Tuning, V: int, heaviest: bool) -> list[Launch]:
    """The loss of up to GPT-2's padded vocabulary; heaviest: with its gradient, each row's scaled, and capped."""
    R, V, dtype = 4096, min(V, 50304), DTYPES[tuning.kind]
    loss, lse, targets = empty(R), empty(R, 2), empty(R, dtype=torch.int64)
    factor, valid = (loss, V - 47) if heaviest else (None, V)
    logits, gradient = empty(R, V), empty(R, V, dtype=dtype) if heaviest else None
    return [
        cross_entropy.gradient_launch(
            logits, gradient, loss, lse, targets, factor, valid, -100, 30.0 * heaviest, tuning
        )
    ]


def _scale_launches(tuning: Tuning, N: int, heaviest: bool) -> list[Launch]:
    """A gradient times a number, from float32 to the row's dtype; heaviest: more than 2^31 of them."""
    N = min(N, 2**32 if heaviest else 2**20)
    return [cross_entropy.scale_launch(empty(N, dtype=DTYPES[tuning.kind]), empty(N), empty(), tuning)]


def _decode_launches(tuning: Tuning, D: int, heaviest: bool, group: int = 1) -> list[Launch]:
    """A token each for 64 sequences that cannot be split; heaviest: for 256 with 2048 pages each, which are."""
    B, M, H, dtype = (256, 2048, 32, DTYPES[tuning.kind]) if heaviest else (64, 8, 32, DTYPES[tuning.kind])
    q, pages = empty(B, H, D, dtype=dtype), empty(B * M, 16, H // group, D, dtype=dtype)
    table, lengths = empty(B, M, dtype=torch.int32), empty(B, dtype=torch.int32)
    return paged_decode.decode_launches(q, q, pages, pages, table, lengths, 1 / math.sqrt(D), 0, tuning)


def _grouped_launches(tuning: Tuning, D: int, heaviest: bool) -> list[Launch]:
    """As with a key head for each query head, but with one for four; heaviest: for all 32."""
    return _decode_launches(tuning, D, heaviest, group=32 if heaviest else 4)


def _merge_launches(tuning: Tuning, D: int, heaviest: bool) -> list[Launch]:
    """The partial results of 64 sequences of up to 16,384 tokens; heaviest: 4096 sequences."""
    B, H, dtype = 4096 if heaviest else 64, 32, DTYPES[tuning.kind]
    q, pages = empty(B, H, D, dtype=dtype), empty(B, 16, H, D, dtype=dtype)
    table, lengths = empty(B, 1024, dtype=torch.int32), empty(B, dtype=torch.int32)
    return paged_decode.decode_launches(q, q, pages, pages, table, lengths, 1 / math.sqrt(D), 0, tuning)


def _prefill_launches(tuning: Tuning, D: int, heaviest: bool) -> list[Launch]:
    """4096 tokens of 16 sequences; heaviest: of 256, with four query heads for a key head."""
    B, N, H, dtype = 256 if heaviest else 16, 4096, 12, DTYPES[tuning.kind]
    q, pages = empty(N, H, D, dtype=dtype), empty(N, 16, H // 4 if heaviest else H, D, dtype=dtype)
    table, lengths, starts = (empty(*shape, dtype=torch.int32) for shape in ((B, 64), (B,), (B + 1,)))
    return [paged_prefill.prefill_launch(q, q, pages, pages, table, lengths, starts, 1 / math.sqrt(D), tuning)]


def _kv_write_launches(tuning: Tuning, D: int, heaviest: bool) -> list[Launch]:
    """The keys and values of 4096 tokens; heaviest: with a head size that is no power of two."""
    N, H, D, dtype = 4096, 12, D - 8 if heaviest else D, DTYPES[tuning.kind]
    k, pages = empty(N, 3 * H, D, dtype=dtype)[:, H : 2 * H], empty(512, 16, H, D, dtype=dtype)
    return [paged.kv_write_launch(k, k, pages, pages, empty(N, dtype=torch.int64), tuning)]


def _int8_launches(tuning: Tuning, R: int, heaviest: bool) -> list[Launch]:
    """Up to 4096 rows by GPT-2's widest layer; heaviest: a bias, a float32 result, inputs that end within a tile."""
    R, outputs, inputs, dtype = min(R, 4096), 3072, 784 if heaviest else 768, DTYPES[tuning.kind]
    x, y = empty(R, inputs, dtype=dtype), empty(R, outputs, dtype=torch.float32 if heaviest else dtype)
    weight, scale = empty(outputs, inputs, dtype=torch.int8), empty(outputs)
    return [int8.linear_launch(y, x, weight, scale, scale if heaviest else None, tuning)]


def _int8_rows_launches(tuning: Tuning, outputs: int, heaviest: bool) -> list[Launch]:
    """As with many rows, but with one; heaviest: with four."""
    return _int8_launches(tuning, 4 if heaviest else 1, heaviest)


# For each kernel of the launch table: an example of its use at a width.
EXAMPLES: dict[str, Callable[[Tuning, int, bool], list[Launch]]] = {
    "norm_forward": _norm_launches,
    "norm_backward": _norm_launches,
    "norm_weight_partials": _norm_launches,
    "sum_partials": _norm_launches,
    "rms_norm_forward": _rms_norm_launches,
    "rms_norm_backward": _rms_norm_launches,
    "rms_norm_weight_partials": _rms_norm_launches,
    "swiglu_forward": _swiglu_launches,
    "swiglu_backward": _swiglu_launches,
    "relu2_forward": _relu2_launches,
    "relu2_backward": _relu2_launches,
    "cross_entropy": _cross_entropy_launches,
    "scale": _scale_launches,
    "attention_forward": _attention_launches,
    "attention_backward_queries": _attention_launches,
    "attention_backward_keys": _attention_launches,
    "attention_forward_dropout": _dropout_launches,
    "attention_backward_queries_dropout": _dropout_launches,
    "attention_backward_keys_dropout": _dropout_launches,
    "paged_decode": _decode_launches,
    "paged_decode_grouped": _grouped_launches,
    "paged_merge": _merge_launches,
    "paged_prefill": _prefill_launches,
    "kv_write": _kv_write_launches,
    "int8_rows": _int8_rows_launches,
    "int8_product": _int8_launches,
}


def example(kernel: str, tuning: Tuning, width: int, heaviest: bool) -> Launch:
    """The launch that the row of this width gives. Raises LookupError where no example reaches the row."""
    row = TABLE[kernel][tuning.target, tuning.kind][width]
    if kernel in EXAMPLES:
        for launch in EXAMPLES[kernel](tuning, width, heaviest):
            if launch.name == kernel and row.constants().items() <= launch.constants.items():
                return launch
    raise LookupError(
        f"no example in fastgpt_kernels.aot launches {kernel} {tuning.target} {tuning.kind} {width}: {row}"
    )


def describe(kind: str, width: int, row: Config, variant: str) -> str:
    """The column `config`, which is unique for a target and kernel."""
    dtype = "bfloat16" if kind == "16-bit" else kind
    return f"{dtype} {'any' if width == ANY else width} {row} {variant}"


class Driver:
    """Stands in for a GPU's driver, so that Triton compiles for a chip that is not there."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target)

    def get_current_stream(self, device: object) -> int:
        return 0


def start_worker(cache: str) -> None:
    """Make this process compile everything anew, and write nothing to stdout, which is the report's."""
    os.dup2(2, 1)
    knobs.cache.dir = cache
    knobs.compilation.always_compile = True
    knobs.nvidia.dump_ptxas_log = True


def rows(target: str, kernel: str) -> Iterator[tuple[str, str, int, str]]:
    """(config, kind, width, variant) for every row of a kernel on a target and every variant, in the table's order."""
    for (of, kind), by_width in TABLE[kernel].items():
        if of == target:
            for width, row in by_width.items():
                for variant in VARIANTS:
                    yield describe(kind, width, row, variant), kind, width, variant


def configs(target: str, kernel: str) -> list[str]:
    """The column `config` of every line that the report has of a kernel on a target."""
    return [config for config, *_ in rows(target, kernel)]


def examples(target: str, kernel: str, only: Collection[str] | None = None) -> list[tuple[str, Launch]]:
    """(config, launch) for every row of a kernel on a target and every variant, or for those of the configs given."""
    return [
        (config, example(kernel, Tuning(target, kind), width, variant == "heaviest"))
        for config, kind, width, variant in rows(target, kernel)
        if only is None or config in only
    ]


Task = tuple[str, str, Sequence[str]]  # a target, a kernel, and the configs to compile


def compile_rows(target: str, kernel: str, only: Collection[str]) -> list[dict[str, Any]]:
    """The report's lines for these configs of a kernel on a target, in the table's order."""
    return compile_launches(target, kernel, examples(target, kernel, only))


def compile_launches(target: str, kernel: str, launches: list[tuple[str, Launch]]) -> list[dict[str, Any]]:
    """The report's lines for these launches, each with its name in the column `config`.

    Raises:
        RuntimeError: one does not compile.
    """
    chip = CHIPS[target]
    triton.runtime.driver.set_active(cast(Any, Driver(chip.compiler)))
    lines, compiled = [], []
    for config, launch in launches:
        launch.kernel.device_caches.clear()
        start, log = time.perf_counter(), io.StringIO()
        try:
            with contextlib.redirect_stdout(log):
                compiled.append(launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.constants))
        except Exception as error:
            raise RuntimeError(f"{target} {kernel} {config} does not compile: {error}") from error
        seconds = round(time.perf_counter() - start, 3)
        warnings = ptxas_warnings(log.getvalue()) if chip.compiler.backend == "cuda" else None
        lines.append({"target": target, "kernel": kernel, "config": config, "warnings": warnings, "seconds": seconds})
    for line, binary, found in zip(lines, compiled, inspect(chip, compiled), strict=True):
        registers, stack, code = found
        shared, columns = binary.metadata.shared, getattr(binary.metadata, "tmem_size", 0)
        line |= {
            "registers": registers,
            "stack": stack,
            "spills": code.spills,
            "shared": shared,
            "blocks_per_sm": blocks_per_sm(chip, registers, shared, binary.metadata.num_warps, columns),
            "tensor_core": code.tensor_core,
            "waits": code.waits,
            "wide_loads": code.wide_loads,
            "warnings": line.pop("warnings"),
            "seconds": line.pop("seconds"),
        }
    return lines


def compile_tasks(tasks: Sequence[Task]) -> Iterator[list[dict[str, Any]]]:
    """`compile_rows` of each task in turn, in as many processes as there are processors."""
    for task in tasks:
        examples(*task)  # a row without an example shows at once, and not after minutes
    if not tasks:
        return
    workers = min(len(os.sched_getaffinity(0)), len(tasks))
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as cache:
        start = {"mp_context": multiprocessing.get_context("spawn"), "initializer": start_worker, "initargs": (cache,)}
        with ProcessPoolExecutor(workers, **start) as pool:
            parts = [pool.submit(compile_rows, *task) for task in tasks]
            show = track(parts, "compiling", console=console, transient=True, disable=not console.is_terminal)
            yield from (part.result() for part in show)


def report(targets: Sequence[str], kernels: Sequence[str]) -> list[dict[str, Any]]:
    """Compile every row of these; the lines, in order."""
    tasks = [(target, kernel, configs(target, kernel)) for target in targets for kernel in kernels]
    return [line for part in compile_tasks(tasks) for line in part]


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m fastgpt_kernels.aot", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--target", metavar="|".join(TARGETS), help="only this one; default: all")
    parser.add_argument("--kernel", metavar="NAME", help="only this one of the launch table; default: all")
    parser.add_argument("--json", action="store_true", help="print a list of objects instead of a table")
    flags = parser.parse_args(argv)
    for flag, value, known in (("--target", flags.target, TARGETS), ("--kernel", flags.kernel, tuple(TABLE))):
        if value not in (None, *known):
            near = difflib.get_close_matches(value, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            parser.error(f"{flag} {value!r} is not one of {', '.join(known)}{hint}")
    if INTERPRETED:
        parser.error("TRITON_INTERPRET is set, and an interpreter compiles nothing; unset it for this command")
    start = time.perf_counter()
    lines = report([flags.target] if flags.target else TARGETS, [flags.kernel] if flags.kernel else tuple(TABLE))
    if flags.json:
        print(json.dumps(lines, indent=1))
    else:
        show(lines, time.perf_counter() - start)
    return 0


if __name__ == "__main__":
    sys.exit(main())
