"""bench/tune.py: which configurations it considers, what its filter lets through, and how it changes the table."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from bench import tune
from bench.tools import tune_table
from bench.tools.tune_cases import workloads
from bench.tune import Row, Timing, candidates, distance, rejection
from fastgpt_kernels import launch
from fastgpt_kernels.launch import ANY, TABLE, TABLE_FILE, TARGETS, Config, Tuning, read_table

TEXT = TABLE_FILE.read_text(encoding="utf-8")
HOPPER = Tuning("sm_90", "16-bit")
GOOD = {"stack": 0, "spills": 0, "shared": 1024, "blocks_per_sm": 2, "tensor_core": 8, "registers": 64}
GOOD |= {"warnings": None}


def row(kernel: str, width: int, tuning: Tuning = HOPPER) -> Row:
    return Row(kernel, tuning, width, TABLE[kernel][tuning][width])


def every_row() -> list[Row]:
    return [
        Row(kernel, Tuning(*key), width, config)
        for kernel in tune.SPACES
        for key, rows in TABLE[kernel].items()
        for width, config in rows.items()
    ]


def test_candidates_are_promising_and_then_near_the_row_and_nearest_first():
    now, first = Config(128, 64, 8, 3), [Config(64, 128, 4, 2), Config(128, 128, 8, 2)]
    found = candidates(Row("attention_forward", HOPPER, 64, now))
    assert Config(64, 64, 8, 3) in found
    assert Config(128, 128, 4, 3) in found
    assert len(found) == tune.MOST
    assert now not in found
    assert len(set(found)) == len(found)
    assert found[:2] == first
    assert [distance(c, now) for c in found[2:]] == sorted(distance(c, now) for c in found[2:])
    assert all(c.rows in (64, 128, 256) and c.columns in (32, 64, 128) and 2 <= c.stages <= 5 for c in found)


def test_candidates_keep_to_what_each_kernel_can_run():
    for one in every_row():
        for c in candidates(one):
            assert c.warps * tune.CHIPS[one.tuning.target].compiler.warp_size <= 1024, one
            for side in c[:2]:
                assert side & (side - 1) == 0, one
            if one.kernel.startswith("attention_") or one.kernel == "paged_prefill":
                assert min(c[:2]) >= (32 if "dropout" in one.kernel and c.rows >= 32 else 16), one
            if one.kernel.endswith("_dropout"):
                assert c.columns % 32 == 0, one
            if one.kernel.endswith(("norm_forward", "norm_backward")) or one.kernel in ("kv_write", "paged_merge"):
                assert c.columns == one.config.columns or c.rows == 1, one
            if one.kernel in ("cross_entropy", "scale", "paged_decode", "relu2_forward", "relu2_backward"):
                assert c.rows == 1, one
            if one.kernel.startswith(("norm_", "rms_norm_")) and one.width <= 8192:
                assert c.columns >= one.width, one


def test_promising_configurations_are_of_rows_in_the_table():
    for (kernel, target, kind, width), configs in tune.PROMISING.items():
        one = row(kernel, width, Tuning(target, kind))
        assert candidates(one)[: len(configs)] == [c for c in configs if c != one.config]


def test_every_kernel_of_the_table_can_be_tuned():
    assert tune.SPACES.keys() == TABLE.keys()


def test_the_filter_rejects_what_must_not_run():
    one = row("attention_forward", 64)
    assert rejection(one, GOOD, GOOD) is None
    for change, words in (
        ({"spills": 1}, "spills"),
        ({"stack": 8}, "stack"),
        ({"shared": 228 * 1024}, "shared memory"),
        ({"blocks_per_sm": 0}, "multiprocessor"),
        ({"tensor_core": 0}, "tensor cores"),
        ({"warnings": "C7515"}, "C7515"),
    ):
        assert words in (rejection(one, GOOD | change, GOOD) or ""), change
    assert rejection(one, "too many threads", GOOD) == "does not compile"
    assert rejection(one, GOOD | {"warnings": "C7515"}, GOOD | {"warnings": "C7515"}) is None
    assert rejection(row("scale", ANY), GOOD | {"tensor_core": 0}, GOOD | {"tensor_core": 0}) is None
    smaller = row("attention_forward", 64, Tuning("sm_80", "16-bit"))
    assert rejection(smaller, GOOD | {"shared": 100 * 1024}, GOOD) == "too much shared memory"


COMPILE = """
import json, sys, tempfile
from bench import tune
from fastgpt_kernels import aot
from fastgpt_kernels.launch import ANY, TABLE, Config, Tuning
out = sys.stdout.fileno()
keep = __import__("os").dup(out)
aot.start_worker(tempfile.mkdtemp())
tuning = Tuning("sm_90", "16-bit")
row = tune.Row("scale", tuning, ANY, TABLE["scale"][tuning][ANY])
before = row.config
found = [tune.compile_candidate(row, c) for c in (Config(1, 2048, 4), Config(1, 1 << 21, 4))]
assert TABLE["scale"][tuning][ANY] == before
__import__("os").write(keep, json.dumps(found).encode())
"""


@pytest.mark.slow
def test_a_candidate_is_really_compiled():
    """In a process of its own, because here Triton interprets; a tile too large for Triton does not compile."""
    outside = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    outside["PYTHONPATH"] = os.pathsep.join([str(tune.command_line.BENCH), outside.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=outside, check=False)
    assert done.returncode == 0, done.stderr
    good, bad = json.loads(done.stdout)
    assert good["registers"] > 0
    assert good["spills"] == good["stack"] == good["tensor_core"] == 0
    assert rejection(row("scale", ANY), good, good) is None
    assert isinstance(bad, str)
    assert bad


def test_every_kernel_has_workloads_that_launch_it():
    for one in every_row():
        if one.tuning.target == "sm_90":
            cases = workloads(one.kernel, one.tuning, one.width, torch.device("meta"))
            assert cases, one
            for case in cases:
                own = [step for step in case.launches(one.tuning) if step.name == one.kernel]
                assert own, (one, case.label)
                assert one.config.constants().items() <= own[0].constants.items(), (one, case.label)


def test_a_trial_lasts_as_long_as_its_block():
    one, other = row("norm_forward", 1024), Config(2, 1024, 2)
    with launch.trial(one.kernel, one.tuning, 1000, other):
        assert one.tuning.row("norm_forward", 768) == other
        assert one.tuning.row("norm_forward", 512) != other
        assert Tuning("sm_80", "16-bit").row("norm_forward", 768) == one.config
    assert one.tuning.row("norm_forward", 768) == one.config


def test_faster_means_beyond_doubt():
    assert Timing(Config(1, 1, 1), (1.05, 1.04, 1.06, 1.05)).is_better
    assert not Timing(Config(1, 1, 1), (1.01, 1.01, 1.01, 1.01)).is_better
    assert not Timing(Config(1, 1, 1), (0.9, 1.2, 0.95, 1.2)).is_better


@pytest.mark.parametrize(
    ("kernel", "kind", "width"),
    [
        ("attention_forward", "16-bit", 64),
        ("attention_backward_keys", "tf32", 256),
        ("int8_product", "16-bit", ANY),
    ],
)
def test_a_target_s_own_row_is_changed_and_set_back(kernel: str, kind: str, width: int):
    now = TABLE[kernel]["sm_90", kind][width]
    new = now._replace(warps=now.warps * 2, stages=now.stages + 1)
    changed = tune_table.replace(TEXT, kernel, "sm_90", kind, width, new)
    differing = [(a, b) for a, b in zip(TEXT.splitlines(), changed.splitlines(), strict=True) if a != b]
    ((before, after),) = differing
    assert f'sm_90 = "{now}"' in before
    assert after == before.replace(f'sm_90 = "{now}"', f'sm_90 = "{new}"')
    assert tune_table.replace(changed, kernel, "sm_90", kind, width, now) == TEXT
    assert tune_table.replace(TEXT, kernel, "sm_90", kind, width, now) == TEXT


@pytest.mark.parametrize(("kernel", "width"), [("norm_forward", 128), ("kv_write", 64), ("scale", ANY)])
def test_a_row_that_is_for_all_changes_for_one_target_and_dtype(kernel: str, width: int):
    now = TABLE[kernel][HOPPER][width]
    new, newer = (now._replace(warps=warps) for warps in (16, 32))
    changed = tune_table.replace(TEXT, kernel, *HOPPER, width, new)
    table = read_table(changed)
    assert table[kernel][HOPPER][width] == new
    for target in TARGETS:
        for kind in ("16-bit", "float32"):
            if (target, kind) != HOPPER:
                assert table[kernel][target, kind] == TABLE[kernel][target, kind]
    again = tune_table.replace(changed, kernel, *HOPPER, width, newer)
    assert len(again) == len(changed)
    other = tune_table.replace(again, kernel, "sm_100", "float32", width, new)
    assert read_table(other)[kernel][HOPPER][width] == newer
    assert f"\n\n[{kernel}.16-bit]\n" in other
    assert other.index(f"[{kernel}.all]") < other.index(f"[{kernel}.16-bit]") < other.index(f"[{kernel}.float32]")
    assert tune_table.replace(again, kernel, *HOPPER, width, now) == TEXT


def test_a_comment_is_kept_when_a_row_becomes_what_it_is_for_all():
    now = TABLE["kv_write"][HOPPER][64]
    changed = tune_table.replace(TEXT, "kv_write", *HOPPER, 64, now._replace(warps=16))
    line = '64 = { sm_90 = "32x64 w16 s1" }'
    for told in (changed.replace(line, f"{line}  # a reason"), changed.replace(line, f"# a reason\n{line}")):
        back = tune_table.replace(told, "kv_write", *HOPPER, 64, now)
        assert back == told.replace("32x64 w16 ", "32x64 w4 ")


def test_the_table_is_written_as_it_is_read():
    assert tune_table.render(tune_table.parse(TEXT)) == TEXT


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("64 = {", "64={", "neither a [KERNEL.KIND], a row nor a comment"),
        ('sm_90 = "128x64 w8 s3"', 'sm_90  =  "128x64 w8 s3"', "would be written"),
        ('256 = { all = "4x256', '100 = { all = "4x256', "would be written"),  # narrowest first
        ("\n\n[scale.all]", "\n# a comment of nothing\n\n[scale.all]", "stands above no row"),
    ],
)
def test_a_table_in_another_form_is_not_written_over(old: str, new: str, words: str):
    text = TEXT.replace(old, new, 1)
    assert text != TEXT
    with pytest.raises(ValueError, match=re.escape(words)):
        tune_table.parse(text)


def test_a_row_that_is_not_in_the_table_is_an_error():
    for key in (("no_kernel", "sm_90", "16-bit", 64), ("attention_forward", "gfx942", "tf32", 64)):
        with pytest.raises(LookupError, match="holds no row"):
            tune_table.replace(TEXT, *key, Config(1, 1, 1))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["norm_forwrd"], "did you mean norm_forward?"),
        (["norm_forward", "--target", "sm90"], "did you mean sm_90?"),
        (["norm_forward", "--dtype", "tf32"], "no rows of it for sm_90"),
        (["norm_forward", "--width", "99999999"], "--width 99999999"),
        (["norm_forward", "--width", "0"], "--width 0"),
        (["norm_forward", "--write", "--filter-only"], "--write needs timings"),
        (["norm_forward", "--seconds", "-1"], "-1 is not a number above 0"),
    ],
)
def test_bad_flags_are_one_line(capsys, monkeypatch, flags: list[str], words: str):
    monkeypatch.setattr(tune, "INTERPRETED", False)
    assert tune.cli.run(tune.main, [*flags, *([] if "--target" in flags else ["--target", "sm_90"])]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
