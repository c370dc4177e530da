"""Many prompts from a file: what `--prompts` reads, what it writes, and how far it is.

A line of the file is a prompt. In a .jsonl file it is an object with `prompt` (text) or `tokens` (ids), and any field
of `SamplingParams` that is to differ from the command line's. A line of the output is an object with `index` (the line
of the prompt, from 0), `sample`, `prompt`, `text`, `tokens`, `finish_reason` and `timings` (seconds), and where there
are some `logprobs` and `error`; the lines come in the order of the prompts.
"""

import codecs
import contextlib
import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from rich.console import Console
from rich.live import Live
from rich.text import Text

from fastgpt.completion import Completion, Stats, Timings
from fastgpt.config import SamplingParams, validate
from fastgpt.decode_step import DecodeStep
from fastgpt.engine import Engine
from fastgpt.errors import UsageError, nearest
from fastgpt.files import decode_utf8
from fastgpt.model import GPT
from fastgpt.prompt import Prompt, prompt_tokens
from fastgpt.random_stream import Occurrences, prompt_digest
from fastgpt.single import Generation
from fastgpt.tokenizer import Tokenizer
from fastgpt.units import counted

LIVE_INTERVAL, PLAIN_INTERVAL = 0.1, 5.0  # seconds between lines of progress, on a terminal and elsewhere

Job = tuple[Prompt, SamplingParams]


def read_prompts(name: str, defaults: SamplingParams) -> list[Job]:
    """The prompts of a file, or with - of stdin, and the settings of each.

    Raises:
        UsageError: a file that cannot be read, or a line that is no prompt; it is named, and nothing was computed.
    """
    try:
        content = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except OSError as error:
        raise UsageError(f"--prompts {name} cannot be read: {error.strerror}") from None
    lines = decode_utf8(content, f"--prompts: {name}").split("\n")
    if lines[-1] == "":
        lines.pop()
    if not lines:
        raise UsageError(f"--prompts {name} is empty; write a prompt a line into it")
    lines = [line.removesuffix("\r") for line in lines]
    if not name.endswith(".jsonl"):
        return [(line, defaults) for line in lines]
    return [_read_object(f"--prompts {name}, line {i}", line, defaults) for i, line in enumerate(lines, 1)]


def _read_object(where: str, line: str, defaults: SamplingParams) -> Job:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where} is not JSON: {error}") from None
    if not isinstance(fields, dict) or ("prompt" in fields) == ("tokens" in fields):
        raise UsageError(f'{where} is not an object with either "prompt" or "tokens"')
    if "prompt" in fields:
        prompt = fields.pop("prompt")
        fits = isinstance(prompt, str)
    else:
        prompt = fields.pop("tokens")
        fits = isinstance(prompt, list) and all(type(token) is int for token in prompt)
    if not fits:
        raise UsageError(f"{where}: prompt must be text, and tokens a list of token ids, not {prompt!r:.40}")
    known = [field.name for field in dataclasses.fields(SamplingParams)]
    for name in fields:
        if name not in known:
            raise UsageError(f"{where}: unknown setting {name!r}{nearest(name, known)}")
    try:
        params = dataclasses.replace(defaults, **{name: _listed(name, value) for name, value in fields.items()})
        validate(params)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None
    return prompt, params


def _listed(name: str, value: Any) -> Any:
    """A setting as `SamplingParams` has it, where JSON has a list, or a single text."""
    if name == "stop" and isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


def to_line(completion: Completion, *, escaped: bool = False) -> str:
    """A completion as a line of JSON; `escaped`: in ASCII alone."""
    record: dict[str, Any] = {
        "index": completion.index,
        "sample": completion.sample,
        "prompt": completion.prompt,
        "text": completion.text,
        "tokens": completion.tokens,
        "finish_reason": completion.finish_reason,
        "timings": {
            name: None if seconds is None else round(seconds, 6)
            for name, seconds in dataclasses.asdict(completion.timings).items()
        },
    }
    if completion.logprobs is not None:
        record["logprobs"] = [{"logprob": own, "top": top} for own, top in completion.logprobs]
    if completion.error is not None:
        record["error"] = completion.error
    return json.dumps(record, ensure_ascii=escaped)


def one_by_one(
    model: GPT, tokenizer: Tokenizer, jobs: Sequence[Job], cache: str, step: DecodeStep | None = None
) -> Iterator[Completion]:
    """Every continuation in order, with the dense cache or none, as the engine would give it."""
    began, equal = time.perf_counter(), Occurrences()
    for index, (prompt, params) in enumerate(jobs):
        try:
            tokens = prompt_tokens(prompt, tokenizer, tokenizer.vocab_size)
        except UsageError as error:
            waited = time.perf_counter() - began
            yield Completion(index, 0, prompt, "", [], "error", Timings(None, None, waited), str(error))
            continue
        occurrence = equal.number(prompt_digest(tokens), params.seed)
        for sample in range(params.num_samples):
            waited = time.perf_counter() - began
            generation = Generation(model, tokenizer, tokens, params, cache, step, occurrence=occurrence, sample=sample)
            yield dataclasses.replace(generation.completion(index, sample, waited), prompt=prompt)


def all_at_once(engine: Engine, jobs: Sequence[Job]) -> Iterator[Completion | None]:
    """The engine's completions as they are finished, and None whenever a token of another has come."""
    for piece in engine.stream([prompt for prompt, _ in jobs], [params for _, params in jobs]):
        yield piece.completion


