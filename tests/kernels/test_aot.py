"""The gate: every row of the launch table compiles to machine code that keeps to its chip's means.

To compile all rows takes 45 minutes of a core, so their report is kept in golden/compile/, one file for each version of
Triton. Every run checks that it is of the present sources and keeps to the rules, and compiles a row of each kernel;
`-m slow` compiles all. A Triton without a report skips, or is compiled where FASTGPT_COMPILE_UNKNOWN_TRITON=1.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import places

triton = pytest.importorskip("triton")

from fastgpt_kernels import aot, compile_report  # noqa: E402
from fastgpt_kernels.launch import TABLE, TARGETS, Config  # noqa: E402

KEYS = [
    *("target", "kernel", "config", "registers", "stack", "spills", "shared"),
    *("blocks_per_sm", "tensor_core", "waits", "wide_loads", "warnings"),
]
# These multiply matrices.
MATRIX = {kernel for kernel in TABLE if kernel.startswith("attention_")}
MATRIX |= {"paged_decode_grouped", "paged_prefill", "int8_product"}
KIB = 1024
# What one block may have. Rows of sm_80 also serve sm_86, sm_89 and sm_120, which have 99 KiB: those of 16 bits fit.
SHARED = {"sm_80": 163 * KIB, "sm_90": 227 * KIB, "sm_100": 227 * KIB, "gfx942": 64 * KIB}
# The least share of wide loads in 16 bits. Most kernels also read a few single numbers a row beside their matrices.
WIDE = {
    "norm_forward": 0.5,
    "norm_backward": 0.4,
    "norm_weight_partials": 0.5,
    "sum_partials": 1.0,
    "rms_norm_forward": 0.5,
    "rms_norm_backward": 0.4,
    "rms_norm_weight_partials": 0.5,
    **dict.fromkeys(("swiglu_forward", "swiglu_backward", "relu2_forward", "relu2_backward"), 1.0),
    "cross_entropy": 0.3,
    "scale": 0.6,
    **dict.fromkeys(MATRIX, 0.5),
    "paged_decode": 0.5,
    "paged_decode_grouped": 0.4,
    "paged_merge": 0.25,
    "kv_write": 0.6,
    "int8_rows": 0.4,
    "int8_product": 0.3,  # for tensor cores of sm_90, bytes are read 8 at a time
}
if triton.__version__.startswith("3.6."):  # it reads lse and delta, one number a row, with many instructions
    WIDE |= {kernel: 0.15 for kernel in MATRIX if "keys" in kernel}
REPORTS = places.GOLDEN / "compile"
REFRESH = "see what got worse, and commit the report: python -m fastgpt_kernels.compile_report tests/golden/compile"
COMPILE_UNKNOWN = "FASTGPT_COMPILE_UNKNOWN_TRITON"


def start(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command of Python, without Triton's interpreter."""
    outside = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = (sys.executable, *command)
    return subprocess.run(command, capture_output=True, text=True, env=outside | environment, check=False)


def compile_all(folder: Path) -> compile_report.Content:
    done = start("-m", "fastgpt_kernels.compile_report", str(folder))
    assert done.returncode == 0, done.stderr
    return compile_report.read(compile_report.path(folder))


def report_of_this_triton(folder: Path, elsewhere: Path) -> compile_report.Content:
    """The report in the folder. Where it has none, one made elsewhere if that is asked for; else skips."""
    if (file := compile_report.path(folder)).exists():
        return compile_report.read(file)
    if os.environ.get(COMPILE_UNKNOWN) != "1":
        pytest.skip(f"no report of Triton {triton.__version__} in {folder}; {COMPILE_UNKNOWN}=1 compiles all rows")
    return compile_all(elsewhere)


@pytest.fixture(scope="session")
def report(tmp_path_factory) -> compile_report.Content:
    return report_of_this_triton(REPORTS, tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="session")
def rows(report) -> list[dict]:
    """The report on every target."""
    return compile_report.lines(report)


def assert_is_current(report: compile_report.Content, sources: Path = compile_report.HERE) -> None:
    changed = compile_report.changes(report, sources)
    assert not changed, "\n".join([f"the kernels or their rows have changed; {REFRESH}", *changed])


def function_of(row: dict) -> str:
    """The kernel's function; those with dropout are the same ones."""
    return row["kernel"].removesuffix("_dropout")


