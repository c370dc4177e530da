"""Many prompts from a file: what `prompts` reads, how they are continued, and how far that is.

A line of the file is a prompt. In a .jsonl file it is an object with `prompt` (text) or `tokens` (ids), and any field
of `SamplingParams` that is to differ from the command line's; blank lines are skipped there. What is written is in
`fastgpt.generation.answers`.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from fastgpt.config.generation import SamplingParams
from fastgpt.errors import UsageError, UsageErrors
from fastgpt.generation.answers import Answers, Job
from fastgpt.generation.compiled_decoder import CompiledDecoder
from fastgpt.generation.engine import Engine
from fastgpt.generation.random_stream import Occurrences, prompt_digest
from fastgpt.generation.request import Completion, Timings, prompt_tokens
from fastgpt.generation.settings import sampling
from fastgpt.generation.single import Generation
from fastgpt.generation.terminal import Progress
from fastgpt.model.gpt import GPT
from fastgpt.system.files import decode_utf8
from fastgpt.system.signals import STOPPING, noted
from fastgpt.tokenizer.base import Tokenizer

MOST_ERRORS = 50  # lines of a file that are told to be wrong


def read_prompts(name: str, defaults: SamplingParams) -> list[Job]:
    """The prompts of a file, or with - of stdin, and the settings of each.

    Raises:
        UsageError: a file that cannot be read, or a line that is no prompt; it is named, and nothing was computed.
    """
    try:
        content = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except OSError as error:
        raise UsageError(f"`prompts` {name} cannot be read: {error.strerror}") from None
    lines = decode_utf8(content, f"`prompts`: {name}").split("\n")
    if lines[-1] == "":
        lines.pop()
    lines = [line.removesuffix("\r") for line in lines]
    objects = name.endswith(".jsonl")
    if not lines or (objects and not any(map(str.strip, lines))):
        raise UsageError(f"`prompts` {name} is empty; write a prompt a line into it")
    return _read_objects(name, lines, defaults) if objects else [(line, defaults) for line in lines]


def _read_objects(name: str, lines: Sequence[str], defaults: SamplingParams) -> list[Job]:
    jobs, errors = [], []
    for i, line in enumerate(lines, 1):
        if line.strip():
            try:
                jobs.append(_read_object(f"`prompts` {name}, line {i}", line, defaults))
            except UsageError as error:
                errors.append(error)
    if len(errors) > MOST_ERRORS:
        more = len(errors) - MOST_ERRORS
        errors[MOST_ERRORS:] = [UsageError(f"`prompts` {name} has {more:,} more lines that are no requests")]
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
    decoder: CompiledDecoder | None = None,
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
            generation = Generation(
                model, tokenizer, tokens, params, cache, decoder, occurrence=occurrence, sample=sample
            )
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
