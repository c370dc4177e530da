"""The choices of `--kernels auto`: by times that the tests set, on functions that agree, disagree or raise."""

import dataclasses
import json

import pytest
import torch

from fastgpt.checkpoint import run_folder
from fastgpt.config.training import PRESETS, TrainConfig
from fastgpt.generation import load
from fastgpt.model import workloads
from fastgpt.ops import autotune, table
from fastgpt.ops.autotune import BUDGET, FEWEST_ROUNDS, MOST_REPEATS, MOST_ROUNDS, choose, chooser, contest, measure
from fastgpt.ops.table import TABLE
from fastgpt.ops.timed_choices import CANDIDATES, Choice, Environment
from fastgpt.ops.workload import Workload, timed_case
from fastgpt_kernels import reference, torch_ops
from tests.helpers.covering import some
from tests.helpers.fake_gpu import FakeGpu
from tests.helpers.runs import run

CPU = torch.device("cpu")
CONFIG = TrainConfig(
    n_layer=1, n_head=2, n_kv_head=1, n_embd=8, block_size=5, vocab_size=11, batch_size=2, dropout=0.25
)
TRAINING = workloads.training(CONFIG, torch.float32)
GENERATION = workloads.generation(CONFIG, torch.float32, 2, int8=True)
HERE = Environment("A GPU", "2.13.0", "3.7.1", "0123456789abcdef", "ieee")
each_workload = pytest.mark.parametrize("workload", [TRAINING, GENERATION], ids=["training", "generation"])


class Costs:
    """Functions that take as long as the test says, and the stopwatch that believes it."""

    def __init__(self):
        self.now = 0.0

    def __call__(self, function, seconds: float):
        def costly(*args, **kwargs):
            self.now += seconds
            return function(*args, **kwargs)

        return costly

    def stopwatch(self, call, repeats: int) -> float:
        began = self.now
        for _ in range(repeats):
            call()
        return self.now - began


def settle(op: str, workload: Workload, **functions) -> Choice:
    """The outcome of a contest; a function is given alone or as (function, seconds)."""
    costs = Costs()
    pairs = {backend: f if isinstance(f, tuple) else (f, 0.02) for backend, f in functions.items()}
    backends = {backend: costs(*pair) for backend, pair in pairs.items()}
    return contest(op, workload, CPU, backends=backends, stopwatch=costs.stopwatch)


@each_workload
@pytest.mark.parametrize(("torch_s", "triton_s", "fastest"), [(0.02, 0.021, "torch"), (0.021, 0.02, "triton")])
def test_the_faster_of_two_that_agree_is_taken(workload, torch_s, triton_s, fastest):
    for op in workload.ops:
        functions = {"torch": (TABLE[op].torch, torch_s), "triton": (TABLE[op].reference, triton_s)}
        choice = settle(op, workload, **functions)
        assert (choice.backend, choice.left_out, choice.lasting) == (fastest, {}, True), op
        assert choice.seconds == pytest.approx({"torch": torch_s, "triton": triton_s}), op


@each_workload
def test_what_python_takes_to_launch_does_not_decide(monkeypatch, workload):
    """A kernel of its own, launched through layers of Python, against an operation that PyTorch launches in no time."""
    gpu = FakeGpu(monkeypatch)
    monkeypatch.setattr(autotune, "synchronize", lambda device: gpu.wait())

    def taking(launching: float, running: float):
        def function(*args, **kwargs):
            gpu.call(launching, running)()
            return torch_ops.layer_norm(*args, **kwargs)

        return function

    backends = {"torch": taking(5e-6, 10e-6), "triton": taking(150e-6, 4e-6)}
    choice = contest("layer_norm", workload, CPU, backends=backends)
    assert choice.backend == "triton"
    assert choice.seconds == pytest.approx({"torch": 10e-6, "triton": 4e-6})


@pytest.mark.parametrize("workload", some(1, [TRAINING, GENERATION]), ids=["training", "generation"])
def test_what_will_be_compiled_is_timed_compiled_and_checked_as_it_is(monkeypatch, workload):
    compiled, compile = [], torch.compile

    def watched(function, **options):
        code = compile(function, backend="aot_eager", fullgraph=True, **options)

        def run(*args, **kwargs):
            compiled.append(options)
            return code(*args, **kwargs)

        return run

    monkeypatch.setattr(torch, "compile", watched)

    def stopwatch(call, repeats):
        call()
        return 1.0

    for op in workload.ops:
        backends = {"torch": TABLE[op].torch}
        assert contest(op, workload, CPU, backends=backends, stopwatch=stopwatch).left_out == {}
        assert compiled == []
        choice = contest(op, dataclasses.replace(workload, compile=True), CPU, backends=backends, stopwatch=stopwatch)
        assert choice.left_out == {}, op
        assert len(compiled) > FEWEST_ROUNDS
        assert all(options == {"dynamic": False} for options in compiled)
        compiled.clear()


