"""`inspect machine`: what it reports is so, it names nobody, and PyTorch's attention is what it says."""

import dataclasses
import getpass
import json
import os
import re
import socket
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from rich.cells import cell_len

from fastgpt import cli, inspect
from fastgpt.config.inspection import MachineConfig
from fastgpt.config.training import PRESETS
from fastgpt.inspection import attention_backends, facts, machine_arithmetic, machine_facts, machine_view
from fastgpt.inspection.attention_backends import Trial, attention, reason
from fastgpt.inspection.facts import Fact, hider, report, values, without_names
from fastgpt.ops.table import TABLE
from fastgpt.ops.timed_choices import Choice
from fastgpt_kernels import torch_ops
from tests.helpers import runs

CPU = torch.device("cpu")
TINY = MachineConfig(vocab_size=50, block_size=32, n_layer=1, n_head=4, n_kv_head=2, n_embd=32, device="cpu")
SECTIONS = ["versions", "device", "arithmetic", "compilers", "model", "attention_sdpa", "operations", "cache"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.run_in(tmp_path_factory.mktemp("machine"), "--max_iters 1 --eval_interval 1")


def inspected(*words: str) -> int:
    return cli.run(inspect.main, ["machine", *words])


def owners_words() -> set[str]:
    """What must stand in no report: names that are long enough not to be part of another word, and folders."""
    words = {str(Path.home()), Path.home().name, str(Path.cwd()), socket.gethostname(), getpass.getuser()}
    return {word.lower() for word in words if len(word) >= 4}


def test_a_report_names_neither_user_nor_host_nor_path(run: Path, capsys: pytest.CaptureFixture[str]):
    assert inspected(str(run), "--device", "cpu") == 0
    out, err = capsys.readouterr()
    for told in (out, err):
        words = {*owners_words(), str(run).lower(), str(run.parent).lower()}
        assert [word for word in words if word in told.lower()] == []
        assert facts.PATH.search(told) is None
    assert err == "the model <path>\n"
    assert max(map(cell_len, out.splitlines())) <= facts.WIDTH
    assert "a run of fastgpt" in out
    assert [line for line in out.splitlines() if line and line[0] != " "][:2] == ["Versions", "Device"]


def test_json_has_the_same_facts_and_with_paths_the_places(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    monkeypatch.setenv("FASTGPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", "no-such-compiler")
    (tmp_path / "cache" / "compiled").mkdir(parents=True)
    (tmp_path / "cache" / "compiled" / "a").write_bytes(bytes(3000))
    (tmp_path / "cache" / "kernels.json").write_bytes(bytes(24))
    assert inspected(str(run), "--device", "cpu", "--json", "--paths", "--dtype", "float16") == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == SECTIONS
    assert found["versions"]["torch"] == torch.__version__
    assert found["device"]["takes"] == "cpu"
    assert found["device"]["memory"]["free"] <= found["device"]["memory"]["total"]
    assert found["arithmetic"]["training"] == found["arithmetic"]["generation"] == "float16"
    assert found["arithmetic"]["float32"]["runs"] is True
    assert found["arithmetic"]["float32"]["flops"] > 0
    assert found["compilers"]["c"].startswith("none: no-such-compiler is not found")
    assert found["model"]["source"] == f"a run of fastgpt: {run}"
    assert found["model"]["shape"]["n_embd"] == 16
    assert found["attention_sdpa"]["tried"]["dtype"] == "float16"
    assert {op: found["operations"][op] for op in TABLE} == {
        op: {"training": "torch", "generation": "torch"} for op in TABLE
    }
    assert found["cache"] == {"folder": str(tmp_path / "cache"), "size": 3024}


@pytest.mark.parametrize(
    ("flags", "saying"),
    [
        (["--preset", "bby"], "--preset 'bby' is not one of"),
        (["nowhere/at/all"], "--src nowhere/at/all"),
        (["--preset", "mini", "--src", "out"], "--preset mini and --src out: both name a model"),
        (["--device", "cuda:7x"], "--device 'cuda:7x' is not one of"),
        (["--n_head", "5"], "--n_head 5 does not divide --n_embd"),
        (["--dtype", "float8"], "--dtype 'float8' is not one of"),
        (["--path"], "--path"),
    ],
    ids=str,
)
def test_bad_input_is_one_line(flags: list[str], saying: str, capsys: pytest.CaptureFixture[str]):
    assert inspected(*flags) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert saying in err
    assert err.count("\n") == 1


# Names


@pytest.fixture
def alice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A user, her host, and a working folder whose name has a space."""
    folder = tmp_path / "al ice"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(Path, "home", lambda: Path("/home/alice"))
    monkeypatch.setattr(getpass, "getuser", lambda: "abe")
    monkeypatch.setattr(socket, "gethostname", lambda: "wonder.land.example")
    return folder


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("2.13.0a0+git.alice", "2.13.0a0+git.<user>"),
        ("built by abe on wonder", "built by <user> on <host>"),
        ("on WONDER.land.example", "on <host>"),
        ("maybe a label", "maybe a label"),  # a short name is one only as a word
        ("/home/alice/.cache/x.py:3: no", "<path>:3: no"),
        ("in /usr/lib/gcc/as and /tmp/a-b/c", "in <path> and <path>"),
        (r"C:\Users\alice\x.cpp", "<path>"),
        ("CWD/part of it", "<path> of it"),
        ("85 GFLOP/s, x86_64, and/or, 1/2", "85 GFLOP/s, x86_64, and/or, 1/2"),
    ],
)
def test_paths_and_names_are_hidden_in_any_text(alice: Path, text: str, hidden: str):
    assert hider()(text.replace("CWD", str(alice))) == hidden


def test_they_are_hidden_in_captured_reasons_versions_and_values(alice: Path):
    told = f"cannot open {alice}/lib.so for alice"
    with mock.patch.object(torch, "__version__", "2.13+wonder"):
        sections = {"Versions": machine_facts.versions(CPU), "Tried": {"flash": Fact(told, {"forward": [told, 3]})}}
    hidden = without_names(sections)
    assert hidden["Versions"]["torch"] == "2.13+<host>"
    assert values(hidden)["tried"] == {"flash": {"forward": ["cannot open <path> for <user>", 3]}}
    assert "alice" not in report(hidden)
    assert "alice" in report(sections)


def test_long_facts_go_on_below_their_beginning():
    lines = report({"One": {"a": "word " * 30, "longer": "x"}, "Two": {"b": Fact("text", 1)}}).splitlines()
    assert lines[:2] == ["One", "  a       " + " ".join(["word"] * 14)]
    assert lines[2].startswith("          word word")
    assert lines[-4:] == ["  longer  x", "", "Two", "  b       text"]


# Attention


@pytest.mark.parametrize(
    ("dtype", "pack", "n_kv_head"), [(torch.float32, None, 2), (torch.bfloat16, True, 4), (torch.float16, False, 1)]
)
def test_backends_run_and_the_choice_is_what_pytorch_computes(dtype: torch.dtype, pack: bool | None, n_kv_head: int):
    trial = Trial(dataclasses.replace(TINY, pack=pack, n_kv_head=n_kv_head), CPU, dtype, gradients=True)
    assert (trial.refusal("flash"), trial.refusal("math")) == (None, None)
    assert "gives no reason" in (trial.refusal("cudnn") or "")
    made = F.scaled_dot_product_attention(trial.q, trial.k, trial.v, **trial.settings).grad_fn
    assert trial.choice() == ("flash" if "FlashAttention" in made.name() else "math")
    assert (trial.settings["attn_mask"] is not None) == bool(pack)


def test_a_long_context_of_many_heads_is_tried_in_part(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attention_backends, "LARGEST", 4 * 2 * 64 * 64)
    monkeypatch.setattr(attention_backends, "MOST_TOKENS", 64)
    part = Trial(dataclasses.replace(TINY, block_size=1000), CPU, torch.float32, gradients=False)
    assert (part.q.shape, part.k.shape) == ((1, 2, 64, 8), (1, 1, 64, 8))
    assert part.refusal("math") is None
    monkeypatch.setattr(attention_backends, "LARGEST", 100)
    assert part.refusal("math") == "not tried, as its scores take 32 KiB"


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (["No available kernel. Aborting execution."], "PyTorch has none for this call, and gives no reason"),
        (
            [
                "Memory efficient kernel not used because: (Triggered internally at /pytorch/aten/a.cpp:773.)",
                "Memory Efficient attention has been runtime disabled. (Triggered internally at /pytorch/b.h:552.)",
                "Flash attention kernel not used because: (Triggered internally at /pytorch/aten/a.cpp:775.)",
                "Expected query, key and value to all be of dtype: {Half, BFloat16}. Got Query dtype: float "
                "(Triggered internally at /pytorch/b.h:92.)",
                "No available kernel. Aborting execution.",
            ],
            "Expected query, key and value to all be of dtype: {Half, BFloat16}. Got Query dtype: float",
        ),
        (["CUDA out of memory. Tried to allocate 3 GiB"], "CUDA out of memory. Tried to allocate 3 GiB"),
    ],
)
def test_a_reason_is_found_among_pytorchs_warnings(lines: list[str], told: str):
    assert reason(lines) == told


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_size", [1024, 1025])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_the_torch_column_computes_what_is_said(dtype: torch.dtype, block_size: int, dropout: float):
    config = dataclasses.replace(TINY, block_size=block_size, dropout=dropout, n_head=1, n_kv_head=1, n_embd=8)
    told = attention(config, CPU, dtype)["torch column"].value
    q = torch.zeros(1, block_size, 1, 8, dtype=dtype)
    for work, tensor, p in (("forward", q, 0.0), ("gradients", q.clone().requires_grad_(), dropout)):
        with mock.patch.object(torch_ops, "attention_by_products", side_effect=InterruptedError):
            try:
                torch_ops.causal_attention(tensor, tensor, tensor, dropout_p=p, seed=torch.tensor(1))
                computed = "SDPA"
            except InterruptedError:
                computed = "matrix products"
        assert told[work].startswith(computed)


# Machine


@pytest.mark.parametrize(("number", "version"), [(91_002, "9.10.2"), (8_902, "8.9.2"), (90_100, "9.1.0")])
def test_cudnns_version_and_whether_it_is_loaded(number: int, version: str, monkeypatch: pytest.MonkeyPatch, tmp_path):
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: number)
    monkeypatch.setattr(machine_facts, "MAPS", tmp_path / "maps")
    (tmp_path / "maps").write_text("7f00 r-xp /lib/libcudnn.so.9\n")
    assert machine_facts.versions(CPU)["cuDNN"] == Fact(f"{version}, loaded", {"version": version, "loaded": True})
    (tmp_path / "maps").write_text("7f00 r-xp /lib/libc.so.6\n")
    assert machine_facts.versions(CPU)["cuDNN"].value == {"version": version, "loaded": False}


@pytest.mark.parametrize(
    ("said", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue\nGCC version:  gcc 12.2.0\n", "550.54.15"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.10  Release Build\n", "570.86.10"),
        ("| NVIDIA-SMI 535.104.05    Driver Version: 535.104.05   CUDA Version: 12.2 |\n", "535.104.05"),
        ("nothing", "no NVIDIA driver found"),
    ],
)
def test_the_drivers_version_is_found(said: str, version: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(machine_facts, "DRIVER", tmp_path / "version")
    (tmp_path / "version").write_text(said)
    assert machine_facts.versions(CPU)["driver"] == version


CPUS = "processor: 0\nphysical id: 0\ncore id: 0\nflags: fpu avx512_bf16\n\nprocessor: 1\nphysical id: 0\ncore id: 0\n"


def test_a_processor_is_read_from_linuxs_list(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(machine_facts, "CPUINFO", tmp_path / "cpuinfo")
    (tmp_path / "cpuinfo").write_text(CPUS + "model name\t: Some CPU: fast\n")
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setenv("MKL_NUM_THREADS", "7")
    found = machine_facts.processor(CPU, "auto", 3)
    assert found["CPU"] == "Some CPU: fast"
    assert found["instructions"].endswith("with avx512_bf16")
    assert found["cores"].text.startswith("1 core, 2 logical CPUs")
    assert found["threads"].value == 3
    assert "MKL_NUM_THREADS=7" in found["environment"]


def test_a_compiler_is_tried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    fake = tmp_path / "g++"
    fake.write_text("#!/bin/sh\n[ $1 = --version ] && echo fake 1.2 || { echo 'x: error: no disk' >&2; exit 1; }\n")
    fake.chmod(0o755)
    monkeypatch.setenv("CXX", str(fake))
    assert machine_facts.compilers(CPU)["C++"] == "fake 1.2: does not compile: x: error: no disk"
    fake.write_text("#!/bin/sh\nif [ $1 = --version ]; then echo fake 1.3; else ! grep -q Python.h; fi\n")
    assert machine_facts.compilers(CPU)["C++"] == (
        "fake 1.3: compiles; OpenMP works; Python.h is not found: install python3-dev"
    )


@pytest.mark.parametrize(
    ("named", "told"),
    [
        ("/nope/c++ -O1", "none: c++ is not found; compile needs one on a CPU, install g++"),
        ("'c++", "none: CXX is not a command: No closing quotation"),
    ],
)
def test_a_compiler_that_is_not_there_is_said_to_be_none(named: str, told: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CXX", named)
    assert machine_facts.compilers(CPU)["C++"] == told


def test_a_product_that_does_not_run_says_why(monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: torch.Tensor) -> None:
        raise RuntimeError("no kernel for this dtype\nmore")

    monkeypatch.setattr(torch, "matmul", refuse)
    found = machine_arithmetic.arithmetic(CPU, "auto", interpreted=True)
    assert found["float16"].text.startswith("does not run: no kernel for this dtype; ")
    assert found["float16"].value["runs"] is False
    assert found["training"].value == "float32"
    assert "interpreter" in found["training"].text


@pytest.mark.parametrize(("speed", "hint"), [(50e9, True), (90e9, False)])
def test_a_dtype_of_slow_products_is_told(monkeypatch: pytest.MonkeyPatch, speed: float, hint: bool):
    speeds = {torch.float32: 100e9, torch.bfloat16: speed, torch.float16: "does not run"}
    monkeypatch.setattr(machine_arithmetic, "_product_speed", lambda device, dtype: speeds[dtype])
    found = machine_arithmetic.arithmetic(CPU, "bfloat16", interpreted=False)
    assert found["training"].text.endswith("; products in float32 are faster here, so try dtype float32") == hint
    assert "faster" not in found["generation"].text


def test_a_timed_operation_has_its_times_and_what_was_left_out():
    timed = {"layer_norm": Choice("triton", {"torch": 2e-3, "triton": 1e-3}, {})}
    timed |= {"causal_attention": Choice("torch", {"torch": 1e-3}, {"triton": "RuntimeError: no"})}
    backends = dict.fromkeys(TABLE, "torch") | {"layer_norm": "triton"}
    ops = SimpleNamespace(backends=backends, reason="auto: fastest")
    found = machine_view._operations({"training": (ops, timed), "generation": (ops, {})})
    assert found["reason"].text == "auto: fastest"
    assert found["layer_norm"].text == "training triton (torch 2 ms, triton 1 ms); generation triton"
    assert found["causal_attention"].text.startswith("training torch (torch 1 ms, triton left out: RuntimeError: no)")
    assert found["kv_write"] == Fact("torch", {"training": "torch", "generation": "torch"})


@pytest.mark.parametrize("name", ["cpu", "gpt2"])
def test_a_preset_is_named_by_its_shape(name: str):
    config = dataclasses.replace(MachineConfig.of(PRESETS[name]), vocab_size=77)
    assert machine_view._model(config, None)["source"] == f"preset {name}"
    assert machine_view._model(dataclasses.replace(config, n_layer=29), None)["source"] == "as given"


@pytest.mark.gpu
def test_on_a_gpu_every_backend_is_tried_and_every_operation_timed(capsys: pytest.CaptureFixture[str]):
    assert inspected("--preset", "mini", "--device", "cuda", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["device"]["gpu"]["name"] == torch.cuda.get_device_name()
    assert found["device"]["cuda_graphs"] == "usable"
    assert {*attention_backends.BACKENDS} < {*found["attention_sdpa"]}
    assert found["attention_sdpa"]["math"] == {"forward": "runs", "gradients": "runs"}
    assert re.search("fastest of|timed|cached", found["operations"]["reason"]["training"])
