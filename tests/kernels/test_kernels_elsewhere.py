"""The public kernels without Triton, or on a CPU: one line that names what has the same signatures and runs there."""

import os
import subprocess
import sys

import pytest

import fastgpt_kernels

INSTEAD = "fastgpt_kernels.reference and fastgpt_kernels.torch_ops have the same signatures"
NEED_TRITON = sorted({*fastgpt_kernels.__all__} - {"quantize"})

WITHOUT_TRITON = """
import sys

class NoTriton:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NoTriton())
import torch
import fastgpt_kernels
from fastgpt_kernels import quantize, reference, torch_ops

for name in sys.argv[1:]:
    try:
        getattr(fastgpt_kernels, name)
    except ModuleNotFoundError as error:
        assert error.name == "triton"
        print(error)
x, weight = torch.randn(3, 4), torch.ones(4)
torch.testing.assert_close(torch_ops.layer_norm(x, weight), reference.layer_norm(x, weight))
quantize(x)
from fastgpt_kernels import layer_norm
"""

ON_A_CPU = """
import torch
import fastgpt_kernels
from fastgpt_kernels import quantize

x, weight, targets = torch.randn(3, 4), torch.ones(4), torch.tensor([0, 1, 2])
q, pages, slots = torch.randn(1, 3, 2, 4), torch.zeros(2, 8, 2, 4), torch.tensor([1, 2, 3])
table = torch.zeros(3, 1, dtype=torch.int32), torch.ones(3, dtype=torch.int32)
for dtype in (torch.float32, torch.bfloat16):
    x, weight, q, pages = (t.to(dtype) for t in (x, weight, q, pages))
    calls = {
        "add_layer_norm": (x, x, weight),
        "add_rms_norm": (x, x, weight),
        "causal_attention": (q, q, q),
        "kv_write": (q[0], q[0], pages, pages, slots),
        "layer_norm": (x, weight),
        "linear_cross_entropy": (x, x, targets),
        "linear_int8": (x, *quantize(torch.randn(5, 4))),
        "paged_attention": (q[0], pages, pages, *table),
        "relu2": (x,),
        "rms_norm": (x,),
        "swiglu": (x,),
    }
    assert {*calls, "quantize"} == {*fastgpt_kernels.__all__}
    for name, arguments in calls.items():
        for autocast in (False, True):
            try:
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                    getattr(fastgpt_kernels, name)(*arguments)
            except ValueError as error:
                print(error)
"""


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, without Triton's interpreter and without a GPU."""
    outside = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    outside["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = {[p for p in sys.path if p]}\n{code}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=outside, check=False)


@pytest.mark.slow
def test_without_triton_they_name_what_needs_none():
    done = run(WITHOUT_TRITON, *NEED_TRITON)
    found = done.stdout.splitlines()
    assert len(found) == len(NEED_TRITON), done.stderr
    for name, line in zip(NEED_TRITON, found, strict=True):
        assert line.startswith(f"fastgpt_kernels.{name} needs the package triton, which is not installed; {INSTEAD}")
    # an import that is not caught: the last line, with no other error behind it
    assert done.returncode == 1
    assert done.stderr.count("Traceback") == 1
    assert done.stderr.splitlines()[-1].endswith(found[NEED_TRITON.index("layer_norm")])


def test_on_a_cpu_they_name_what_runs_there():
    pytest.importorskip("triton")
    done = run(ON_A_CPU)
    assert done.returncode == 0, done.stderr
    found = done.stdout.splitlines()
    assert len(found) == 2 * 2 * len(NEED_TRITON)
    for line in found:
        assert "is on cpu; expected a CUDA GPU" in line
        assert INSTEAD in line
    assert {line.split(":")[0] for line in found} == set(NEED_TRITON)