def test_of_equals_the_first_candidate_is_taken():
    assert CANDIDATES[0] == "torch"
    assert settle("layer_norm", TRAINING, torch=torch_ops.layer_norm, triton=reference.layer_norm).backend == "torch"


def wrong_output(*args, **kwargs):
    return 1.001 * torch_ops.layer_norm(*args, **kwargs)


def wrong_gradient(*args, **kwargs):
    out = torch_ops.layer_norm(*args, **kwargs)
    return out + (out - out.detach())


def not_finite(*args, **kwargs):
    return torch_ops.layer_norm(*args, **kwargs) / 0


def no_kernel(*args, **kwargs):
    raise RuntimeError("ptxas failed\nand a long log")


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (wrong_output, "output 0 is off by 1.0e-03, with 1.0e-05 allowed"),
        (wrong_gradient, "gradient of input 0 is off by 1.0e+00, with 1.0e-05 allowed"),
        (not_finite, "output 0 is not finite"),
        (no_kernel, "RuntimeError: ptxas failed"),
    ],
)
def test_a_faster_one_that_is_wrong_or_raises_is_left_out_and_named(wrong, why):
    choice = settle("layer_norm", TRAINING, torch=torch_ops.layer_norm, triton=(wrong, 1e-6))
    assert (choice.backend, list(choice.left_out), choice.lasting) == ("torch", ["triton"], True)
    said = autotune.Chosen({"layer_norm": choice}, "A GPU", 1.0).reason.split("; ")
    assert f"triton left out of layer_norm: {why}" in said


def test_a_wrong_write_in_place_is_seen():
    def elsewhere(k, v, k_pages, v_pages, slots):
        torch_ops.kv_write(k, v, k_pages, v_pages, slots - 1)

    choice = settle("kv_write", GENERATION, torch=torch_ops.kv_write, triton=elsewhere)
    assert (choice.backend, list(choice.left_out)) == ("torch", ["triton"])


def test_torch_too_is_left_out_where_it_is_wrong():
    choice = settle("layer_norm", TRAINING, torch=(wrong_output, 1e-6), triton=reference.layer_norm)
    assert (choice.backend, list(choice.left_out)) == ("triton", ["torch"])


def test_a_lack_of_memory_at_the_true_shape_is_left_out_but_not_for_ever():
    # Which is checked at fewer tokens.
    large = workloads.training(dataclasses.replace(CONFIG, block_size=300), torch.float32)

    def hungry(q, *args, **kwargs):
        if q.shape[1] == 300:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch_ops.causal_attention(q, *args, **kwargs)

    choice = settle("causal_attention", large, torch=hungry, triton=reference.causal_attention)
    assert (choice.backend, choice.lasting) == ("triton", False)
    assert choice.left_out == {"torch": "OutOfMemoryError: CUDA out of memory"}


def test_where_nothing_is_left_the_first_candidate_stays_and_both_reasons_are_given():
    choice = settle("layer_norm", TRAINING, torch=no_kernel, triton=not_finite)
    assert (choice.backend, set(choice.left_out), choice.seconds) == ("torch", {"torch", "triton"}, {})


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU kernels are compiled")
@pytest.mark.parametrize("workload", some(1, [TRAINING, GENERATION]), ids=["training", "generation"])
def test_our_kernels_pass_the_check_in_the_interpreter(workload):
    for op in workload.ops:
        assert contest(op, workload, CPU, stopwatch=lambda call, repeats: 1.0).left_out == {}, op


def test_calls_take_turns_and_the_median_forgives_an_outlier():
    turns, times = [], {"a": iter([1.0, 3.0, 90.0, 5.0]), "b": iter([1.0, 2.0, 4.0, 0.1])}

    def stopwatch(call, repeats):
        assert repeats == 1
        turns.append(call())
        return next(times[turns[-1]])

    assert measure({"a": lambda: "a", "b": lambda: "b"}, stopwatch) == {"a": 5.0, "b": 2.0}
    assert turns == ["a", "b"] * (1 + FEWEST_ROUNDS)


