"""Continues many prompts, by an engine or one by one, and gives the continuations to their `Answers`."""

import dataclasses
import sys
import time
from collections.abc import Iterator, Sequence

from fastgpt.errors import UsageError
from fastgpt.generation.answers import Answers, Job
from fastgpt.generation.compiled_decoder import CompiledDecoder
from fastgpt.generation.engine import Engine
from fastgpt.generation.random_stream import Occurrences, prompt_digest
from fastgpt.generation.request import Completion, Timings, prompt_tokens
from fastgpt.generation.single import Generation
from fastgpt.generation.terminal import PromptsDisplay
from fastgpt.model.gpt import GPT
from fastgpt.system.signals import STOPPING, noted
from fastgpt.tokenizer.base import Tokenizer


def one_by_one(
    model: GPT,
    tokenizer: Tokenizer,
    jobs: Sequence[Job],
    cache: str,
    decoder: CompiledDecoder | None = None,
    *,
    wanted: Sequence[Sequence[int]],
) -> Iterator[Completion | None]:
    """The wanted continuations in order, with the dense cache or none; they are those that the engine would give.

    Yields None for each piece of a continuation that is not finished.
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
    """The engine's wanted continuations as they finish; None for each token of one that is not finished."""
    for piece in engine.stream([prompt for prompt, _ in jobs], [params for _, params in jobs], wanted=wanted):
        yield piece.completion


def answer(completions: Iterator[Completion | None], answers: Answers, engine: Engine | None) -> int | None:
    """Give the completions to the answers as they come; the number of the signal that stopped it, or None.

    A signal drops the continuations that are not finished; `answers` still writes those that are.
    """
    notice = "stopping: what is finished is written; once more stops at once"
    lines_are_seen = answers.on_stdout and sys.stdout.isatty()
    with noted(*STOPPING, notice=notice) as caught, PromptsDisplay(answers, engine, live=not lines_are_seen) as display:
        for completion in completions:
            if completion is not None:
                answers.add(completion)
            display.show()
            if caught:
                return caught[0]
    return None
