"""--prompts: each line is answered in its place, whatever the cache; one that is wrong is named, or told alone."""

import io
import itertools
import random
import re
import shlex
import sys
from pathlib import Path

import pytest

from fastgpt import cli, generate
from fastgpt.config.generation import SamplingParams
from fastgpt.errors import UsageError
from fastgpt.generation import answers as answers_module
from fastgpt.generation import many_prompts, prompts_file, terminal, writing
from fastgpt.generation.answers import Answers
from fastgpt.generation.generator import TextGenerator
from tests.helpers import runs
from tests.helpers.prompts import answers, command, refusal, without_timings, write_jobs
from tests.helpers.untrained import fresh

BLOCK = 32
JOBS = [
    {"prompt": "abc"},
    {"tokens": [1, 2, 3], "seed": 9, "num_samples": 2},
    {"prompt": "", "max_new_tokens": 4, "logprobs": 2},
    {"prompt": "abcdefghij" * 4},  # its window slides
    {"prompt": "jihg", "stop": "a", "max_new_tokens": 30},
    {"prompt": "j", "stop": ["b", "c"], "stop_tokens": [4], "temperature": 0, "max_new_tokens": 30},
    {"prompt": "a", "repetition_penalty": 1.2, "top_k": 3, "top_p": 0.9, "min_p": 0.01},
    {"tokens": []},
]
KEYS = ["index", "sample", "prompt", "text", "tokens", "finish_reason", "timings"]


@pytest.fixture(scope="module")
def generator() -> TextGenerator:
    return fresh(block_size=BLOCK)