@pytest.mark.parametrize("each", [1e-8, 1e-5, 1e-3, 0.05, 1.0])
def test_the_time_spent_has_a_budget(each):
    samples = []

    def stopwatch(call, repeats):
        samples.append(repeats)
        return each * repeats

    assert measure({"a": int, "b": int}, stopwatch) == pytest.approx({"a": each, "b": each})
    rounds, repeats = (len(samples) - 2) / 2, samples[-1]
    assert 1 <= repeats <= MOST_REPEATS
    assert FEWEST_ROUNDS <= rounds <= MOST_ROUNDS
    assert rounds == FEWEST_ROUNDS or each * repeats * 2 * (rounds - 1) < BUDGET


class Settled:
    """Settles every operation for triton, and remembers which it was asked for."""

    def __init__(self, **choice):
        self.asked, self.choice = [], Choice(**{"backend": "triton", "seconds": {"torch": 2.0, "triton": 1.0}} | choice)

    def __call__(self, op, workload, device):
        self.asked.append(op)
        return self.choice


def chosen(folder, workload=TRAINING, environment=HERE, **choice):
    """(what was chosen, the operations that were timed for it)"""
    settled = Settled(**choice)
    return choose(workload, CPU, environment=environment, settle=settled, folder=folder), settled.asked


@each_workload
def test_each_operation_that_is_used_is_timed_once_and_then_known(tmp_path, workload):
    first, timed = chosen(tmp_path / "new", workload)
    assert timed == list(workload.ops)
    assert first.backends == dict.fromkeys(workload.ops, "triton")
    assert first.seconds is not None
    again, timed = chosen(tmp_path / "new", workload)
    assert timed == []
    assert (again.choices, again.seconds) == (first.choices, None)


def test_calls_are_recorded_only_to_be_timed(tmp_path):
    chosen(tmp_path)
    unknown = dataclasses.replace(TRAINING, record=lambda: pytest.fail("recorded"))
    assert chosen(tmp_path, unknown)[0].choices == chosen(tmp_path)[0].choices


def test_every_operation_of_the_table_can_be_timed():
    optional = {"rms_norm", "add_rms_norm", "swiglu", "relu2"}  # of options that these models do not take
    assert {*TRAINING.ops, *GENERATION.ops} | optional == TABLE.keys()


def test_the_reason_is_one_line_that_says_what_and_when(tmp_path):
    why = {"torch": "OutOfMemoryError: CUDA out of memory"}
    idle = ", ".join(op for op in TABLE if op not in TRAINING.ops)
    left_out = "".join(f"torch left out of {op}: OutOfMemoryError: CUDA out of memory; " for op in TRAINING.ops)
    assert chosen(tmp_path, left_out=why)[0].reason == (
        f"fastest of torch and triton on A GPU; timed in 0.0 s; {left_out}not timed: {idle}"
    )
    assert chosen(tmp_path)[0].reason == f"fastest of torch and triton on A GPU; cached; {left_out}not timed: {idle}"


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Environment)])
def test_another_environment_is_timed_anew(tmp_path, field):
    chosen(tmp_path)
    assert chosen(tmp_path, environment=dataclasses.replace(HERE, **{field: "another"}))[1]
    assert not chosen(tmp_path)[1]


@pytest.mark.parametrize(
    "change",
    [
        *({name: 4} for name in ("batch_size", "block_size", "n_head", "n_embd", "vocab_size")),
        {"n_kv_head": 2},
        {"dropout": 0.5},
        {"bias": False},
        {"position": "rotary"},
        {"compile": True},
    ],
    ids=str,
)
def test_another_workload_is_timed_anew(tmp_path, change):
    chosen(tmp_path)
    config = dataclasses.replace(CONFIG, **change)
    assert chosen(tmp_path, workloads.training(config, torch.float32))[1]
    assert chosen(tmp_path, workloads.training(config, torch.bfloat16))[1]
    assert chosen(tmp_path, workloads.generation(config, torch.float32))[1]
    assert not chosen(tmp_path)[1]


def test_only_an_operation_that_is_not_known_is_timed(tmp_path):
    chosen(tmp_path)
    path = tmp_path / autotune.FILE
    content = json.loads(path.read_text())
    content["choices"][str(HERE)][str(TRAINING)]["causal_attention"] = None
    path.write_text(json.dumps(content))
    assert chosen(tmp_path)[1] == ["causal_attention"]
    assert chosen(tmp_path)[1] == []


def test_what_may_change_is_not_kept(tmp_path):
    assert chosen(tmp_path, lasting=False)[1] == list(TRAINING.ops)
    assert chosen(tmp_path)[1] == list(TRAINING.ops)


