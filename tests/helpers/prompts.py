"""Files of prompts, and of their answers."""

import json
import shlex
from pathlib import Path

from fastgpt import cli, generate


def command(flags: str) -> int:
    given = shlex.split(flags)
    memory = [] if "none" in given or "dense" in given else ["--kv_memory", "200kB"]
    return cli.run(generate.main, ["--max_new_tokens", "8", *memory, *given])


def write_jobs(jobs: list, name: str = "p.jsonl") -> None:
    Path(name).write_text("".join(json.dumps(job) + "\n" for job in jobs), encoding="utf-8")


def answers(text: str) -> list[dict]:
    """The records of the output, every line of which must be strict JSON."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    lines = text.split("\n")
    assert lines.pop() == ""
    return [json.loads(line, parse_constant=refuse) for line in lines]


def without_timings(records: list[dict]) -> list[dict]:
    """Timings out, and log-probabilities without the digits in which rounding differs."""
    records = [{key: value for key, value in record.items() if key != "timings"} for record in records]
    for record in records:
        for one in record.get("logprobs", []):
            one["logprob"], one["top"] = round(one["logprob"], 2), [(i, round(p, 2)) for i, p in one["top"]]
    return records


def refusal(capsys, flags: str) -> str:
    capsys.readouterr()
    assert command(flags) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ")
    return line
