"""bench/report.py: result files with new and old keys, their tables and pictures, and what changed between two."""

import copy
import json
from pathlib import Path

import pytest

from bench import report
from bench.tools.measured import latest, read
from bench.tools.pictures import draw

LIMIT = {"by": "memory", "seconds": 0.5e-3, "copy_gbps": 4.0, "read_gbps": 5.0, "matmul_tflops": 0.1}
NEW_INFO = {
    "unit": "tokens",
    "units_per_second": 1000.0,
    "flops": 1e6,
    "bytes": 2.5e6,
    "limit": LIMIT | {"arithmetic": "float32"},
    "percent_of_limit": 50.0,
    "peak_memory": 3 << 20,
    "peers": {
        "stock": {"seconds": 3e-3, "spread": 0.3e-3, "units_per_second": 333.0, "ratio": 3.0},
        "plain": {"seconds": 2e-3, "spread": 0.0, "units_per_second": 500.0, "ratio": 2.0},
    },
    "best_peer": "plain",
    "ratio": 2.0,
    "aim": 2.5,
}
OLD_INFO = {
    "peer_name": "without a cache",
    "aim": 10,
    "peer_seconds": 4.6,
    "tokens_per_second": 455.2,
    "peer_tokens_per_second": 51.9,
    "ratio": 8.768,
}


def stats(median: float, iqr: float = 0.0, rounds: int = 5) -> dict:
    return {"median": median, "q1": median - iqr / 2, "q3": median + iqr / 2, "iqr": iqr, "rounds": rounds}


def entry(name: str, info: dict, seconds: dict, params: dict | None = None, group: str | None = None) -> dict:
    fullname = f"bench/bench_kernels.py::{name}"
    return {"fullname": fullname, "group": group, "params": params, "extra_info": info, "stats": seconds}


@pytest.fixture
def results(tmp_path: Path):
    """Writes entries as a result file of one device."""

    def save(entries: list[dict], name: str = "a.json", when: str = "2026-01-02T03:04:05+00:00", **machine) -> Path:
        path = tmp_path / "results" / "a-laptop" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "machine_info": {"cpu": "A CPU", "device": "CPU, 2 threads", "torch": "2.13.0"} | machine,
            "commit_info": {"id": "abcdef0123"},
            "datetime": when,
            "benchmarks": entries,
        }
        path.write_text(json.dumps(content), encoding="utf-8")
        return path

    return save


def test_new_keys(results):
    run = read(results([entry("test_norm[x]", NEW_INFO, stats(1e-3, 0.1e-3), {"T": 64, "variant": "fused", "aim": 3})]))
    assert (run.device, run.machine, run.commit, run.date) == (
        "a-laptop",
        "A CPU, 2 threads",
        "abcdef0",
        "2026-01-02T03:04:05",
    )
    (case,) = run.cases
    assert (case.group, case.family, case.title) == ("kernels", "norm", "norm: T 64, fused")
    assert case.best is not None
    assert (case.best.name, case.best.ratio) == ("plain", 2.0)
    assert case.best.ratio_spread == pytest.approx(2.0 * 0.1)
    assert {p.name: p.ratio_spread for p in case.peers}["stock"] == pytest.approx(3.0 * 2**0.5 * 0.1)
    assert case.aim is not None
    assert (case.aim.text, case.aim.met) == ("≥ 2.5", False)


def test_old_keys(results):
    cases = [
        entry("test_dense_cache", OLD_INFO, stats(0.527)),
        entry("test_first_step", {"aim_seconds": 10}, stats(2.14)),
        entry("test_growth", {"growth": 1.6, "aim_below": 1.5}, stats(0.6)),
        entry("test_no_aim", OLD_INFO | {"aim": "none"}, stats(0.5)),
    ]
    dense, first, growth, none = read(results(cases)).cases
    assert dense.best is not None
    assert (dense.best.name, dense.best.seconds, dense.best.ratio_spread) == ("without a cache", 4.6, None)
    assert dense.units_per_second == 455.2
    assert [case.aim and (case.aim.text, case.aim.met) for case in (dense, first, growth, none)] == [
        ("≥ 10", False),
        ("≤ 10 s", True),
        ("growth ≤ 1.5", False),
        None,
    ]


def test_every_committed_result_can_be_read():
    for path in report.command_line.RESULTS.rglob("*.json"):
        run = read(path)
        assert run.cases
        assert run.device == path.parent.name
        for case in run.cases:
            assert report.table_lines(case)


def test_the_newest_measurement_of_a_case_counts(results):
    old = read(results([entry("test_a", {}, stats(1.0)), entry("test_b", {}, stats(2.0))]))
    new = read(results([entry("test_a", {}, stats(3.0))], "b.json", "2026-02-01T00:00:00"))
    assert [(case.family, case.median) for case in latest([new, old])] == [("a", 3.0), ("b", 2.0)]