def test_a_choice_that_is_not_to_be_kept_leaves_no_file(cache):
    assert choose(TRAINING, CPU, environment=HERE, settle=Settled(), keep=False).seconds is not None
    assert list(cache.iterdir()) == []


def test_the_file_lies_in_the_projects_cache(cache):
    choose(TRAINING, CPU, environment=HERE, settle=Settled())
    assert [path.name for path in cache.iterdir()] == ["kernels.json"]


def test_choosing_leaves_the_random_numbers_alone():
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    for op in TRAINING.ops:
        settle(op, TRAINING, torch=TABLE[op].torch, triton=TABLE[op].reference)
    assert torch.equal(torch.rand(1), expected)


@pytest.fixture
def resolved(monkeypatch):
    """The workload of every choice made meanwhile."""
    calls, resolve = [], table.resolve

    def noted(kernels, device="cpu", *, recorded=None, choose=None):
        if kernels != "torch":  # as a model on the meta device has it, to count its parameters
            calls.append(choose and choose.args[0])
        return resolve(kernels, device, recorded=recorded, choose=choose)

    monkeypatch.setattr(table, "resolve", noted)
    return calls


@pytest.mark.usefixtures("workplace")
def test_a_run_and_a_generator_say_what_they_will_do(resolved):
    run("--max_iters 1 --eval_iters 1 --dropout 0.1 --n_head 4 --n_kv_head 2")
    first, training = resolved
    assert first is None  # it only says what cannot run, before the data is prepared
    vocab_size = load.load(device="cpu").tokenizer.vocab_size
    sizes = {"n_head": 4, "n_kv_head": 2, "n_embd": 16, "block_size": 8, "vocab_size": vocab_size}
    config = TrainConfig(**sizes, batch_size=4, dropout=0.1)
    assert training == workloads.training(config, torch.float32)
    assert resolved[-1] == workloads.generation(config, torch.float32)
    for batch, timed in ((64, 64), (1 << 20, load.TIMED_TOKENS // 8)):
        load.load(device="cpu", quantize="int8", batch=batch, compile=batch == 64)
        assert resolved[-1] == workloads.generation(config, torch.float32, timed, int8=True, compile=batch == 64)
    assert all("calls" not in vars(workload) for workload in resolved if workload), "recorded, with nothing to time"


@pytest.mark.usefixtures("workplace")
@pytest.mark.parametrize(("kernels", "expected"), [("reference", "reference"), ("auto", "torch")])
def test_generation_keeps_columns_that_were_asked_for_and_not_those_found_fastest_for_training(kernels, expected):
    out = run(f"--max_iters 1 --eval_iters 1 --kernels {kernels}")
    config, about = run_folder.load(out)
    found = {"columns": dict.fromkeys(TABLE, "reference"), "device": about["device"]}
    run_folder.save(out, config, run_folder.vocabulary(out), found)
    assert set(load.load(device="cpu").model.ops.backends.values()) == {expected}


def gpt2(training: bool) -> Workload:
    """Two sequences of GPT-2's shape."""
    if training:
        return workloads.training(dataclasses.replace(PRESETS["gpt2"], batch_size=2), torch.bfloat16)
    return workloads.generation(PRESETS["gpt2"], torch.bfloat16, 2)


@pytest.mark.gpu
@pytest.mark.parametrize("training", [True, False])
def test_at_gpt2s_shape_both_columns_run_and_the_choice_is_then_known(training):
    device, workload = torch.device("cuda"), gpt2(training)
    before = torch.cuda.memory_allocated()
    first = choose(workload, device)
    assert first.seconds is not None
    assert all(choice.left_out == {} for choice in first.choices.values()), first.reason
    assert torch.cuda.max_memory_allocated() < before + 2**28  # a run's peak does not count it, libraries' own aside
    ops = table.resolve("auto", device, choose=chooser(workload))
    assert "cached" in ops.reason
    assert first.backends.items() <= dict(ops.backends).items()
    for op in workload.ops:
        for name, t in timed_case(op, workload, device).results(getattr(ops, op)).items():
            assert t.isfinite().all(), f"{op}: {name}"


@pytest.mark.gpu
@pytest.mark.parametrize(("training", "op"), [(True, "add_layer_norm"), (False, "layer_norm"), (False, "kv_write")])
def test_both_columns_are_timed_compiled_where_the_model_will_be(training, op):
    choice = contest(op, dataclasses.replace(gpt2(training), compile=True), torch.device("cuda"))
    assert choice.left_out == {}
    assert choice.seconds.keys() == set(CANDIDATES)