@pytest.fixture
def place(tmp_path: Path, monkeypatch, generator: TextGenerator) -> Path:
    """A working folder, in which the command's run is the small model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(writing, "load", lambda *_, **__: generator)
    return tmp_path


# Reading


@pytest.mark.parametrize(
    ("content", "prompts"),
    [
        (b"abc\ndef\n", ["abc", "def"]),
        (b"abc\ndef", ["abc", "def"]),
        (b"abc\r\ndef\r\n", ["abc", "def"]),
        (b"\nabc\n\n", ["", "abc", ""]),
        (b"\n", [""]),
        (b"  abc \n", ["  abc "]),
        ("ä\u2028b\x0bc\x85d\n".encode(), ["ä\u2028b\x0bc\x85d"]),  # only a line feed ends a line
        (b'{"prompt": "a"}\n', ['{"prompt": "a"}']),
    ],
)
def test_a_line_of_a_text_file_is_a_prompt(tmp_path: Path, monkeypatch, content: bytes, prompts: list[str]):
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    defaults = SamplingParams(seed=3)
    assert prompts_file.read_prompts(str(path), defaults) == [(prompt, defaults) for prompt in prompts]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert prompts_file.read_prompts("-", defaults) == [(prompt, defaults) for prompt in prompts]


def test_a_line_of_json_may_have_settings_of_its_own(tmp_path: Path):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(
        b'{"prompt": "a\\nb", "temperature": 0, "stop": "x", "top_p": null}\r\n'
        b'{"tokens": [1, 2], "stop": ["x", "y"], "stop_tokens": [3], "logprobs": 0}\n'
    )
    first, second = prompts_file.read_prompts(str(path), SamplingParams(seed=3, top_p=0.5))
    assert first == ("a\nb", SamplingParams(seed=3, temperature=0, stop=("x",), top_p=None))
    assert second == ([1, 2], SamplingParams(seed=3, top_p=0.5, stop=("x", "y"), stop_tokens=(3,), logprobs=0))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt": "a"', ["is not JSON"]),
        ("[" * 100_000, ["is not JSON"]),
        ('"a"', ['either "prompt" or "tokens"']),
        ("{}", ['either "prompt" or "tokens"']),
        ('{"prompt": "a", "tokens": [1]}', ['either "prompt" or "tokens"']),
        ('{"prompt": 7}', ["prompt must be text", "not 7"]),
        ('{"prompt": null}', ["prompt must be text", "not None"]),
        ('{"tokens": [1, "a"]}', ["tokens a list of token ids"]),
        ('{"tokens": [%s]}' % ("1" * 5000), ["tokens a list of token ids"]),
        ('{"prompt": "a", "seed": %s}' % ("1" * 5000), ["--seed inf is not of type int"]),
        ('{"tokens": [1.0]}', ["tokens a list of token ids"]),
        ('{"tokens": [true]}', ["tokens a list of token ids"]),
        ('{"prompt": "a", "temprature": 1}', ["unknown setting 'temprature'", "did you mean temperature?"]),
        ('{"prompt": "a", "out_dir": "x"}', ["unknown setting 'out_dir'"]),
        ('{"prompt": "a", "temperature": -1}', ["--temperature -1 must be at least 0"]),
        ('{"prompt": "a", "temperature": "hot"}', ["--temperature 'hot' is not of type"]),
        ('{"prompt": "a", "temperature": NaN}', ["--temperature nan is not a finite number"]),
        ('{"prompt": "a", "temperature": 1e999}', ["--temperature inf is not a finite number"]),
        ('{"prompt": "a", "max_new_tokens": 1.5}', ["--max_new_tokens 1.5"]),
        ('{"prompt": "a", "max_new_tokens": true}', ["--max_new_tokens True"]),
        ('{"prompt": "a", "max_new_tokens": null}', ["--max_new_tokens None"]),
        ('{"prompt": "a", "num_samples": 0}', ["--num_samples 0 must be at least 1"]),
        ('{"prompt": "a", "seed": -1}', ["--seed -1 must be at least 0"]),
        ('{"prompt": "a", "stop": [1]}', ["--stop"]),
        ('{"prompt": "a", "stop": {"a": 1}}', ["--stop"]),
        ('{"prompt": "a", "stop_tokens": ["a"]}', ["--stop_tokens"]),
    ],
)
@pytest.mark.usefixtures("place")
def test_a_line_that_is_no_request_is_named_before_anything_is_computed(capsys, line: str, words: list[str]):
    Path("p.jsonl").write_text(f'{{"prompt": "a"}}\n{line}\n{{"prompt": "b"}}\n')
    found = refusal(capsys, "--prompts p.jsonl")
    assert [word for word in ["--prompts p.jsonl, line 2", *words] if word not in found] == [], found


@pytest.mark.usefixtures("place")
def test_all_lines_that_are_no_requests_are_named_at_once(capsys, monkeypatch):
    monkeypatch.setattr(prompts_file, "MOST_ERRORS", 3)
    bad = ['{"prompt": 7}', "", '{"prompt": "a", "temprature": 1}', '{"prompt": "a"}', "\t", "[1", "{}", "3", '"a"']
    Path("p.jsonl").write_text("\n".join(bad))
    assert command("--prompts p.jsonl") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.partition(" is")[0].partition(": ")[2].partition(": ")[0] for line in err.splitlines()] == [
        *(f"--prompts p.jsonl, line {number}" for number in (1, 3, 6)),
        "--prompts p.jsonl has 3 more lines that are no requests",
    ]


@pytest.mark.usefixtures("place")
def test_blank_lines_and_a_byte_order_mark_are_no_requests(capsys):
    content = '\ufeff{"prompt": "abc"}\r\n\r\n   \n{"prompt": "a"}\n\n'
    Path("p.jsonl").write_text(content, encoding="utf-8", newline="")
    assert [prompt for prompt, _ in prompts_file.read_prompts("p.jsonl", SamplingParams())] == ["abc", "a"]
    Path("p.txt").write_text("\ufeffabc\r\n\r\na\r\n", encoding="utf-8", newline="")
    assert [prompt for prompt, _ in prompts_file.read_prompts("p.txt", SamplingParams())] == ["abc", "", "a"]
    Path("p.jsonl").write_text("\n \n")
    assert "--prompts p.jsonl is empty" in refusal(capsys, "--prompts p.jsonl")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--prompts nowhere.txt", ["--prompts nowhere.txt cannot be read: No such file"]),
        ("--prompts .", ["--prompts . cannot be read"]),
        ("--prompts empty.txt", ["--prompts empty.txt is empty"]),
        ("--prompts latin.txt", ["latin.txt is not UTF-8", "0xe9"]),
        ("--prompts p.txt --output there.jsonl", ["--output there.jsonl exists"]),
        ("--prompts p.txt --output nowhere/x.jsonl", ["there is no folder nowhere"]),
        ("--prompts p.txt --output p.txt/x.jsonl", ["p.txt"]),
        ("--prompts p.txt --prompt a", ["--prompt and --prompts exclude"]),
        ("--prompts p.txt --interactive", ["--interactive and --prompts exclude"]),
        ("--output x.jsonl", ["--output x.jsonl is for --prompts"]),
        ("--prompts p.txt --cache dense --speculate ngram", ["--speculate needs the paged cache, not --cache dense"]),
        ("--prompts p.txt --cache none --compile", ["--compile", "not for --cache none"]),
        ("--prompts p.txt --kv_memory 10", ["--kv_memory 10", "bytes"]),
        ("--prompts p.txt --kv_memory lots", ["--kv_memory 'lots'"]),
    ],
)
@pytest.mark.usefixtures("place")
def test_flags_that_do_not_fit_are_refused(capsys, flags: str, words: list[str]):
    Path("p.txt").write_text("a\n")
    Path("empty.txt").touch()
    Path("latin.txt").write_bytes(b"caf\xe9\n")
    Path("there.jsonl").write_text("mine")
    found = refusal(capsys, flags)
    assert [word for word in words if word not in found] == [], found
    assert Path("there.jsonl").read_text() == "mine"
    assert not Path("x.jsonl").exists()


# Writing


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("flags", ["", "--max_batch 1", "--speculate ngram --page_size 1 --no-prefix_cache"])
def test_every_cache_gives_the_same_lines_in_the_order_of_the_prompts(capsys, flags: str):
    jobs = [*JOBS, {"prompt": "a¿"}, {"tokens": [1, 11]}, {"tokens": [-1]}, {"prompt": "\ud800"}, {"prompt": "b"}]
    write_jobs(jobs)
    found = {}
    for cache in ("none", "dense", "paged"):
        assert command(f"--prompts p.jsonl --cache {cache} {flags if cache == 'paged' else ''}") == 1
        captured = capsys.readouterr()
        found[cache] = answers(captured.out)
        assert "4 of 13 prompts could not be continued; see their error" in captured.err
    paged = found["paged"]
    assert without_timings(found["none"]) == without_timings(found["dense"]) == without_timings(paged)
    order = [(i, n) for i, job in enumerate(jobs) for n in range(job.get("num_samples", 1))]
    assert [(line["index"], line["sample"]) for line in paged] == order
    for line in paged:
        job = jobs[line["index"]]
        assert list(line)[:7] == KEYS
        assert line["prompt"] == job.get("prompt", job.get("tokens"))
        assert ("logprobs" in line) == ("logprobs" in job)
        assert ("error" in line) == (line["finish_reason"] == "error") == (8 < line["index"] + 1 < 13)
    assert [len(one["top"]) for one in paged[3]["logprobs"]] == [2] * 4
    assert {line["finish_reason"] for line in paged} == {"stop", "length", "error"}


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("cache", ["none", "dense", "paged", "auto"])
def test_no_new_tokens_are_an_empty_line_for_each_continuation(capsys, cache: str):
    Path("p.txt").write_text("abc\na\n")
    assert command(f"--prompts p.txt --cache {cache} --num_samples 2 --max_new_tokens 0") == 0
    found = answers(capsys.readouterr().out)
    assert [(line["index"], line["sample"], line["tokens"]) for line in found] == [
        (i, n, []) for i in range(2) for n in range(2)
    ]


@pytest.mark.usefixtures("place")
def test_output_takes_the_lines_and_stdout_stays_empty(capsys):
    write_jobs([{"prompt": "abc"}, {"prompt": "\ud800é"}, {"prompt": "b"}])
    assert command("--prompts p.jsonl") == 1
    shown = answers(capsys.readouterr().out)
    assert command("--prompts p.jsonl --output answers.jsonl") == 1
    assert capsys.readouterr().out == ""
    content = Path("answers.jsonl").read_bytes()
    assert without_timings(answers(content.decode())) == without_timings(shown)
    assert b"\r" not in content
    assert shown[1]["prompt"] == "\ud800é"


@pytest.mark.usefixtures("place")
def test_a_line_is_written_as_soon_as_all_before_it_are(generator: TextGenerator):
    """So that what is done is not lost where the rest fails."""
    engine = generator.engine(kv_memory=200_000)
    lengths = [3, 1, 2, 9, 4]
    jobs = [("abc", SamplingParams(max_new_tokens=n)) for n in lengths]
    seen = []

    def completions(wanted: list[list[int]]):
        for done in many_prompts.all_at_once(engine, jobs, wanted=wanted):
            if done is not None:
                seen.append((done.index, len(answers(Path("o").read_text()))))
            yield done

    with Answers("o", jobs) as written:
        assert many_prompts.answer(completions(written.wanted), written, engine) is None
    assert (written.failed, written.done) == (set(), 5)
    assert seen == [(1, 0), (2, 0), (0, 0), (4, 3), (3, 3)]
    assert [len(line["tokens"]) for line in answers(Path("o").read_text())] == lengths


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_lines_are_json_whatever_the_terminals_encoding(monkeypatch, encoding: str):
    content = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(content, encoding=encoding))
    write_jobs([{"prompt": "é€😀\ud800"}])
    assert command("--prompts p.jsonl") == 1
    sys.stdout.flush()
    (line,) = answers(content.getvalue().decode(encoding))
    assert line["prompt"] == "é€😀\ud800"


@pytest.mark.usefixtures("place")
def test_the_summary_says_what_was_done(capsys):
    Path("p.txt").write_text("abcdefghijabcdefghij\n" * 3)
    assert command("--prompts p.txt --page_size 8 --speculate ngram --temperature 0") == 0
    facts = dict(re.split(r"  +", line, maxsplit=1) for line in capsys.readouterr().err.splitlines())
    assert list(facts) == [
        *("prefill", "decode", "time to first token", "time per token"),
        *("pages", "prefix hits", "preemptions", "speculation"),
    ]
    assert re.fullmatch(r"28 tokens at [\d,]+ tokens/s", facts["prefill"])  # 20, and 4 after two shared pages, twice
    assert re.fullmatch(r"21 tokens at [\d,]+ tokens/s", facts["decode"])
    for name in ("time to first token", "time per token"):
        assert re.fullmatch(r"p50 [\d,]+\.\d ms, p99 [\d,]+\.\d ms", facts[name])
    assert re.fullmatch(r"peak [68] of \d+", facts["pages"])
    assert (facts["prefix hits"], facts["preemptions"]) == ("32 tokens", "0")
    assert re.fullmatch(r"\d+ of \d+ guesses accepted \(\d+%\)", facts["speculation"])


@pytest.mark.usefixtures("place")
def test_progress_says_who_runs_and_waits_and_what_is_taken(capsys, monkeypatch):
    monkeypatch.setattr(terminal, "PLAIN_INTERVAL", -1.0)
    Path("p.txt").write_text("abc\n" * 5)
    assert command("--prompts p.txt --max_batch 2") == 0
    pattern = r"(\d+) running, (\d+) waiting, (\d+) of 5 done  [\d,]+ tokens/s  (\d+) of \d+ pages"
    shown = [re.fullmatch(pattern, line) for line in capsys.readouterr().err.splitlines()]
    counts = [tuple(map(int, match.groups())) for match in shown if match]
    for running, waiting, done, used in counts:
        assert running + waiting + done <= 5  # of two that end in a step, one is told first
        assert running <= min(2, used)
    assert [done for done, _ in itertools.groupby(done for *_, done, _ in counts)] == [0, 1, 2, 3, 4, 5]
    assert len(counts) == 5 * 8  # each token is told
    assert counts[-1] == (0, 0, 5, 0)
    assert counts[0][1] == 3
    assert command("--prompts p.txt --cache dense") == 0
    assert "5 of 5 done" in capsys.readouterr().err


@pytest.mark.usefixtures("workplace")
@pytest.mark.parametrize("count", [30, pytest.param(200, marks=pytest.mark.slow)])
def test_ragged_prompts_on_the_command_line(count: int, capsys):
    """On a trained run, in a pool too small for all."""
    runs.run("--max_iters 2 --eval_interval 2 --block_size 32")
    rng = random.Random(0)
    prompts = [runs.TEXT[at : at + rng.randint(0, 40)] for at in (rng.randrange(4000) for _ in range(count))]
    Path("p.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    flags = shlex.split("--prompts p.txt --max_new_tokens 6 --device cpu --dtype float32")
    memory = "15kB" if count < 100 else "50kB"
    capsys.readouterr()
    assert cli.run(generate.main, ["--cache", "paged", "--kv_memory", memory, *flags]) == 0
    shown = capsys.readouterr()
    assert cli.run(generate.main, ["--cache", "dense", "--output", "dense.jsonl", *flags]) == 0
    paged, dense = without_timings(answers(shown.out)), without_timings(answers(Path("dense.jsonl").read_text()))
    assert paged == dense
    assert [line["prompt"] for line in paged] == prompts
    assert all(len(line["tokens"]) == 6 for line in paged)
    assert "prefix hits" in shown.err


def test_reading_fails_with_the_errors_of_the_api_too(tmp_path: Path):
    with pytest.raises(UsageError, match="cannot be read"):
        prompts_file.read_prompts(str(tmp_path / "nowhere"), SamplingParams())


@pytest.mark.usefixtures("place")
def test_an_output_that_comes_to_exist_meanwhile_is_kept(capsys):
    Path("p.txt").write_text("abc\n")
    check = answers_module.check_output

    def made_meanwhile(output: str | None, resume: bool) -> None:
        check(output, resume)
        Path("o").write_text("somebody's")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answers_module, "check_output", made_meanwhile)
        assert command("--prompts p.txt --output o") == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: --output o cannot be made: File exists"
    assert Path("o").read_text() == "somebody's"