def test_readme_has_tables_newest_first(results, tmp_path: Path, capsys):
    a = results([entry("test_norm", NEW_INFO, stats(1e-3, 0.1e-3))])
    b = results([entry("test_dense_cache", OLD_INFO, stats(0.527))], "b.json", "2026-02-03T00:00:00")
    assert report.main([str(a), str(b), "--out", str(tmp_path / "results")]) == 0
    text = (tmp_path / "results" / "README.md").read_text(encoding="utf-8")
    assert text.index("2026-02-03 00:00, commit abcdef0") < text.index("2026-01-02 03:04, commit abcdef0")
    for cells in (
        "| norm | 1.00 ms ± 5% | 1,000 tokens | plain | 500 | 2.00 ± 0.10 | ≥ 2.5: missed | 50% (memory) | 3 MiB |",
        "|  |  |  | stock | 333 | 3.00 ± 0.21 |  |  |  |",
        "| dense cache | 527 ms ± 0% | 455 tokens | without a cache | 51.9 | 8.77 | ≥ 10: missed |",
        "A CPU, 2 threads; torch 2.13.0; [a.json](a-laptop/a.json)",
    ):
        assert cells in text
    for link in ("ratios-kernels", "roofline-norm"):
        assert f"(a-laptop/pictures/{link}.png)" in text
        assert (tmp_path / "results" / "a-laptop" / "pictures" / f"{link}.png").read_bytes().startswith(b"\x89PNG")


def test_pictures_are_drawn_where_there_is_data(results, tmp_path: Path):
    by_batch = [
        entry(f"test_decode[{B}]", NEW_INFO | {"units_per_second": 100.0 * B}, stats(1e-3), {"batch": B})
        for B in (1, 8, 64)
    ]
    shape = {"B": 4, "H": 12}
    by_length = [
        entry(
            f"test_kernel[{T}]", NEW_INFO | {"backend": backend, "shape": shape | {"T": T}}, stats(1e-3), group="attend"
        )
        for T in (256, 1024)
        for backend in ("triton", "torch", "reference")
    ]
    steps = {"allocation": {"ours": [0, 1 << 20, 0], "plain": [[0.0, 0], [0.5, 2 << 20], [1.0, 0]]}}
    times = {"profile": {"eager": [{"op": "mm", "microseconds": 50.0}], "compiled": [{"op": "mm", "microseconds": 20}]}}
    only_bytes = {key: value for key, value in NEW_INFO.items() if key != "flops"}
    peaks = {"T": [256, 512], "peak_bytes": {"triton": [1 << 20, 2 << 20], "reference": [1 << 22, 1 << 24]}}
    others = [
        entry("test_loss", peaks, stats(1.0), group="memory"),
        entry("test_step", steps, stats(1.0)),
        entry("test_profile", times, stats(1.0)),
        entry("test_write", only_bytes, stats(1.0)),
    ]
    paths = draw(read(results([*by_batch, *by_length, *others])).cases, tmp_path / "pictures")
    assert {path.stem for path in paths} == {
        "ratios-kernels",
        "ratios-attend",
        "profile-profile",
        "tokens-by-batch-decode",
        "tokens-by-context-attend",
        "memory-by-t-loss",
        "allocation-step",
        "roofline-attend",
        "roofline-decode",
        "roofline-write",
    }
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    assert draw([], tmp_path / "none") == []
    assert not (tmp_path / "none").exists()


def test_compare_tells_changes_from_noise(results, capsys):
    steady = entry("test_steady", {}, stats(1.0, 0.2))
    faster = entry("test_faster", {}, stats(1.0, 0.2))
    ratio = entry("test_ratio", copy.deepcopy(NEW_INFO), stats(1e-3, 0.1e-3))
    once = entry("test_once", {}, stats(1.0, rounds=1))
    gone = entry("test_gone", {}, stats(1.0))
    a = results([steady, faster, ratio, once, gone])
    slower_peer = copy.deepcopy(NEW_INFO)
    slower_peer["peers"]["plain"] |= {"seconds": 4e-3, "ratio": 4.0}
    b = results(
        [
            entry("test_steady", {}, stats(1.15, 0.2)),
            entry("test_faster", {}, stats(0.7, 0.2)),
            entry("test_ratio", slower_peer, stats(1e-3, 0.1e-3)),
            entry("test_once", {}, stats(9.0, rounds=1)),
            entry("test_new", {}, stats(1.0)),
        ],
        "b.json",
        cpu="Another",
    )
    assert report.main(["--compare", str(a), str(b)]) == 0
    out = capsys.readouterr().out
    lines = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    assert "-30.0%" in lines["faster"]
    assert lines["faster"].split()[-1] == "time"
    assert lines["ratio"].split()[-1] == "ratio"
    assert "4.00 ± 0.20" in lines["ratio"]
    assert "steady" not in lines
    assert "only in A: bench/bench_kernels.py::test_gone" in out
    assert "only in B: bench/bench_kernels.py::test_new" in out
    assert "2 changed, 1 within the noise; 1 with fewer than 3 rounds" in out
    assert "different machines" in out
    assert report.main(["--compare", str(a), str(a)]) == 0
    assert "0 changed, 4 within the noise; 1 with fewer" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "No such file"),
        ("{", "is no result"),
        ("[]", "is no result"),
        ('{"machine_info": {}}', "lacks 'datetime'"),
        ("nothing", "is no result"),
    ],
)
def test_a_missing_or_broken_file_is_one_line(tmp_path: Path, capsys, content: str | None, words: str):
    path = tmp_path / "broken.json"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    for flags in ([str(path), "--out", str(tmp_path)], ["--compare", str(path), str(path)]):
        assert report.cli.run(report.main, flags) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "broken.json" in line
        assert words in line


def test_the_machine_is_told_with_its_vector_instructions(results) -> None:
    """Processors of one brand differ in them by a factor of two."""
    case = entry("test_norm", NEW_INFO, stats(1e-3))
    assert read(results([case], instructions="AVX512")).machine == "A CPU, AVX512, 2 threads"
    assert read(results([case])).machine == "A CPU, 2 threads"
