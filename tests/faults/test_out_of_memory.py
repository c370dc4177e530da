"""Too little memory for a micro-batch: smaller ones give the same step."""

import itertools
import re
import weakref
from pathlib import Path

import pytest
import torch

from fastgpt import cli, train
from fastgpt.checkpoint import store
from fastgpt.evaluation import loss as evaluation_loss
from fastgpt.generation.generator import TextGenerator
from fastgpt.model.gpt import GPT
from fastgpt.system import files
from fastgpt.system.out_of_memory import caught, is_out_of_memory
from fastgpt.training import adamw, state
from fastgpt.training.run import Run
from fastgpt.training.step import TrainStep
from tests.helpers.runs import FLAGS, records, resume, run, tensors

pytestmark = pytest.mark.usefixtures("workplace")
ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:128] . DefaultCPUAllocator: can't allocate memory"),
    MemoryError(),
    RuntimeError("could not create a primitive"),
    RuntimeError("could not create a primitive descriptor for a matmul primitive"),
    RuntimeError("could not create a memory object"),
    RuntimeError("could not execute a primitive"),
    RuntimeError("std::bad_alloc"),
]


def with_memory_for(monkeypatch, sequences: int, error: Exception = ERRORS[0], after: bool = False) -> list[int]:
    """Let a forward or backward pass of more sequences fail; how many there were each time."""
    forward, seen = GPT.forward, []

    def limited(self, tokens, *rest, **named):
        seen.append(len(tokens))
        if not after and len(tokens) > sequences:
            raise error
        loss = forward(self, tokens, *rest, **named)
        if after and self.training and len(tokens) > sequences and len(seen) % 2 == 0:

            def fail(gradient):
                raise error

            loss.register_hook(fail)
        return loss

    monkeypatch.setattr(GPT, "forward", limited)
    return seen


def test_what_says_that_memory_ran_out():
    assert all(is_out_of_memory(error) for error in ERRORS)
    assert not any(is_out_of_memory(kind("could not create a file")) for kind in (RuntimeError, ValueError))
    assert not is_out_of_memory(ValueError("could not create a primitive"))


@pytest.mark.parametrize("error", ERRORS[:3], ids=lambda error: type(error).__name__)
def test_after_the_block_nothing_keeps_what_was_taken_in_it(error: Exception):
    taken: list[weakref.ref] = []

    def greedy() -> None:
        tensor = torch.zeros(3)
        taken.append(weakref.ref(tensor))
        raise type(error)(str(error))

    with caught() as shortage:
        greedy()
    assert taken[0]() is None
    assert shortage.reason == str(error)
    with caught() as enough:
        pass
    assert enough.reason is None
    with pytest.raises(ZeroDivisionError), caught():
        raise ZeroDivisionError


