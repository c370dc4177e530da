"""The lines of --output: whole whatever happens, gone on with after a stop, and never mixed with others."""

import errno
import json
import os
import shlex
import signal
import sys
from pathlib import Path

import pytest

from fastgpt import cli, generate
from fastgpt.config.generation import SamplingParams
from fastgpt.errors import RunFailed, UsageError
from fastgpt.generation import answers, writing
from fastgpt.generation.engine import Engine
from fastgpt.generation.generator import TextGenerator
from fastgpt.generation.request import Completion, Timings
from fastgpt.generation.sampler import Sampler
from fastgpt.system import streams
from tests.helpers.prompts import answers as read_lines
from tests.helpers.prompts import refusal, without_timings, write_jobs
from tests.helpers.runs import at_call
from tests.helpers.untrained import fresh

LENGTHS = [12, 3, 1, 7, 12, 2, 5]
CACHES = ["paged", "dense", "none"]


@pytest.fixture(scope="module")
def generator() -> TextGenerator:
    return fresh(block_size=32)


@pytest.fixture
def place(tmp_path: Path, monkeypatch, generator: TextGenerator) -> Path:
    """A working folder with prompts, of which some are equal, one is refused and one has three continuations."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(writing, "load", lambda *_, **__: generator)
    counts = [3 if length == 7 else 1 for length in LENGTHS]
    pairs = enumerate(zip(LENGTHS, counts, strict=True))
    jobs = [{"prompt": "ab"[i % 2], "max_new_tokens": n, "num_samples": count} for i, (n, count) in pairs]
    jobs[5]["prompt"] = "a¿"
    write_jobs(jobs)
    return tmp_path


def command(flags: str, cache: str = "paged") -> int:
    memory = ["--kv_memory", "200kB"] if cache == "paged" else []
    return cli.run(generate.main, ["--prompts", "p.jsonl", "--cache", cache, *memory, *shlex.split(flags)])


def lines(name: str = "o") -> list[dict]:
    return without_timings(read_lines(Path(name).read_text(encoding="utf-8")))


def by_place(records: list[dict]) -> list[dict]:
    return sorted(records, key=lambda record: (record["index"], record["sample"]))


@pytest.fixture
def whole(place: Path) -> list[dict]:
    """The lines of a run that nothing disturbs."""
    assert command("--output whole") == 1
    return lines("whole")


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_leaves_what_is_finished_and_a_resume_makes_the_rest(
    whole: list[dict], monkeypatch, capfd, cache: str, name: str
):
    number = getattr(signal, name)
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        owner, called, call = (Engine, "_advance", 6) if cache == "paged" else (Sampler, "__call__", 20)
        at_call(patch, owner, called, call, lambda: os.kill(os.getpid(), number))
        assert command("--output o", cache) == 128 + number
    assert signal.getsignal(number) is before
    shown = capfd.readouterr().err
    assert "stopping: what is finished is written" in shown
    kept = lines()
    assert 2 < len(kept) < len(whole)
    assert f"stopped with {len(kept)} of 9 answers written; --resume goes on" in shown
    assert kept == [one for one in whole if one in kept], "not by their index"
    assert command("--output o --resume", cache) == 1
    assert lines()[: len(kept)] == kept
    assert by_place(lines()) == whole
    assert command("--output o --resume", cache) == 1
    assert "all 9 answers are there already" in capfd.readouterr().err


def test_a_second_signal_leaves_at_once_what_is_finished(whole: list[dict], monkeypatch):
    for call in (5, 6):
        at_call(monkeypatch, Engine, "_advance", call, lambda: os.kill(os.getpid(), signal.SIGINT))
    at_call(monkeypatch, Engine, "_advance", 6, lambda: os.kill(os.getpid(), signal.SIGINT))
    assert command("--output o") == 130
    assert {(one["index"], one["sample"]) for one in lines()} == {(1, 0), (2, 0), (5, 0)}


@pytest.mark.parametrize("cache", ["paged", "dense"])
def test_a_resume_cuts_off_half_a_line_and_makes_the_same_answers(whole: list[dict], capsys, cache: str):
    content = Path("whole").read_bytes()
    ends = [i + 1 for i, byte in enumerate(content) if byte == ord("\n")]
    for size in (1, 9, ends[0] - 1, ends[0], ends[2] + 40, ends[4] - 30, ends[-1] - 1, ends[-1]):
        Path("o").write_bytes(content[:size])
        assert command("--output o --resume", cache) == 1
        assert lines() == whole
    assert "1 of 7 prompts could not be continued" in capsys.readouterr().err


def test_a_last_line_without_its_end_is_an_answer_too(whole: list[dict]):
    """As another program may have written the file."""
    records = [json.loads(line) for line in Path("whole").read_text(encoding="utf-8").splitlines()]
    kept = [json.dumps(record | {"text": "kept"}, separators=(",", ":")) for record in records[:3]]
    Path("o").write_text("\n".join(kept), encoding="utf-8")
    assert command("--output o --resume") == 1
    assert lines() == [*(record | {"text": "kept"} for record in whole[:3]), *whole[3:]]


def test_a_resume_of_nothing_begins(whole: list[dict]):
    assert command("--output o --resume") == 1
    assert lines() == whole
    Path("o").write_bytes(b"")
    assert command("--output o") == 1  # an empty file is as good as none
    assert lines() == whole


def test_in_order_of_completion_each_line_comes_at_once(whole: list[dict], monkeypatch):
    add, seen = answers.Answers.add, []

    def added(self, completion) -> None:
        add(self, completion)
        seen.append((completion.index, completion.sample))
        assert [(one["index"], one["sample"]) for one in lines()] == seen

    monkeypatch.setattr(answers.Answers, "add", added)
    assert command("--output o --order completion") == 1
    assert seen == [(5, 0), (2, 0), (1, 0), (6, 0), (3, 0), (3, 1), (3, 2), (0, 0), (4, 0)]
    assert by_place(lines()) == whole


def test_another_line_of_prompts_changes_no_answer(whole: list[dict]):
    jobs = [json.loads(line) for line in Path("p.jsonl").read_text().splitlines()]
    write_jobs([*jobs[:2], {"prompt": "j", "max_new_tokens": 4}, *jobs[2:]])
    assert command("--output o") == 1
    others = [one for one in lines() if one["prompt"] != "j"]
    assert [one | {"index": 0} for one in others] == [one | {"index": 0} for one in whole]


OTHERS = [
    ("", "not json\n", ["line 1 is no answer", "--resume"]),
    ("", "somebody's text", ["line 1 is no answer"]),
    ("", '{"index": 0}\n', ["line 1 is no answer"]),
    ("prompt", '"b"', ["line 1 is no answer to these prompts", "--prompts"]),
    ("index", "7", ["line 1 is no answer to these prompts"]),
    ("index", "true", ["line 1 is no answer to these prompts"]),
    ("sample", "1", ["line 1 is no answer to these prompts", "--num_samples"]),
    ("sample", "-1", ["line 1 is no answer to these prompts"]),
    ("timings", "null", ["line 1 is no answer"]),
]


@pytest.mark.parametrize(("field", "value", "words"), OTHERS)
def test_a_file_of_other_answers_is_refused_and_kept(
    whole: list[dict], capsys, monkeypatch, field: str, value: str, words: list[str]
):
    monkeypatch.setattr(writing, "load", None)
    content = value
    if field:
        first, *rest = Path("whole").read_text().splitlines()
        content = "\n".join([json.dumps(json.loads(first) | {field: json.loads(value)}), *rest])
    Path("o").write_text(content)
    line = refusal(capsys, "--prompts p.jsonl --output o --resume")
    assert [word for word in ["--output o, ", *words] if word not in line] == [], line
    assert Path("o").read_text() == content


def test_an_answer_that_is_there_twice_is_refused(whole: list[dict], capsys):
    content = Path("whole").read_text()
    Path("o").write_text(content + content[: content.index("\n") + 1])
    assert "line 10 answers prompt 0 again" in refusal(capsys, "--prompts p.jsonl --output o --resume")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--resume", ["--resume", "--output"]),
        ("--output whole", ["--output whole exists", "--resume"]),
        ("--output folder", ["--output folder is a folder"]),
        ("--output /dev/null --resume", ["--resume needs a file", "/dev/null"]),
        ("--output " + "x" * 300, ["cannot be"]),
        ("--order none", ["--order 'none' is not one of input, completion"]),
    ],
)
def test_what_cannot_be_written_is_refused_before_the_model_loads(
    whole: list[dict], capsys, monkeypatch, flags: str, words: list[str]
):
    monkeypatch.setattr(writing, "load", None)
    Path("folder").mkdir()
    line = refusal(capsys, f"--prompts p.jsonl {flags}")
    assert [word for word in words if word not in line] == [], line


def test_a_file_that_another_process_writes_is_refused(whole: list[dict]):
    with answers.Answers("o", []), pytest.raises(UsageError, match="`output` o is being written by another process"):
        answers.Answers("o", [])
    answers.Answers("o", []).file.close()
    assert not Path("o").exists()


def test_a_model_that_cannot_be_loaded_leaves_no_file(place: Path, monkeypatch):
    def fails(*_, **__) -> None:
        assert Path("o").exists()
        raise UsageError("no run there")

    monkeypatch.setattr(writing, "load", fails)
    assert command("--output o") == 2
    assert not Path("o").exists()


class Disk:
    """Refuses the n-th write of a line, of which the disk may already have taken a part."""

    def __init__(self, monkeypatch, call: int, part: int):
        self.left, self.call, self.part, write = call, call, part, os.write

        def limited(descriptor: int, content: bytes) -> int:
            self.left -= content.startswith(answers.BEGINNING) and content.endswith(b"\n")
            if self.left == 0 and not self.part:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if self.left == 0:
                content, self.part = content[: self.part], 0
            return write(descriptor, content)

        monkeypatch.setattr(os, "write", limited)


@pytest.mark.parametrize("part", [0, 30])
@pytest.mark.parametrize("flags", ["", "--order completion"])
def test_a_full_disk_is_one_line_and_what_is_written_stays_whole(
    whole: list[dict], monkeypatch, capsys, flags: str, part: int
):
    capsys.readouterr()
    with monkeypatch.context() as patch:
        Disk(patch, call=4, part=part)
        assert command(f"--output o {flags}") == 1
    shown = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert shown == [
        "error: --output o takes no more: No space left on device; it holds 3 whole lines; make room, and go on with "
        "--resume"
    ]
    assert len(lines()) == 3
    assert command(f"--output o --resume {flags}") == 1
    assert by_place(lines()) == whole


def test_every_line_is_an_audit_event(place: Path):
    """So that a disk may fail in tests as it does elsewhere."""
    refused = []

    def hook(event: str, arguments: tuple) -> None:
        if event == "fastgpt.write" and arguments[0] == str(place / "o") and not refused:
            refused.append(arguments)
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    sys.addaudithook(hook)
    assert command("--output o") == 1
    assert len(refused) == 1
    assert not Path("o").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_device_may_be_the_output(place: Path, capsys):
    assert command("--output /dev/null") == 1
    capsys.readouterr()
    assert command("--output /dev/full") == 1
    (told,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert told.startswith("error: --output /dev/full takes no more: No space left on device; it holds 0 whole lines")


def test_a_stdout_that_was_closed_is_told_before_the_model_loads(place: Path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", streams.Product(sys.stdout, closed=True))
    with pytest.raises(streams.StreamLost, match="it is closed"):
        answers.Answers(None, [("a", SamplingParams())])


def test_a_prompt_that_is_refused_after_a_resume_counts_what_was_missing_of_it(whole: list[dict]):
    first = next(record for record in whole if record["index"] == 3)
    Path("o").write_text(json.dumps(first | {"timings": {"started": 0.1}}) + "\n", encoding="utf-8")
    prompts = [record["prompt"] for record in by_place(whole) if record["sample"] == 0]
    jobs = [(prompt, SamplingParams(num_samples=3 if i == 3 else 1)) for i, prompt in enumerate(prompts)]
    with answers.Answers("o", jobs, resume=True) as written:
        assert (written.done, written.total) == (1, 9)
        written.add(Completion(3, 1, prompts[3], "", [], "error", Timings(None, None, 0.0), "no room"))
        assert written.done == 3


@pytest.mark.parametrize("mode", ["w", "a"])
def test_stdout_in_a_file_keeps_its_whole_lines(place: Path, monkeypatch, mode: str):
    Path("o").write_text("before\n")
    with Path("o").open(mode, encoding="utf-8") as file, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", file)
        print("said", file=file)
        out = answers.Answers(None, []).file
        out.write('{"index": 0}')
        Disk(patch, call=1, part=5)
        with pytest.raises(RunFailed, match=r"stdout takes no more: No space .*; it holds 1 whole line; make room"):
            out.write('{"index": 1}')
        out.close()
    assert Path("o").read_text() == ("before\n" if mode == "a" else "") + 'said\n{"index": 0}\n'
