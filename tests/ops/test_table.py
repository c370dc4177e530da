"""The table: one signature a row, and one place where a backend is chosen."""

import inspect
import subprocess
import sys

import pytest
import torch

import fastgpt_kernels
from fastgpt.errors import UsageError
from fastgpt.ops import autotune, table
from fastgpt.ops.table import TABLE, Row, implementation
from fastgpt.ops.timed_choices import Choice
from fastgpt.ops.workload import Workload
from fastgpt_kernels import launch

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU kernels are compiled")
EMPTY = inspect.Parameter.empty
# What a model may pass: the positional arguments, then those by keyword, with their defaults.
SIGNATURES = {
    "layer_norm": ({"x": EMPTY, "weight": EMPTY, "bias": None}, {"eps": 1e-5}),
    "add_layer_norm": ({"x": EMPTY, "residual": EMPTY, "weight": EMPTY, "bias": None}, {"eps": 1e-5}),
    "rms_norm": ({"x": EMPTY, "weight": None}, {"eps": 1e-5}),
    "add_rms_norm": ({"x": EMPTY, "residual": EMPTY, "weight": None}, {"eps": 1e-5}),
    "swiglu": ({"x": EMPTY}, {}),
    "relu2": ({"x": EMPTY}, {}),
    "causal_attention": (
        {"q": EMPTY, "k": EMPTY, "v": EMPTY},
        {"dropout_p": 0.0, "seed": None, "scale": None, "doc_ids": None},
    ),
    "linear_cross_entropy": (
        {"x": EMPTY, "weight": EMPTY, "targets": EMPTY},
        {"ignore_index": -100, "valid_vocab": None, "reduction": "mean", "softcap": None},
    ),
    "paged_attention": (
        {"q": EMPTY, "k_pages": EMPTY, "v_pages": EMPTY, "block_table": EMPTY, "lengths": EMPTY},
        {"starts": None, "scale": None},
    ),
    "kv_write": ({"k": EMPTY, "v": EMPTY, "k_pages": EMPTY, "v_pages": EMPTY, "slots": EMPTY}, {}),
}


def test_the_table_has_the_operations_of_the_design():
    assert SIGNATURES.keys() <= TABLE.keys()


@pytest.mark.parametrize("op", TABLE)
@pytest.mark.parametrize("backend", Row._fields)
def test_every_column_has_the_signature_of_its_row(op, backend):
    assert inspect.signature(implementation(op, backend)) == inspect.signature(TABLE[op].reference)


@pytest.mark.parametrize("op", TABLE)
def test_the_kernels_can_be_imported_from_their_package(op):
    assert getattr(fastgpt_kernels, op) is implementation(op, "triton")
    assert op in dir(fastgpt_kernels)


@pytest.mark.slow
def test_a_kernel_keeps_its_name_whatever_is_imported_first():
    code = """
import fastgpt_kernels.activation, fastgpt_kernels.norm, fastgpt_kernels.attention, fastgpt_kernels.cross_entropy
import fastgpt_kernels.paged, fastgpt_kernels.paged_decode, fastgpt_kernels.paged_prefill
from fastgpt_kernels import add_layer_norm, causal_attention, kv_write, layer_norm, linear_cross_entropy
from fastgpt_kernels import add_rms_norm, paged_attention, relu2, rms_norm, swiglu
assert all(map(callable, (add_layer_norm, causal_attention, kv_write, layer_norm, linear_cross_entropy)))
assert all(map(callable, (add_rms_norm, paged_attention, relu2, rms_norm, swiglu)))
"""
    subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {[p for p in sys.path if p]}\n{code}"], check=True
    )


@pytest.mark.parametrize("op", SIGNATURES)
def test_signatures_are_those_of_the_design(op):
    parameters = inspect.signature(TABLE[op].reference).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    by_kind = [{p.name: p.default for p in parameters if p.kind is kind} for kind in kinds]
    assert by_kind == list(SIGNATURES[op])
    assert [list(names) for names in by_kind] == [list(names) for names in SIGNATURES[op]]  # in this order


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_a_named_column_is_used_for_every_operation(backend):
    ops = table.resolve(backend)
    assert ops.backends == dict.fromkeys(TABLE, backend)
    for op in TABLE:
        assert getattr(ops, op) is implementation(op, backend)
    assert str(ops) == f"{backend} (`kernels` {backend})"
    assert not ops.interpreted


