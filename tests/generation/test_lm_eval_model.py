"""Our model in lm-evaluation-harness: likelihoods, windows and answers, and its command line on a local task."""

import functools
import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastgpt import cli, evaluate
from fastgpt import lm_eval as command
from fastgpt.errors import RunFailed, UsageError
from tests.helpers import runs
from tests.helpers.untrained import BLOCK, fresh

CHARS = "\nabcdefghij"
TASK = """
task: local_{name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
"""
CHOICES = """
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
ROLLING = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{context}}"
metric_list: [{metric: bits_per_byte}]
"""
UNTIL = """
output_type: generate_until
doc_to_text: "{{context}}"
doc_to_target: "x"
generation_kwargs: {until: [" "], max_gen_toks: 5, do_sample: false}
metric_list: [{metric: exact_match}]
"""
QUESTIONS = [
    {"context": "The quick brown", "choices": ["fox", "watch"], "answer": 0},
    {"context": "a lazy dog while nine", "choices": ["jumps over", "wise"], "answer": 1},
    {"context": "häuser", "choices": ["and", "trees", "cats"], "answer": 2},
]


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch):
    """The harness's model around an untrained one."""
    pytest.importorskip("lm_eval", reason="needs the extra eval")
    from fastgpt.generation import lm_eval_model

    generator = fresh(chars=CHARS)
    monkeypatch.setattr(lm_eval_model, "load", lambda name, **named: generator)
    return lm_eval_model.HarnessModel("out", max_gen_toks=3)


def requests(*arguments: tuple) -> list[SimpleNamespace]:
    return [SimpleNamespace(args=own) for own in arguments]


def nats(model, ids: list[int], count: int) -> float:
    """The log-probability of the last `count` tokens."""
    text = torch.tensor(ids)
    with torch.no_grad():
        logs = model(text[None, :-1])[0].double().log_softmax(-1)
    return logs.gather(1, text[1:, None])[-count:].sum().item()


@pytest.mark.peers
class TestModel:
    def test_likelihoods(self, harness):
        found = harness.loglikelihood(requests(("ab", "cd"), ("", "ab"), ("ab", "e")))
        expected = [([1, 2, 3, 4], 2), ([0, 1, 2], 2), ([1, 2, 5], 1)]
        assert [own for own, _ in found] == pytest.approx([nats(harness.model, *own) for own in expected], rel=1e-5)
        assert all(type(greedy) is bool for _, greedy in found)

    @pytest.mark.parametrize("length", [1, BLOCK, BLOCK + 1, 2 * BLOCK + 3])
    def test_a_long_text_is_read_in_windows_with_as_much_context_as_fits(self, harness, length: int):
        ids = [1 + (7 * at) % 10 for at in range(length)]
        found = harness.loglikelihood_rolling(requests((harness.tokenizer.decode(ids),)))
        text, total, at = [0, *ids], 0.0, 0
        while at < length:
            end = min(at + BLOCK, length)
            total += nats(harness.model, text[max(0, end - BLOCK) : end + 1], end - at)
            at = end
        assert found == [pytest.approx(total, rel=1e-5)]

    def test_the_token_before_a_text_may_be_another(self, harness):
        from fastgpt.generation import lm_eval_model

        other = lm_eval_model.HarnessModel("out", prefix_token_id=4)
        (found,) = other.loglikelihood_rolling(requests(("ab",)))
        assert found == pytest.approx(nats(harness.model, [4, 1, 2], 2), rel=1e-5)
        with pytest.raises(UsageError, match="prefix_token_id 11 is no token of 11"):
            lm_eval_model.HarnessModel("out", prefix_token_id=11)

    def test_answers_are_greedy_and_end_before_a_stop_text(self, harness):
        whole = harness.generator.generate("abc", temperature=0, max_new_tokens=3)
        given = ({}, {"until": whole[1]}, {"until": [whole[2:], ""], "max_gen_toks": 4, "do_sample": False})
        found = harness.generate_until(requests(*(("abc", own) for own in given)))
        assert found == [whole, whole[: whole.index(whole[1])], whole[: whole.index(whole[2])]]

    def test_a_long_context_is_cut_to_leave_room(self, harness):
        (found,) = harness.generate_until(requests(("j" * 9 + "abcde", {})))
        assert found == harness.generator.generate("abcde", temperature=0, max_new_tokens=3)

    def test_sampling_takes_its_settings(self, harness):
        params = harness._sampling({"do_sample": True, "temperature": 0.5, "top_p": 0.9, "max_new_tokens": 2})
        assert (params.temperature, params.top_p, params.top_k, params.max_new_tokens) == (0.5, 0.9, 0, 2)
        assert harness._sampling({"do_sample": False, "temperature": 0.5}).temperature == 0

    def test_logits_that_are_not_numbers_are_an_error(self, harness):
        with torch.no_grad():
            harness.model.ln_f.weight.fill_(float("nan"))
        with pytest.raises(RunFailed):
            harness.generate_until(requests(("a", {})))

    @pytest.mark.parametrize(
        ("settings", "saying"),
        [
            ({"num_beams": 4}, "unknown setting 'num_beams'"),
            ({"temprature": 1}, "did you mean temperature"),
            ({"max_gen_toks": 8}, "max_gen_toks 8 leaves no room for a context in the model's block_size 8"),
            ({"top_p": 2.0}, "`top_p` 2.0"),
        ],
    )
    def test_settings_that_there_are_not_are_refused(self, harness, settings: dict, saying: str):
        with pytest.raises(UsageError, match=saying):
            harness.generate_until(requests(("a", settings)))

    @pytest.mark.parametrize(("given", "expected"), [(1, 64), ("auto", 64), ("auto:4", 64), ("7", 7), (3, 3)])
    def test_batch_sizes(self, harness, given, expected: int):
        from fastgpt.generation.lm_eval_model import _batch_size

        assert _batch_size(given) == expected
        with pytest.raises(UsageError, match="`batch_size`"):
            _batch_size(f"{given}x" if given != "auto" and given != "auto:4" else 0)

    @pytest.mark.parametrize(
        ("given", "gpu", "expected"),
        [(None, False, "auto"), ("cuda:0", False, "auto"), ("cuda:0", True, "cuda:0"), ("cuda:1", False, "cuda:1")],
    )
    def test_the_harness_default_device_need_not_be_there(self, harness, monkeypatch, given, gpu: bool, expected: str):
        from fastgpt.generation.lm_eval_model import _device

        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        assert _device(given) == expected

    def test_an_unknown_argument_is_refused(self, harness):
        from fastgpt.generation.lm_eval_model import HarnessModel

        with pytest.raises(UsageError, match="unknown argument 'dtpye'; did you mean dtype"):
            HarnessModel("out", dtpye="float32")