def drawn(report: compile_report.Content) -> list[dict]:
    """One row of each kernel, drawn by a hash of all that it depends on: other sources draw other rows.

    It is plain and of 16 bits: the heaviest variant, and products in float32, take up to three times as long.
    """
    first: dict[str, tuple[str, dict]] = {}
    keys = [f"{triton.__version__} {group} {config}" for group, of in report.items() for config in of]
    for key, line in zip(keys, compile_report.lines(report), strict=True):
        if not (line["config"].startswith("bfloat16 ") and line["config"].endswith(" plain")):
            continue
        lot = (hashlib.sha256(key.encode()).hexdigest(), line)
        first[function_of(line)] = min(first.get(function_of(line), lot), lot, key=lambda lot: lot[0])
    return [line for _, line in first.values()]


def name(row: dict) -> str:
    return f"{row['target']} {row['kernel']} {row['config']}"


def only_16_bit(rows: list[dict]) -> list[dict]:
    return [row for row in rows if row["config"].startswith("bfloat16 ")]


def test_every_row_is_compiled_plain_and_heaviest(rows):
    expected = {
        f"{target} {kernel} {aot.describe(kind, width, row, variant)}"
        for kernel, by_target in TABLE.items()
        for (target, kind), by_width in by_target.items()
        for width, row in by_width.items()
        for variant in ("plain", "heaviest")
    }
    assert {name(row) for row in rows} == expected
    assert len(rows) == len(expected)


def test_the_report_is_of_the_present_sources_and_rows(report):
    assert_is_current(report)


COMPILE = """
import json, sys, tempfile
from pathlib import Path
from fastgpt_kernels import aot
with tempfile.TemporaryDirectory() as cache:
    aot.start_worker(cache)
    found = [line for target, kernel, config in json.loads(sys.argv[1])
             for line in aot.compile_rows(target, kernel, [config])]
Path(sys.argv[2]).write_text(json.dumps(found))
"""


def test_a_row_of_each_kernel_compiles_to_what_the_report_says(report, tmp_path):
    expected = drawn(report)
    assert {function_of(row) for row in expected} == {kernel.removesuffix("_dropout") for kernel in TABLE}
    places = json.dumps([[row["target"], row["kernel"], row["config"]] for row in expected])
    done = start("-c", COMPILE, places, str(tmp_path / "found.json"))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert all(row.pop("seconds") > 0 for row in found)
    assert found == expected


@pytest.mark.slow
def test_all_rows_compile_to_what_the_report_says(report, tmp_path):
    assert compile_all(tmp_path) == report


def test_changed_kernels_with_an_old_report_are_refused_with_the_command_that_renews_it(report, tmp_path):
    shutil.copytree(compile_report.HERE, tmp_path / "changed")
    with (tmp_path / "changed" / "cross_entropy.py").open("a", encoding="utf-8") as source:
        source.write("\ngradient_launch.changed = True\n")
    with pytest.raises(AssertionError) as refused:
        assert_is_current(report, tmp_path / "changed")
    assert f"{REFRESH}\n" in str(refused.value)
    assert "not compiled: sm_90 cross_entropy " in str(refused.value)
    assert "outdated: sm_90 cross_entropy " in str(refused.value)
    assert "attention" not in str(refused.value)


def test_other_sources_draw_other_rows(report):
    first = drawn(report)
    assert drawn(report) == first
    assert sorted(drawn({f"{group}0": of for group, of in report.items()}), key=name) != sorted(first, key=name)


def test_a_triton_without_a_report_skips_or_is_compiled_where_that_is_asked_for(report, tmp_path, monkeypatch):
    monkeypatch.setattr(triton, "__version__", "0.1.2")
    monkeypatch.delenv(COMPILE_UNKNOWN, raising=False)
    with pytest.raises(pytest.skip.Exception, match=rf"no report of Triton 0\.1\.2 .*{COMPILE_UNKNOWN}=1 compiles"):
        report_of_this_triton(REPORTS, tmp_path)

    def compiles(*command: str) -> subprocess.CompletedProcess[str]:
        assert command == ("-m", "fastgpt_kernels.compile_report", str(tmp_path))
        compile_report.write(tmp_path / "0.1.2.json", report)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(sys.modules[__name__], "start", compiles)
    monkeypatch.setenv(COMPILE_UNKNOWN, "1")
    assert report_of_this_triton(REPORTS, tmp_path) == report
    assert not (REPORTS / "0.1.2.json").exists()


def test_keys(rows):
    for row in rows:
        assert list(row) == KEYS
        assert 0 < row["registers"] <= (512 if row["target"] == "gfx942" else 255), name(row)


def test_16_bit_rows_spill_nothing(rows):
    assert [name(row) for row in only_16_bit(rows) if row["spills"] or row["stack"]] == []


def test_matrix_products_run_on_tensor_cores(rows):
    products = [row for row in rows if row["kernel"] in MATRIX and not row["config"].startswith("float32 ")]
    assert products
    assert [name(row) for row in products if not row["tensor_core"]] == []
    assert [name(row) for row in rows if row["kernel"] not in MATRIX and row["tensor_core"]] == []