@interpreted
def test_triton_runs_on_a_cpu_in_the_interpreter_and_says_so():
    ops = table.resolve("triton", "cpu")
    assert ops.backends == dict.fromkeys(TABLE, "triton")
    assert ops.causal_attention is fastgpt_kernels.causal_attention
    assert ops.interpreted
    assert str(ops) == "triton (`kernels` triton, in Triton's interpreter)"


def test_auto_takes_torch_on_a_cpu_and_says_why():
    ops = table.resolve("auto", torch.device("cpu"))
    assert ops.backends == dict.fromkeys(TABLE, "torch")
    assert "cpu" in ops.reason


WORKLOAD = Workload("training", torch.float32, record=lambda: pytest.fail("nothing is timed"))


@pytest.fixture
def timings(monkeypatch) -> list[Workload]:
    """The workloads that are timed meanwhile, as if there were a GPU that runs Triton: its layer_norm is faster."""
    timed = []

    def choose(workload: Workload, device: torch.device, keep: bool) -> autotune.Chosen:
        timed.append(workload)
        choices = {"layer_norm": Choice("triton"), "causal_attention": Choice("torch")}
        return autotune.Chosen(choices, "A GPU", 1.23)

    monkeypatch.setattr(autotune, "choose", choose)
    monkeypatch.setattr(table, "_triton_lacks", lambda device: None)
    monkeypatch.setattr(launch, "INTERPRETED", False)
    return timed


def test_auto_takes_the_fastest_on_cuda_and_says_so_in_one_line(timings):
    ops = table.resolve("auto", "cuda", choose=autotune.chooser(WORKLOAD))
    assert timings == [WORKLOAD]
    assert ops.backends == dict.fromkeys(TABLE, "torch") | {"layer_norm": "triton"}
    assert ops.layer_norm is fastgpt_kernels.layer_norm
    assert str(ops).startswith("layer_norm=triton, add_layer_norm=torch, ")
    assert "(auto: fastest of torch and triton on A GPU; timed in 1.2 s; not timed: add_layer_norm, " in str(ops)
    assert "\n" not in str(ops)


@pytest.mark.parametrize("device", ["cpu", "meta", "mps"])
def test_auto_times_nothing_elsewhere(timings, device):
    ops = table.resolve("auto", device, choose=autotune.chooser(WORKLOAD))
    assert ops.backends == dict.fromkeys(TABLE, "torch")
    assert ops.reason == f"auto: the fast backend of this version on {device}"
    assert timings == []


@pytest.mark.parametrize("arguments", [{"kernels": "torch"}, {"recorded": dict.fromkeys(TABLE, "torch")}, {}], ids=str)
def test_a_named_column_a_record_or_no_workload_times_nothing_on_cuda(timings, arguments):
    choose = autotune.chooser(WORKLOAD) if arguments else None
    assert table.resolve(device="cuda", choose=choose, **arguments).backends == dict.fromkeys(TABLE, "torch")
    assert timings == []


def test_auto_on_a_gpu_that_cannot_run_triton_is_torch_and_says_why(timings, monkeypatch):
    monkeypatch.setattr(table, "_triton_lacks", lambda device: "compute capability 8.0 or newer, found 7.5")
    ops = table.resolve("auto", "cuda", choose=autotune.chooser(WORKLOAD))
    assert str(ops) == "torch (auto: triton needs compute capability 8.0 or newer, found 7.5)"
    monkeypatch.setattr(table, "_triton_lacks", lambda device: None)
    monkeypatch.setattr(launch, "INTERPRETED", True)
    assert (
        str(table.resolve("auto", "cuda", choose=autotune.chooser(WORKLOAD)))
        == "torch (auto: Triton's interpreter is slow)"
    )
    assert timings == []


