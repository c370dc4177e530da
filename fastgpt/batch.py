"""Many prompts from a file: what `--prompts` reads, how they are continued, and how far that is.

A line of the file is a prompt. In a .jsonl file it is an object with `prompt` (text) or `tokens` (ids), and any field
of `SamplingParams` that is to differ from the command line's; blank lines are skipped there. What is written is in
`fastgpt.answers`.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.live import Live
from rich.text import Text

from fastgpt.answers import Answers, Job
from fastgpt.completion import Completion, Stats, Timings
from fastgpt.config import SamplingParams
from fastgpt.decode_step import DecodeStep
from fastgpt.engine import Engine
from fastgpt.errors import UsageError, UsageErrors
from fastgpt.files import decode_utf8
from fastgpt.model import GPT
from fastgpt.prompt import prompt_tokens
from fastgpt.random_stream import Occurrences, prompt_digest
from fastgpt.settings import sampling
from fastgpt.signals import STOPPING, noted
from fastgpt.single import Generation
from fastgpt.tokenizer import Tokenizer
from fastgpt.units import counted

MOST_ERRORS = 50  # lines of a file that are told to be wrong
LIVE_INTERVAL, PLAIN_INTERVAL = 0.1, 5.0  # seconds between lines of progress, on a terminal and elsewhere


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
    lines = [line.removesuffix("\r") for line in lines]
    objects = name.endswith(".jsonl")
    if not lines or (objects and not any(map(str.strip, lines))):
        raise UsageError(f"--prompts {name} is empty; write a prompt a line into it")
    return _read_objects(name, lines, defaults) if objects else [(line, defaults) for line in lines]


def _read_objects(name: str, lines: Sequence[str], defaults: SamplingParams) -> list[Job]:
    jobs, errors = [], []
    for i, line in enumerate(lines, 1):
        if line.strip():
            try:
                jobs.append(_read_object(f"--prompts {name}, line {i}", line, defaults))
            except UsageError as error:
                errors.append(error)
    if len(errors) > MOST_ERRORS:
        more = len(errors) - MOST_ERRORS
        errors[MOST_ERRORS:] = [UsageError(f"--prompts {name} has {more:,} more lines that are no requests")]
    if errors:
        raise UsageErrors(errors)
    return jobs


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
    try:
        return prompt, sampling(fields, defaults)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None


def one_by_one(
    model: GPT,
    tokenizer: Tokenizer,
    jobs: Sequence[Job],
    cache: str,
    step: DecodeStep | None = None,
    *,
    wanted: Sequence[Sequence[int]],
) -> Iterator[Completion | None]:
    """The wanted continuations in order, with the dense cache or none, as the engine would give them.

    Between two of them comes None whenever a piece of the next has come.
    """
    began, equal = time.perf_counter(), Occurrences()
    for index, ((prompt, params), numbers) in enumerate(zip(jobs, wanted, strict=True)):
        try:
            tokens = prompt_tokens(prompt, tokenizer, tokenizer.vocab_size)
        except UsageError as error:
            if numbers:
                times = Timings(None, None, time.perf_counter() - began)
                yield Completion(index, numbers[0], prompt, "", [], "error", times, str(error))
            continue
        occurrence = equal.number(prompt_digest(tokens), params.seed)
        for sample in numbers:
            waited = time.perf_counter() - began
            generation = Generation(model, tokenizer, tokens, params, cache, step, occurrence=occurrence, sample=sample)
            for _ in generation:
                yield None
            yield dataclasses.replace(generation.completion(index, sample, waited), prompt=prompt)


def all_at_once(engine: Engine, jobs: Sequence[Job], *, wanted: Sequence[Sequence[int]]) -> Iterator[Completion | None]:
    """The engine's wanted completions as they are finished, and None whenever a token of another has come."""
    for piece in engine.stream([prompt for prompt, _ in jobs], [params for _, params in jobs], wanted=wanted):
        yield piece.completion


def run(completions: Iterator[Completion | None], answers: Answers, engine: Engine | None) -> int | None:
    """Give the completions to the answers as they come; the number of the signal that stopped it, or None.

    At a signal what is not finished is given up, and all that is finished will be written.
    """
    notice = "stopping: what is finished is written; once more stops at once"
    lines_are_seen = answers.on_stdout and sys.stdout.isatty()
    with noted(*STOPPING, notice=notice) as caught, Progress(answers, engine, live=not lines_are_seen) as progress:
        for completion in completions:
            if completion is not None:
                answers.add(completion)
            progress.show()
            if caught:
                return caught[0]
    return None


class Progress:
    """Running, waiting and done on stderr: a live line on a terminal, now and then a plain one elsewhere."""

    def __init__(self, answers: Answers, engine: Engine | None, *, live: bool = True):
        self.answers, self.engine = answers, engine
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

    def show(self) -> None:
        now = time.perf_counter()
        if now - self.shown < (LIVE_INTERVAL if self.live else PLAIN_INTERVAL):
            return
        self.shown = now
        if self.live:
            self.live.update(Text(self._line(now)))
        else:
            self.console.print(self._line(now), highlight=False, soft_wrap=True)

    def _line(self, now: float) -> str:
        told = f"{self.answers.done:,} of {self.answers.total:,} done"
        if self.engine is None:
            return told
        scheduler, stats = self.engine.scheduler, self.engine.stats
        allocator = scheduler.allocator
        speed = (stats.prefill_tokens + stats.decode_tokens) / (now - self.began)
        return (
            f"{len(scheduler.running):,} running, {self.engine.queued:,} waiting, {told}  "
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