def test_16_bit_products_overlap(rows):
    """C7515: ptxas found registers of a product in use, and so waits for each before it starts the next."""
    assert [f"{name(row)}: {row['warnings']}" for row in only_16_bit(rows) if row["warnings"]] == []
    hopper = [row for row in only_16_bit(rows) if row["target"] == "sm_90" and row["kernel"].startswith("attention_")]
    assert hopper
    # The scores, the gradient of the weights in the backward pass, and what is added up.
    most = {row["kernel"]: 2 if "forward" in row["kernel"] else 3 for row in hopper}
    assert [f"{name(row)}: {row['waits']}" for row in hopper if row["waits"] > most[row["kernel"]]] == []
    # Asynchronous products have 64 rows, so they are waited for; dk and dv of 256 channels have no such tile that fits.
    others = {(row["kernel"].removesuffix("_dropout"), row["config"].split()[1]) for row in hopper if not row["waits"]}
    assert others == {("attention_backward_keys", "256")}


def test_float32_products_are_not_rounded_to_tf32(rows):
    """Triton does so on sm_100 in some tiles, whatever precision it is asked for. AMD has such products in float32."""
    ieee = [row for row in rows if row["kernel"] in MATRIX and row["config"].startswith("float32 ")]
    assert ieee
    assert [name(row) for row in ieee if row["tensor_core"] and row["target"] != "gfx942"] == []


def test_shared_memory_fits(rows):
    assert [f"{name(row)}: {row['shared']}" for row in rows if row["shared"] > SHARED[row["target"]]] == []
    smaller = [row for row in only_16_bit(rows) if row["target"] == "sm_80"]
    assert [f"{name(row)}: {row['shared']}" for row in smaller if row["shared"] > 99 * KIB] == []


def test_a_block_fits_on_a_multiprocessor(rows):
    assert [name(row) for row in rows if row["blocks_per_sm"] < 1] == []


def test_16_bit_rows_load_wide(rows):
    """As they are plain: document numbers, in the heaviest variant of attention, are narrow by nature."""
    plain = [row for row in only_16_bit(rows) if row["config"].endswith(" plain")]
    narrow = [row for row in plain if (row["wide_loads"] or 0.0) < WIDE[row["kernel"]]]
    assert [f"{name(row)}: {row['wide_loads']}" for row in narrow] == []


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--target", "sm90"], ["--target 'sm90'", ", ".join(TARGETS), "did you mean sm_90?"]),
        (["--target", "h"], ["--target 'h'", ", ".join(TARGETS)]),
        (["--kernel", "norm_forwrd"], ["--kernel 'norm_forwrd'", "did you mean norm_forward?"]),
        (["--frobnicate"], ["--frobnicate"]),
    ],
)
def test_bad_usage_is_one_line(capsys, flags, expected):
    with pytest.raises(SystemExit) as exit:
        aot.main(flags)
    out, err = capsys.readouterr()
    assert exit.value.code == 2
    assert out == ""
    assert len(err.splitlines()) == 1
    for words in expected:
        assert words in err


