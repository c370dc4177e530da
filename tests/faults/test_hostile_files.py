"""A run's folder that means harm: sizes are checked before allocation, and no name leads out of the folder."""

import faulthandler
import io
import json
import math
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastgpt import cli, generate, verify
from fastgpt.checkpoint import run_folder, store
from fastgpt.checkpoint.store import MANIFEST, MODEL, OPTIMIZER, STATE
from fastgpt.errors import UsageError
from tests.helpers import runs
from tests.helpers.covering import some

pytestmark = [
    pytest.mark.usefixtures("workplace"),
    pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs fork, and Linux's /proc"),
]
STEP = Path("out/step-000006")
ROOM = 300 << 20  # bytes of address space that a command may take beyond what the tests have
MAINS: dict[str, Callable[[], int]] = {
    "resume": lambda: runs.resume("--max_iters 8"),
    "generate": lambda: cli.run(generate.main, ["--device", "cpu", "--max_new_tokens", "3", "--checkpoint", "latest"]),
    "verify": lambda: cli.run(verify.main, ["out"]),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A run with one checkpoint."""
    return runs.run_in(tmp_path_factory.mktemp("made"), "--eval_interval 6")


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    """The same run of another seed."""
    return runs.run_in(tmp_path_factory.mktemp("other"), "--eval_interval 6 --seed 2")


@pytest.fixture(autouse=True)
def out(made: Path, workplace: Path) -> Path:
    """A copy of the run, at out, for harm to be done to it."""
    return Path(shutil.copytree(made, "out"))


def told(command: str) -> tuple[int, list[str]]:
    """The exit code of a command with little memory to take, in a process of its own, and its lines on stderr."""
    number = os.fork()
    if number == 0:
        os.dup2(os.open("err.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        sys.stderr, sys.stdout, code = os.fdopen(2, "w", buffering=1), io.StringIO(), 99
        signal.alarm(20)  # nothing here takes as long
        faulthandler.disable()
        try:
            taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (taken + ROOM, resource.RLIM_INFINITY))
            code = MAINS[command]()
        except BaseException as error:
            print(f"Traceback: {error!r}", file=sys.stderr)
        finally:
            sys.stderr.flush()
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])
    text = Path("err.txt").read_text()
    assert "Traceback" not in text, text
    return code, text.splitlines()


def refused(command: str, *names: Path | str) -> None:
    """It ends with one line that names a file: exit code 2, of `verify` 1."""
    small = all(path.stat().st_size < 1 << 24 for path in Path("out").rglob("*") if path.is_file())
    before = runs.contents(Path("out")) if command != "resume" and small else {}
    code, lines = told(command)
    assert code == (1 if command == "verify" else 2), lines
    faults = [line for line in lines if line.startswith(("error: ", "damaged: "))]
    assert lines[-1] in faults
    assert all(any(str(name) in fault for fault in faults) for name in names), lines
    if before:
        assert runs.contents(Path("out")) == before
    assert not Path("out/metrics.jsonl").is_file() or list(runs.records(Path("out"))) == [1, 2, 3, 4, 5, 6]


def tensor_file(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


TB10 = 10 * 2**40
TENSOR_FILES: dict[str, bytes] = {
    "half a length": b"\0\0\0",
    "nothing but a length": bytes(8),
    "a header of 10 TB": tensor_file(b"{}", length=TB10),
    "a header of all there is": tensor_file(b"{}", length=2**64 - 1),
    "a header of 99 MB that is not there": tensor_file(b"{}", length=99_000_000),
    "data of 10 TB": tensor_file({"wte.weight": entry([TB10 // 4], 0, TB10)}),
    "a shape of 10 TB": tensor_file({"wte.weight": entry([TB10 // 64, 16], 0, 64)}, bytes(64)),
    "a shape beyond 64 bits": tensor_file({"wte.weight": entry([2**40, 2**40], 0, 64)}, bytes(64)),
    "a shape that wraps around": tensor_file({"wte.weight": entry([2**62, 16], 0, 64)}, bytes(64)),
    "a negative shape": tensor_file({"wte.weight": entry([-4, -4], 0, 64)}, bytes(64)),
    "an end before the start": tensor_file({"wte.weight": entry([16], 64, 0)}, bytes(64)),
    "tensors that overlap": tensor_file({"a": entry([16], 0, 64), "b": entry([16], 32, 96)}, bytes(96)),
    "tensors that are the same": tensor_file({"a": entry([16], 0, 64), "b": entry([16], 0, 64)}, bytes(64)),
    "a gap": tensor_file({"a": entry([16], 0, 64), "b": entry([16], 96, 160)}, bytes(160)),
    "more than the header says": tensor_file({"wte.weight": entry([16], 0, 64)}, bytes(96)),
    "an unknown type": tensor_file({"wte.weight": entry([16], 0, 64, "PICKLE")}, bytes(64)),
    "a type of half bytes": tensor_file({"wte.weight": entry([16], 0, 8, "F4")}, bytes(8)),
    "a header that is no JSON": tensor_file(b"[" * 1000),
    "a header that is nested deep": tensor_file(b'{"a":' * 100_000),
    "a header that is no UTF-8": tensor_file(b'{"\xff": 1}'),
    "a header of a list": tensor_file([]),
    "a pickle": b"\x80\x04cposix\nsystem\n(S'touch canary'\ntR.",
}


SCALER = {"scale": 2.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000, "_growth_tracker": 0}


class TestTensorFiles:
    """In a checkpoint whose manifest fits them."""

    @pytest.mark.parametrize("content", some(11, [*TENSOR_FILES]))
    @pytest.mark.parametrize("command", ["resume", "generate"])
    @pytest.mark.covering_array(1)
    def test_a_model_is_refused(self, command: str, content: str):
        (STEP / MODEL).write_bytes(TENSOR_FILES[content])
        runs.forge_manifest(STEP)
        refused(command, MODEL)
        assert not Path("canary").exists()

    @pytest.mark.parametrize("content", some(6, [*TENSOR_FILES]))
    def test_an_optimizer_is_refused(self, content: str):
        (STEP / OPTIMIZER).write_bytes(TENSOR_FILES[content])
        runs.forge_manifest(STEP)
        refused("resume", OPTIMIZER)
        assert not Path("canary").exists()

    @pytest.mark.parametrize("name", [MODEL, OPTIMIZER])
    @pytest.mark.parametrize("content", ["a header of 10 TB", "data of 10 TB", "tensors that overlap", "a pickle"])
    def test_verify_names_what_cannot_be_read(self, name: str, content: str):
        (STEP / name).write_bytes(TENSOR_FILES[content])
        runs.forge_manifest(STEP)
        refused("verify", STEP / name)

    @pytest.mark.parametrize("command", MAINS)
    def test_a_file_of_10_gb_that_its_manifest_does_not_fit_is_not_hashed(self, command: str):
        os.truncate(STEP / MODEL, 10 << 30)  # sparse
        code, lines = told(command)
        assert code == (1 if command == "verify" else 2)
        assert str(STEP / MODEL) in lines[-1]

    @pytest.mark.parametrize("name", ["exp_avg.h.0.mlp.c_fc.weight", "exp_avg_sq.wte.weight"])
    @pytest.mark.parametrize("shape", [(), (1,), (16, 64), (400, 16)], ids=str)
    def test_moments_of_another_shape_are_refused(self, name: str, shape: tuple[int, ...]):
        """The fused AdamW checks none, and would write where nothing of it is."""
        self.alter(OPTIMIZER, name, torch.zeros(shape))
        refused("resume", OPTIMIZER)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64, torch.complex64, torch.bool], ids=str)
    def test_moments_of_another_type_are_refused(self, dtype: torch.dtype):
        shape = load_file(STEP / OPTIMIZER)["exp_avg.wpe.weight"].shape
        self.alter(OPTIMIZER, "exp_avg.wpe.weight", torch.zeros(shape, dtype=dtype))
        refused("resume", OPTIMIZER)

    @pytest.mark.parametrize("shape", [(3,), (1, 1)], ids=str)
    def test_a_count_of_steps_of_another_shape_is_refused(self, shape: tuple[int, ...]):
        self.alter(OPTIMIZER, "step.wpe.weight", torch.zeros(shape))
        refused("resume", OPTIMIZER)

    @pytest.mark.parametrize("shape", [(), (1,), (16, 64), (10**6, 0)], ids=str)
    @pytest.mark.parametrize("command", ["resume", "generate"])
    def test_weights_of_another_shape_are_refused(self, command: str, shape: tuple[int, ...]):
        self.alter(MODEL, "wte.weight", torch.zeros(shape))
        refused(command)

    @staticmethod
    def alter(file: str, name: str, tensor: torch.Tensor) -> None:
        held = {key: value.clone() for key, value in load_file(STEP / file).items()}
        assert name in held
        save_file(held | {name: tensor}, STEP / file)
        runs.forge_manifest(STEP)


class TestNames:
    """A bait lies outside of the folder: a whole checkpoint, of another training."""

    @pytest.fixture(autouse=True)
    def bait(self, out: Path, other: Path) -> Path:
        shutil.copytree(other, "bait")
        shutil.copytree("bait/step-000006", "step-000006")
        return Path("step-000006")

    @pytest.mark.parametrize(
        "name", some(3, ["../../step-000006/model.safetensors", "/etc/passwd", "../state.json", "x", "", ".", "a\0b"])
    )
    @pytest.mark.parametrize("way", ["added", "instead"])
    @pytest.mark.parametrize("command", MAINS)
    @pytest.mark.covering_array(1)
    def test_a_manifest_lists_its_own_files_and_no_other(self, command: str, way: str, name: str):
        files = json.loads((STEP / MANIFEST).read_text())["files"]
        changed = files | {name: files[MODEL]}
        if way == "instead":
            del changed[MODEL]
        (STEP / MANIFEST).write_text(json.dumps({"format": 1, "files": changed}, indent=1) + "\n")
        refused(command, STEP / MANIFEST)

    @pytest.mark.parametrize("name", ["latest", "best"])
    @pytest.mark.parametrize(
        "target",
        some(3, ["../step-000007", "../../etc", "/etc", "../bait", "..", "step-000006/..", "step-000006/model"]),
    )
    @pytest.mark.covering_array(1)
    def test_a_pointer_that_leads_outside_leads_nowhere(self, name: str, target: str):
        (Path("out") / name).write_text(target + "\n")
        refused("verify", Path("out") / name)
        code, lines = told("generate") if name == "latest" else (2, ["error: out/best"])
        assert code == 2
        assert "out/" in lines[-1]
        code, lines = told("resume")  # the checkpoints themselves are whole
        assert code == 0, lines
        assert any(line.startswith(f"damaged: out/{name} ") for line in lines) == (name == "latest")

    @pytest.mark.parametrize("target", ["../step-000006", "../bait/step-000006", "/{}/step-000006"])
    def test_a_pointer_to_another_runs_step_of_the_same_name_means_its_own(self, target: str):
        target = target.format(Path.cwd())
        (Path("out") / "latest").write_text(target + "\n")
        assert store.find(Path("out"), "latest") == STEP

    @pytest.mark.parametrize("name", ["../step-000006", "../../etc", "/etc", "..", "../bait/step-000006"])
    def test_a_flag_names_no_checkpoint_outside(self, name: str):
        if Path(name).name == STEP.name:
            assert store.find(Path("out"), name) == STEP
        else:
            with pytest.raises(UsageError, match="is not in out"):
                store.find(Path("out"), name)

    def test_nothing_outside_is_opened(self, bait: Path):
        """Whatever latest, best and the manifest say."""
        for name in ("latest", "best"):
            (Path("out") / name).write_text("../step-000006\n")
        bait_files = {str(path.resolve()) for path in bait.rglob("*")}
        number = os.fork()
        if number == 0:
            seen = []

            def hook(event: str, arguments: tuple) -> None:
                if event == "open" and isinstance(arguments[0], str | os.PathLike):
                    seen.append(str(Path(arguments[0]).resolve()) in bait_files)

            sys.addaudithook(hook)
            codes = [main() for main in MAINS.values()]
            os._exit(1 if any(seen) or not seen or any(codes) else 0)
        assert os.waitpid(number, 0)[1] == 0


class TestJson:
    DEEP = b"[" * 10**6
    NAMES = ("config.json", "tokenizer.json", f"step-000006/{STATE}", f"step-000006/{MANIFEST}")

    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("kind", ["nested deep", "100 MB", "10 GB", "digits", "a list", "null", "no UTF-8"])
    @pytest.mark.parametrize("command", MAINS)
    @pytest.mark.covering_array(1)
    def test_what_no_run_writes_is_one_line(self, command: str, kind: str, name: str):
        path = Path("out") / name
        if kind.endswith("B"):
            os.truncate(path, {"100 MB": 100 << 20, "10 GB": 10 << 30}[kind])
        else:
            content = {"nested deep": b'{"format": ' + self.DEEP, "digits": b'{"format": ' + b"9" * 10**5 + b"}"}
            content |= {"a list": b"[1]", "null": b"null", "no UTF-8": b'{"\xff": 1}'}
            path.write_bytes(content[kind])
        if name.endswith(STATE):
            state = path.read_bytes() if kind[0] != "1" else b"x"
            if len(state) > 1:
                runs.forge_manifest(STEP)
        if (command, name) == ("verify", "tokenizer.json"):
            pytest.skip("it checks checkpoints")
        refused(command, path)

    @pytest.mark.parametrize("name", ["latest", "best"])
    @pytest.mark.parametrize("command", MAINS)
    def test_a_pointer_of_10_gb_is_not_read(self, command: str, name: str):
        os.truncate(Path("out") / name, 10 << 30)
        code, lines = told(command)
        assert code == (0 if command == "resume" else 1 if command == "verify" else 2 if name == "latest" else 0), lines

    @pytest.mark.parametrize("content", [b"[" * 10**6 + b"\n", b'{"step": ' + b"[" * 10**6, b'{"step": 1e999}\n'])
    def test_metrics_that_are_nonsense_stop_no_resume(self, content: bytes):
        with Path("out/metrics.jsonl").open("ab") as file:
            file.write(content)
        code, lines = told("resume")
        assert code == 0, lines

    PROGRESS: ClassVar[list[object]] = [[], None, "x", {}]
    PROGRESS += [{"step": value} for value in ("6", None, 6.0, -6, 5, 10**18)]
    PROGRESS += [
        {name: "x"} for name in ("tokens", "val_loss", "best_val_loss", "best_step", "skipped_batches", "more")
    ]
    PROGRESS += [{"val_loss": []}, {"best_step": -3}, {"skipped_batches": 10**30}, {"skipped_batches": -(10**30)}]

    @pytest.mark.parametrize("progress", some(8, PROGRESS), ids=str)
    def test_progress_that_is_nonsense_is_refused(self, progress: object):
        state = store.load_state(STEP)
        changed = isinstance(progress, dict) and bool(progress)
        state["progress"] = state["progress"] | progress if changed else progress
        (STEP / STATE).write_bytes(store.json_bytes(state))
        runs.forge_manifest(STEP)
        told("verify")  # without a traceback
        refused("resume", STATE)

    @pytest.mark.parametrize(
        "part",
        some(
            8,
            [{"guard": part} for part in (None, [], {"in_row": math.inf}, {"in_row": math.nan}, {"good": -1})]
            + [{"guard": {"variance": "x"}}, {"guard": {"mean": math.nan}}, {"guard": {"mean": 1e300}}]
            + [{"scaler": SCALER | {"scale": value}} for value in (math.nan, 0, math.inf, "x", None)]
            + [{"scaler": SCALER | part} for part in ({"_growth_tracker": []}, {"growth_factor": None})]
            + [{"scaler": SCALER | {"growth_interval": value}} for value in (2000.5, 2**40, -1)]
            + [{"scaler": {"scale": 1.0}}, {"scaler": "x"}, {"scaler": 1}],
        ),
        ids=str,
    )
    def test_a_state_that_is_nonsense_is_refused(self, part: dict):
        (STEP / STATE).write_text(json.dumps(store.load_state(STEP) | part))
        runs.forge_manifest(STEP)
        refused("resume", STATE)

    @pytest.mark.parametrize(
        "changes",
        [
            {"n_layer": 10**12},
            {"n_embd": 65536, "n_layer": 10**6, "n_head": 1},
            {"block_size": 10**12},
            {"block_size": 10**12, "position": "rotary"},
        ],
        ids=str,
    )
    @pytest.mark.parametrize("command", ["resume", "generate"])
    def test_a_configuration_of_10_tb_is_refused(self, command: str, changes: dict):
        content = json.loads(Path("out/config.json").read_text())
        content["config"] |= changes
        content["sha256"] = run_folder.content_hash(content)
        Path("out/config.json").write_text(json.dumps(content))
        refused(command)

    @pytest.mark.parametrize("threads", ["2", 0, -1, 2.0, [], None], ids=str)
    def test_a_number_of_threads_that_is_none_is_refused(self, threads: object):
        content = json.loads(Path("out/config.json").read_text()) | {"threads": threads}
        content["sha256"] = run_folder.content_hash(content)
        Path("out/config.json").write_text(json.dumps(content))
        refused("resume", "config.json")


WHOLE = (MODEL, OPTIMIZER, STATE, MANIFEST)
READ = {  # what each command reads; the rest is made anew, or none of its business
    "resume": ("config.json", "tokenizer.json", "metrics.jsonl", ".lock", *WHOLE),
    "generate": ("config.json", "tokenizer.json", "latest", MODEL, STATE, MANIFEST),
    "verify": ("config.json", "latest", "best", *WHOLE),
}


class TestPipes:
    """A pipe (FIFO) waits for its other end: who opens one may never come back."""

    @pytest.mark.parametrize(
        "name", ["latest", "best", "config.json", "tokenizer.json", "metrics.jsonl", ".lock", *WHOLE]
    )
    @pytest.mark.parametrize("command", MAINS)
    @pytest.mark.covering_array(1)
    def test_nothing_waits_for_one(self, command: str, name: str):
        path = (STEP if name in WHOLE else Path("out")) / name
        path.unlink()
        os.mkfifo(path)
        if name in READ[command]:
            refused(command, name)
        else:
            assert told(command)[0] == (2 if name == "tokenizer.json" else 0)


class TestLinks:
    @pytest.mark.parametrize(
        "name",
        ["latest", "config.json", "tokenizer.json", "metrics.jsonl", ".lock", "step-000006"]
        + [f"step-000006/{name}" for name in (MODEL, OPTIMIZER, STATE, MANIFEST)],
    )
    @pytest.mark.parametrize("command", MAINS)
    @pytest.mark.covering_array(1)
    def test_a_link_to_itself_is_no_traceback(self, command: str, name: str):
        path = Path("out") / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        path.symlink_to(path.name)
        code, lines = told(command)
        assert code in (0, 1, 2), lines
        if name.startswith("step-") and not (command == "generate" and name.endswith(OPTIMIZER)):
            assert code != 0, lines