@pytest.mark.parametrize("error", ERRORS[:4], ids=lambda error: type(error).__name__)
def test_the_losses_are_those_of_the_undivided_run(capfd, monkeypatch, error: Exception):
    flags = "--batch_size 8 --gradient_accumulation_steps 1"
    whole = run(flags, "whole")
    capfd.readouterr()
    seen = with_memory_for(monkeypatch, 2, error)
    parted = run(flags, "parted")
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("out of memory")]
    assert told == [
        "out of memory in step 1: going on with --batch_size 4 --gradient_accumulation_steps 2, the same sequences in "
        "each step",
        "out of memory in step 1: going on with --batch_size 2 --gradient_accumulation_steps 4, the same sequences in "
        "each step",
    ]
    assert seen[:3] == [8, 4, 2]  # and it stays with that
    assert set(seen[3:]) <= {1, 2, 4, 8}
    for key in ("loss", "val_loss", "grad_norm"):
        assert records(parted, key) == pytest.approx(records(whole, key), rel=0, abs=1e-5)
    for name, tensor in tensors(parted).items():
        torch.testing.assert_close(tensor, tensors(whole)[name], rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_memory_that_ends_in_a_backward_pass_leaves_no_half_of_a_gradient(monkeypatch, dtype: str):
    flags = f"--batch_size 4 --gradient_accumulation_steps 2 --dtype {dtype}"
    whole = run(flags, "whole")
    with_memory_for(monkeypatch, 2, after=True)
    parted = run(flags, "parted")
    tolerance = 1e-5 if dtype == "float32" else 5e-3
    assert records(parted) == pytest.approx(records(whole), rel=0, abs=tolerance)
    if dtype == "float16":
        scalers = [store.load_state(store.find(out, "latest"))["scaler"] for out in (whole, parted)]
        assert scalers[0] == scalers[1]


def test_an_odd_micro_batch_is_divided_evenly(monkeypatch):
    seen = with_memory_for(monkeypatch, 4)
    run("--batch_size 15 --gradient_accumulation_steps 1 --eval_iters 1 --max_iters 1")
    assert seen[:7] == [15, 5, 1, 1, 1, 1, 1]


def test_not_even_one_sequence_saves_what_is_done_and_names_the_flags(capsys, monkeypatch):
    taken = Run.take_step

    def step(self):
        if self.state.progress.step == 4:
            with_memory_for(monkeypatch, 0)
        taken(self)

    monkeypatch.setattr(Run, "take_step", step)
    assert cli.run(train.main, FLAGS) == 1
    err = capsys.readouterr().err
    line = err.splitlines()[-1]
    assert line.startswith("error: out of memory in step 5 with one sequence at a time; lower --block_size 8, ")
    assert all(flag in line for flag in ("--n_layer 1", "--n_embd 16"))
    assert line.endswith("or free memory (CUDA out of memory.)")
    assert "Traceback" not in err
    assert store.find(Path("out"), "latest").name == "step-000004"
    assert list(records(Path("out"))) == [1, 2, 3, 4]


@pytest.mark.parametrize("flags", ["", "--async_save"])
def test_an_evaluation_without_memory_saves_what_is_done(capsys, monkeypatch, flags: str):
    def greedy(*rest):
        raise ERRORS[1]

    with monkeypatch.context() as patch:
        patch.setattr(evaluation_loss, "_loss", greedy)
        assert cli.run(train.main, [*FLAGS, *flags.split()]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: out of memory in the evaluation after step 3 with one sequence at a time; lower --")
    assert store.find(Path("out"), "latest").name == "step-000003"
    whole = run("", "whole")
    assert resume() == 0
    for key in ("loss", "val_loss"):
        assert records(Path("out"), key) == records(whole, key)


@pytest.mark.parametrize(
    ("owner", "name", "saved"),
    [(TrainStep, "update", 3), (state, "make_model", None), (adamw.AdamW, "__init__", None)],
)
def test_memory_that_ends_elsewhere_ends_the_run_in_one_line(capsys, monkeypatch, owner, name: str, saved: int | None):
    """In an update half of the weights may have changed, so the checkpoint before it stays."""
    function, calls = getattr(owner, name), itertools.count(1)

    def greedy(*rest):
        if saved is None or next(calls) == 5:
            raise ERRORS[1]
        return function(*rest)

    monkeypatch.setattr(owner, name, greedy)
    assert cli.run(train.main, FLAGS) == 1
    err = capsys.readouterr().err
    assert err.splitlines()[-1].startswith("error: out of memory outside of forward and backward passes; lower ")
    assert "Traceback" not in err
    assert [folder.name for folder in store.folders(Path("out"))] == (["step-000003"] if saved else [])


def test_a_sample_without_memory_is_left_out(capsys, monkeypatch):
    def greedy(*rest, **named):
        raise ERRORS[0]

    monkeypatch.setattr(TextGenerator, "stream", greedy)
    out = run("--sample_interval 2")
    assert capsys.readouterr().out.count("(out of memory)") == 3
    assert store.find(out, "latest").name == "step-000006"


@pytest.mark.parametrize("flags", ["", "--async_save"])
def test_a_checkpoint_without_memory_is_made_up_for_by_the_next(capfd, monkeypatch, flags: str):
    write, calls = files.write, itertools.count(1)

    def greedy(*rest):
        if next(calls) == 6:  # in the second checkpoint
            raise ERRORS[1]
        return write(*rest)

    monkeypatch.setattr(store, "write", greedy)
    assert cli.run(train.main, [*FLAGS, *f"{flags} --eval_interval 2".split()]) == 1
    captured = capfd.readouterr()
    assert captured.err.count("warning: step 4: not saved, the checkpoint before it stays: [enforce fail") == 1
    assert "see the warnings above" in captured.out
    assert [folder.name for folder in store.folders(Path("out"))] == ["step-000002", "step-000006"]
    assert not list(Path("out").glob(".fastgpt-tmp-*"))


def test_async_save_without_room_waits_for_its_checkpoints(capfd, monkeypatch):
    def failing(*rest):
        raise ERRORS[1]

    monkeypatch.setattr(store.Snapshot, "copied", failing)
    out = run("--async_save")
    assert capfd.readouterr().err.count("no memory for --async_save") == 1
    assert [folder.name for folder in store.folders(out)] == ["step-000003", "step-000006"]


def test_other_errors_are_no_lack_of_memory(monkeypatch):
    monkeypatch.setattr(TrainStep, "_loss", lambda *rest: (_ for _ in ()).throw(RuntimeError("shapes do not match")))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        cli.run(train.main, FLAGS)


def test_an_evaluation_goes_on_in_halves(capfd, monkeypatch):
    flags = "--eval_iters 0"
    whole = run(flags, "whole")
    seen = with_memory_for(monkeypatch, 16)  # an evaluation takes batches of 1,024
    parted = run(flags, "parted")
    assert not re.search("^out of memory", capfd.readouterr().err, re.M)
    assert max(seen) > 16
    assert records(parted, "val_loss") == pytest.approx(records(whole, "val_loss"), rel=0, abs=1e-5)
    assert records(parted) == records(whole)