def test_an_interpreter_compiles_nothing(capsys, monkeypatch):
    monkeypatch.setattr(aot, "INTERPRETED", True)
    with pytest.raises(SystemExit) as exit:
        aot.main([])
    out, err = capsys.readouterr()
    assert (exit.value.code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert "TRITON_INTERPRET is set" in err


def test_table_shows_every_column(capsys):
    keys = [*KEYS, "seconds"]
    line = dict.fromkeys(keys, 0) | {"target": "sm_90", "kernel": "norm_forward", "wide_loads": None, "seconds": 0.25}
    line |= {"config": "bfloat16 1024 1x1024 w1 s1 heaviest", "spills": 46, "registers": 255, "warnings": "C7515"}
    aot.show([line], 1.0)
    shown = capsys.readouterr().out
    for key in keys:
        assert key.replace("_", " ") in shown
    for value in ("sm_90", "norm_forward", "bfloat16 1024 1x1024 w1 s1 heaviest", "255", "46", "-", "C7515", "0.25"):
        assert value in shown
    assert "1 with stack or spills, 1 with warnings" in shown


def test_a_row_without_an_example_is_an_error(monkeypatch):
    key = ("sm_90", "16-bit")
    monkeypatch.setitem(TABLE, "new_kernel", {key: {64: Config(1, 64, 1)}})
    with pytest.raises(LookupError, match="launches new_kernel sm_90 16-bit 64: 1x64 w1 s1"):
        aot.examples("sm_90", "new_kernel")
    # A row that no width reaches, because its kernel is launched with another.
    monkeypatch.setitem(aot.EXAMPLES, "new_kernel", aot.EXAMPLES["sum_partials"])
    with pytest.raises(LookupError, match="launches new_kernel"):
        aot.examples("sm_90", "new_kernel")


ODD_SIZES = """
import torch, triton
from fastgpt_kernels import activation, aot, attention, attention_backward, cross_entropy, int8, norm, norm_backward
from fastgpt_kernels import paged, paged_decode, paged_prefill
from fastgpt_kernels.launch import Tuning
from fastgpt_kernels.machine_code import CHIPS

triton.runtime.driver.set_active(aot.Driver(CHIPS["sm_90"].compiler))
tuning, half = Tuning("sm_90", "16-bit"), torch.bfloat16
launches = []
for R, C in ((1, 1), (1, 9001), (7, 33)):
    x, weight, statistic = aot.empty(R, C, dtype=half), aot.empty(C, dtype=half), aot.empty(R)
    launches.append(norm.forward_launch(x, x, statistic, statistic, x, x, weight, weight, 1e-5, tuning))
    launches += norm_backward.backward_launches(x, None, weight, weight, x, x, x, statistic, statistic, weight, tuning)
    launches.append(norm.forward_launch(None, x, None, statistic, x, None, None, None, 1e-5, tuning))
    launches += norm_backward.backward_launches(x, None, None, None, None, x, x, None, statistic, None, tuning)
    halves = aot.empty(R, 2 * C, dtype=half)
    launches.append(activation.swiglu_forward_launch(x, halves, tuning))
    launches.append(activation.swiglu_backward_launch(halves, x, halves, tuning))
    launches += [activation.relu2_launch(x, dy, x, tuning) for dy in (None, x)]
for Tq, Tk, H, Hkv, D in ((1, 1, 1, 1, 16), (1, 70, 3, 1, 20)):
    q, k, lse = aot.empty(1, Tq, H, D, dtype=half), aot.empty(1, Tk, Hkv, D, dtype=half), aot.empty(1, H, Tq)
    dk = aot.empty(1, Tk, H, D)
    rest = (aot.empty(dtype=torch.int64), aot.empty(1, Tk, dtype=torch.int32), 0.1, 1.0, tuning)
    launches.append(attention.forward_launch(q, lse, q, k, k, *rest))
    launches += attention_backward.backward_launches(q, dk, dk, lse, q, q, lse, q, k, k, *rest)
for R, V, valid in ((1, 16, 1), (5, 48, 47)):
    logits, lse, targets = aot.empty(R, V), aot.empty(R), aot.empty(R, dtype=torch.int32)
    dz = aot.empty(R, V, dtype=half)
    launches.append(cross_entropy.gradient_launch(logits, dz, lse, lse, targets, None, valid, 1, 0.0, tuning))
    launches.append(cross_entropy.gradient_launch(logits, dz, None, lse, targets, lse, valid, -100, 0.0, tuning))
for B, H, Hkv, D, P, M in ((1, 1, 1, 1, 1, 1), (1, 1, 1, 80, 16, 64), (3, 6, 2, 20, 5, 99), (1, 40, 1, 33, 128, 9)):
    q, pages = aot.empty(B, H, D, dtype=half), aot.empty(7, P, Hkv, D, dtype=half)
    table, starts, slots = (aot.empty(*n, dtype=torch.int32) for n in ((B, 1 + M), (B + 1,), (B,)))
    cache = (q, pages, pages, table[:, 1:], table[:, 0])
    launches += paged_decode.decode_launches(q, *cache, 1.0, 0, tuning)
    launches += paged_decode.decode_launches(q, *cache, 1.0, 16, tuning)
    launches.append(paged_prefill.prefill_launch(q, *cache, starts, 1.0, tuning))
    k = aot.empty(B, Hkv, D, dtype=half)
    launches.append(paged.kv_write_launch(k, k, pages, pages, slots.long(), tuning))
for R, outputs, inputs in ((1, 1, 1), (3, 5, 33), (5, 1, 1), (70, 7, 33)):
    x, y, scale = aot.empty(R, inputs, dtype=half), aot.empty(R, outputs, dtype=half), aot.empty(outputs)
    weight = aot.empty(outputs, inputs, dtype=torch.int8)
    launches.append(int8.linear_launch(y, x, weight, scale, y[0], tuning))
for launch in launches:
    launch.kernel.device_caches.clear()
    launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.constants)
"""


@pytest.mark.slow
def test_sizes_of_one_and_odd_sizes_compile(tmp_path):
    """Triton makes a constant of an integer that is 1, and assumes nothing of one that is no multiple of 16."""
    done = start("-c", ODD_SIZES, TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