def test_triton_on_a_cpu_is_one_line_that_says_what_to_pass_instead(monkeypatch):
    monkeypatch.setattr(launch, "INTERPRETED", False)
    with pytest.raises(UsageError) as caught:
        table.resolve("triton", "cpu")
    assert str(caught.value) == "`kernels` triton needs a CUDA GPU, found cpu; use `kernels` auto"


def test_triton_that_is_not_installed_is_one_line_that_says_so(monkeypatch):
    monkeypatch.setattr(table.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError) as caught:
        table.resolve("triton", "cuda")
    assert str(caught.value) == "`kernels` triton needs the package triton, found none; use `kernels` auto"


def test_the_old_interpreter_beside_a_new_numpy_is_one_line(monkeypatch):
    monkeypatch.setattr(launch, "INTERPRETED", True)
    monkeypatch.setattr("triton.__version__", "3.6.0")
    monkeypatch.setattr("numpy.__version__", "2.3.5")
    assert table.resolve("triton", "cpu").interpreted
    monkeypatch.setattr("numpy.__version__", "2.4.0")
    with pytest.raises(UsageError) as caught:
        table.resolve("triton", "cpu")
    assert str(caught.value) == (
        "`kernels` triton needs numpy before 2.4 in Triton 3.6's interpreter, found 2.4.0; use `kernels` auto"
    )


def test_triton_on_a_gpu_too_old_names_what_it_needs(monkeypatch):
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(UsageError, match=r"needs compute capability 8\.0 or newer, found 7\.5; use `kernels` auto"):
        table.resolve("triton", "cuda")


def test_a_run_made_with_triton_says_what_to_pass_where_triton_cannot_run(monkeypatch):
    monkeypatch.setattr(launch, "INTERPRETED", False)
    with pytest.raises(UsageError) as caught:
        table.resolve("auto", "cpu", recorded=dict.fromkeys(TABLE, "triton"))
    assert (
        str(caught.value) == "this run, made with `kernels` triton, needs a CUDA GPU, found cpu; pass `kernels` torch"
    )


def test_an_unknown_column_is_an_error_that_lists_the_known():
    with pytest.raises(UsageError, match="`kernels` 'cuda' is not one of auto, reference, torch, triton"):
        table.resolve("cuda")


RECORDED = {**dict.fromkeys(TABLE, "torch"), "layer_norm": "reference"}


def test_auto_keeps_the_recorded_columns_of_a_resumed_run():
    ops = table.resolve("auto", recorded=RECORDED)
    assert ops.backends == RECORDED
    assert ops.layer_norm is TABLE["layer_norm"].reference
    assert ops.causal_attention is TABLE["causal_attention"].torch
    assert "layer_norm=reference" in str(ops)


def test_a_named_column_wins_over_the_recorded_ones():
    assert table.resolve("torch", recorded=RECORDED).backends == dict.fromkeys(TABLE, "torch")


def test_an_operation_that_the_record_lacks_is_chosen_as_in_a_new_run():
    assert table.resolve("auto", recorded={"layer_norm": "reference"}).backends == RECORDED


@pytest.mark.parametrize("recorded", [{"layer_norm": "cuda"}, {"layer_norm": "index"}, {"convolution": "torch"}])
def test_a_recorded_column_that_is_gone_is_an_error(recorded):
    with pytest.raises(UsageError, match="pass `kernels`"):
        table.resolve("auto", recorded=recorded)


@pytest.mark.slow
def test_the_model_runs_where_triton_is_not_installed():
    code = """
import sys
sys.modules["triton"] = None  # an import of it now fails
import torch
from fastgpt.config.model import ModelConfig
from fastgpt.ops.autotune import chooser
from fastgpt.ops.table import resolve
from fastgpt.model.gpt import GPT
from fastgpt.model import workloads
config = ModelConfig(vocab_size=5, block_size=4, n_layer=1, n_head=1, n_embd=4)
ops = resolve("auto", "cpu", choose=chooser(workloads.generation(config, torch.float32)))
GPT(config, ops)(torch.zeros(1, 4, dtype=torch.long))
"""
    paths = [path for path in sys.path if path]
    subprocess.run([sys.executable, "-c", f"import sys; sys.path[:0] = {paths}\n{code}"], check=True)