@pytest.fixture
def offline(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches of the test's own, and none of the harness's tasks, whose thousands of files it would read first."""
    tasks = pytest.importorskip("lm_eval.tasks", reason="needs the extra eval")
    datasets = pytest.importorskip("datasets", reason="needs the extra eval")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", workplace / "cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr(tasks, "TaskManager", functools.partial(tasks.TaskManager, include_defaults=False))


@pytest.mark.peers
@pytest.mark.usefixtures("offline")
def test_the_harness_runs_local_tasks(workplace: Path, capsys):
    runs.run("--max_iters 3 --block_size 32")
    data = workplace / "questions.jsonl"
    data.write_text("\n".join(map(json.dumps, QUESTIONS)), encoding="utf-8")
    (workplace / "tasks").mkdir()
    for name, rest in (("choices", CHOICES), ("rolling", ROLLING), ("until", UNTIL)):
        (workplace / "tasks" / f"{name}.yaml").write_text(TASK.format(name=name, data=data) + rest)
    words = "--model fastgpt --model_args pretrained=out,dtype=float32 --include_path tasks --log_samples "
    words += "--tasks local_choices,local_rolling,local_until --output_path found"
    before = list(sys.argv)
    assert cli.run(command.main, words.split()) == 0
    assert sys.argv == before
    (path,) = Path("found").rglob("results*.json")
    results = json.loads(path.read_text())["results"]
    capsys.readouterr()
    assert cli.run(evaluate.main, ["out", "--choices", str(data), "--json", "--device=cpu"]) == 0
    ours = json.loads(capsys.readouterr().out)
    (samples,) = Path("found").rglob("samples_local_choices*.jsonl")
    theirs = [json.loads(line) for line in samples.read_text().splitlines()]
    for own, its in zip(ours["answers"], sorted(theirs, key=lambda one: one["doc_id"]), strict=True):
        assert [float(one[0]) for one in its["filtered_resps"]] == pytest.approx(own["log_likelihoods"])
    choices = results["local_choices"]
    assert (choices["acc,none"], choices["acc_norm,none"]) == pytest.approx((ours["acc"], ours["acc_norm"]))
    assert 1 < results["local_rolling"]["bits_per_byte,none"] < 10
    assert results["local_until"]["exact_match,none"] == 0


@pytest.mark.peers
@pytest.mark.usefixtures("offline")
def test_a_model_that_cannot_be_read_is_one_line(capsys):
    Path("t.yaml").write_text(TASK.format(name="choices", data="questions.jsonl") + CHOICES)
    words = "--model fastgpt --model_args pretrained=nowhere --tasks local_choices --include_path ."
    assert cli.run(command.main, words.split()) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")


def test_without_the_library_one_line_names_the_extra(capsys, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "lm_eval" else find_spec(name))
    assert cli.run(command.main, ["--tasks", "x"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "error: fastgpt.lm_eval needs lm-evaluation-harness; pip install 'fastgpt-engine[eval]'\n"
