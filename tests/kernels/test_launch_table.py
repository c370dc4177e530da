"""The launch table's file: how its notation is read, and what is refused."""

import re
import tomllib

import pytest

pytest.importorskip("triton")

from fastgpt_kernels.launch import ANY, TABLE, TABLE_FILE, TARGETS, Config, read_table
from tests.helpers.places import ROOT


def test_the_file_is_the_table():
    assert read_table(TABLE_FILE.read_text(encoding="utf-8")) == TABLE


def test_what_is_for_all_targets_or_kinds_gives_way_to_what_is_for_one():
    table = read_table("""
[a.all]
64 = { all = "8x64 w4 s1", gfx942 = "8x64 w2 s1" }
any = { all = "1x4096 w8 s1" }
[a.16-bit]
64 = { sm_90 = "16x64 w4 s1" }
[b.16-bit]
64 = { sm_90 = "128x64 w8 s3" }
32 = { sm_90 = "128x64 w8 s2" }
[b.tf32]
64 = { sm_80 = "16x16 w4 s1" }
""")
    assert list(table) == ["a", "b"]
    assert list(table["a"]) == [(target, kind) for target in TARGETS for kind in ("16-bit", "float32")]
    assert {key: str(rows[64]) for key, rows in table["a"].items() if str(rows[64]) != "8x64 w4 s1"} == {
        ("sm_90", "16-bit"): "16x64 w4 s1",
        ("gfx942", "16-bit"): "8x64 w2 s1",
        ("gfx942", "float32"): "8x64 w2 s1",
    }
    assert all(rows[ANY] == Config(1, 4096, 8) for rows in table["a"].values())
    assert table["b"] == {
        ("sm_80", "tf32"): {64: Config(16, 16, 4)},
        ("sm_90", "16-bit"): {32: Config(128, 64, 8, 2), 64: Config(128, 64, 8, 3)},
    }
    assert list(table["b"]["sm_90", "16-bit"]) == [32, 64]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[a.bf16]", "[a]: 'bf16' is not known; expected all, 16-bit, tf32, float32"),
        ("a = 1", "[a]: '1' is not known"),
        (
            '[a.all]\nwide = { all = "1x64 w1 s1" }',
            "[a.all] wide: 'wide' is not known; expected a width above 0, or any",
        ),
        ('[a.all]\n0 = { all = "1x64 w1 s1" }', "[a.all] 0: '0' is not known"),
        ('[a.all]\n64 = { sm90 = "1x64 w1 s1" }', "[a.all] 64: 'sm90' is not known; expected all, sm_80, sm_90"),
        ('[a.all]\n64 = "1x64 w1 s1"', "[a.all] 64: '1x64 w1 s1' is not known; expected all, sm_80"),
        ('[a.all]\n64 = { sm_90 = "1x64 w1" }', "[a.all] 64 sm_90: '1x64 w1' is not known; expected ROWSxCOLUMNS"),
        ('[a.all]\n64 = { sm_90 = "1x48 w1 s1" }', "[a.all] 64 sm_90: '1x48 w1 s1' is not known"),
        ('[a.all]\n64 = { sm_90 = "1x64 w0 s1" }', "[a.all] 64 sm_90: '1x64 w0 s1' is not known"),
        ("[a.all]\n64 = { sm_90 = 64 }", "[a.all] 64 sm_90: 64 is not known"),
    ],
)
def test_what_does_not_keep_to_the_notation_is_named(text, words):
    with pytest.raises(ValueError, match=rf"^launch_table\.toml: {re.escape(words)}") as error:
        read_table(text)
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_toml_is_an_error_with_its_line():
    with pytest.raises(ValueError, match=r"^launch_table\.toml: .*line 2"):
        read_table("[a.all]\n64 = 1 2\n")


def test_the_file_is_shipped():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert TABLE_FILE.name in project["tool"]["setuptools"]["package-data"]["fastgpt_kernels"]