def write(
    completions: Iterator[Completion | None], jobs: Sequence[Job], output: str | None, engine: Engine | None
) -> int:
    """Write the completions as JSON lines in the order of the prompts; how many ended with an error.

    Each line is written as soon as all before it are, so that what is done is not lost.
    """
    total = sum(params.num_samples for _, params in jobs)
    held: dict[tuple[int, int], Completion] = {}
    place, done, failed = (0, 0), 0, 0
    lines_are_seen = output is None and sys.stdout.isatty()
    with _open(output) as file, Progress(total, engine, live=not lines_are_seen) as progress:
        escaped = codecs.lookup(file.encoding or "utf-8").name != "utf-8"
        for completion in completions:
            if completion is not None:
                held[completion.index, completion.sample] = completion
                refused = completion.finish_reason == "error"
                failed += refused
                done += jobs[completion.index][1].num_samples if refused else 1
            progress.show(done)
            while place in held:
                next_one = held.pop(place)
                print(to_line(next_one, escaped=escaped), file=file, flush=True)
                index, sample = place
                last = next_one.finish_reason == "error" or sample + 1 == jobs[index][1].num_samples
                place = (index + 1, 0) if last else (index, sample + 1)
    return failed


@contextlib.contextmanager
def _open(output: str | None) -> Iterator[TextIO]:
    if output is None:
        yield sys.stdout
        return
    try:
        Path(output).touch(exist_ok=False)
    except OSError as error:
        raise UsageError(f"--output {output} cannot be made: {error.strerror}") from None
    # What JSON cannot hold as it is, a lone surrogate, becomes the escape that JSON has for it.
    with Path(output).open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
        try:
            yield file
        finally:
            if file.tell() == 0:  # so that the same command can be given again
                Path(output).unlink()


def check_output(output: str | None) -> None:
    """Raises `UsageError` where the file exists or cannot be made, before any work is done."""
    if output is None:
        return
    path = Path(output)
    if path.exists():
        raise UsageError(f"--output {output} exists; delete it, or name another file")
    if not path.parent.is_dir():
        raise UsageError(f"--output {output}: there is no folder {path.parent}; make it, or name another file")
    if not os.access(path.parent, os.W_OK):
        raise UsageError(f"--output {output}: {path.parent} cannot be written to; name another file")


class Progress:
    """Running, waiting and done on stderr: a live line on a terminal, now and then a plain one elsewhere."""

    def __init__(self, total: int, engine: Engine | None, *, live: bool = True):
        self.total, self.engine = total, engine
        self.console = Console(stderr=True)
        self.live = Live(console=self.console, transient=True) if live and self.console.is_terminal else None
        self.began = self.shown = time.perf_counter()

    def __enter__(self) -> "Progress":
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()

    def show(self, done: int) -> None:
        now = time.perf_counter()
        if now - self.shown < (LIVE_INTERVAL if self.live else PLAIN_INTERVAL):
            return
        self.shown = now
        if self.live:
            self.live.update(Text(self._line(done, now)))
        else:
            self.console.print(self._line(done, now), highlight=False, soft_wrap=True)

    def _line(self, done: int, now: float) -> str:
        if self.engine is None:
            return f"{done:,} of {self.total:,} done"
        scheduler, stats = self.engine.scheduler, self.engine.stats
        allocator = scheduler.allocator
        speed = (stats.prefill_tokens + stats.decode_tokens) / (now - self.began)
        return (
            f"{len(scheduler.running):,} running, {scheduler.queued:,} waiting, {done:,} of {self.total:,} done  "
            f"{speed:,.0f} tokens/s  {allocator.used:,} of {counted(allocator.pages, 'page')}"
        )


def summary(engine: Engine) -> str:
    """What the engine did, a line each."""
    stats, scheduler = engine.stats, engine.scheduler
    facts: Mapping[str, str] = {
        "prefill": _speed(stats.prefill_tokens, stats.prefill_seconds),
        "decode": _speed(stats.decode_tokens, stats.decode_seconds),
        "time to first token": _percentiles(stats.first_token_seconds),
        "time per token": _percentiles(stats.token_seconds),
        "pages": f"peak {scheduler.allocator.peak:,} of {scheduler.allocator.pages:,}",
        "prefix hits": counted(scheduler.hits, "token"),
        "preemptions": f"{scheduler.preemptions:,}",
    }
    if engine.speculate != "none":
        facts = {**facts, "speculation": acceptance(stats)}
    width = max(map(len, facts))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in facts.items())


def acceptance(stats: Stats) -> str:
    """How many guesses were right."""
    share = f" ({stats.accepted / stats.proposed:.0%})" if stats.proposed else ""
    return f"{stats.accepted:,} of {counted(stats.proposed, 'guess')} accepted{share}"


def _speed(tokens: int, seconds: float) -> str:
    return counted(tokens, "token") + (f" at {tokens / seconds:,.0f} tokens/s" if seconds else "")


def _percentiles(seconds: Sequence[float]) -> str:
    if not seconds:
        return "-"
    half, nearly_all = np.percentile(seconds, [50, 99]) * 1e3
    return f"p50 {half:,.1f} ms, p99 {nearly_all:,.1f} ms"
